"""Whether the checkpoints of a run have room where they go: a disk that is full is noticed hours
after the start.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megavlm.checkpoint import directory
from megavlm.config.schema import Config, Parallel
from megavlm.planner.activations import NUMBER_BYTES
from megavlm.planner.layout import make_layout
from megavlm.planner.memory import weight_bytes
from megavlm.planner.parameters import parameters_on_rank

# Kept free while the shards are written, for the small files that come after them: a disk that is
# full by then would leave one rank with an error and the others waiting for it.
SPARE_BYTES = 64 << 20
_MIB = 2**20


def checkpoint_bytes(config: Config, *, trained_only: bool = False) -> float:
    """Count the bytes of a checkpoint: weights in the dtype of the run, and master weights, moments
    and averages of what is trained. Moments of earlier stages, and small files, come on top.

    Args:
        config: the run.
        trained_only: leave frozen weights out.
    """
    whole = replace(config, parallel=Parallel())
    [chunk] = make_layout(whole).chunks
    found = parameters_on_rank(whole, chunk)
    held = found.trained if trained_only else found.weights
    stored = replace(found, weights=held, in_fp8=0, in_nf4=0)  # 4 bits are written as 16
    counted = weight_bytes(whole, stored, data_ranks=1)
    written = counted["weights"] + counted["optimizer"]
    if config.training.precision == "float32":
        # Weights are their own master weights in memory, and are written twice.
        written += NUMBER_BYTES["float32"] * found.trained
    return written


def room_warnings(config: Config, step: int) -> Iterator[str]:
    """Warn of a file system with less room than the checkpoints need that a run still adds.

    Args:
        config: the run.
        step: that it starts after.
    """
    files = config.checkpoint
    if not files.save:
        return
    try:
        free = shutil.disk_usage(files.save).free
        there = len(directory.candidates(Path(files.save)))
    except OSError:  # the folder cannot be looked at, which saving tells of
        return
    added = _added(config, step, there)
    last = checkpoint_bytes(config)
    each = checkpoint_bytes(config, trained_only=True) if files.trained_only else last
    if free < (added - 1) * each + last + SPARE_BYTES:
        count = "a checkpoint" if added == 1 else f"{added} checkpoints"
        fewer = " or keep fewer with --checkpoint.keep," if added > 1 else ""
        yield (
            f"--checkpoint.save {files.save}: {count} of about {last / _MIB:,.0f} MiB will come"
            f" there, and {SPARE_BYTES / _MIB:.0f} MiB for a moment, but {free / _MIB:,.0f} MiB are"
            f" free; make room,{fewer} or name another folder"
        )


def _added(config: Config, step: int, there: int) -> int:
    """Return by how many the checkpoints in the save folder grow at most: the new one is written
    before the oldest is removed. Those of ``save_epochs`` are counted once.
    """
    files = config.checkpoint
    interval = files.save_interval
    left = math.ceil((config.training.steps - step) / interval) if interval else 1
    if not files.keep:
        return max(left, 1)
    return max(min(left, files.keep + files.keep_best + 1 - there), 1)
