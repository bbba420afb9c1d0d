"""Measure what saving and loading a checkpoint take of each data-parallel rank: memory of its host,
seconds, bytes that it writes; with whole tensors of the optimizer's state on one rank each, and as
megatron-core does it, with all of them on every rank. Two cores, no GPU, two minutes:

    python tools/benchmark/saving.py --json docs/benchmarks/saving.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone needs no installation

from tools.benchmark.ranks import on_ranks
from tools.benchmark.runner import facts

MODEL = ("--stage", "2", "--model", "tiny", "--training.precision", "bfloat16")
MODEL += ("--architecture.vision.num_layers", "2", "--architecture.language.num_layers", "6")
MODEL += ("--architecture.language.hidden_size", "640", "--architecture.language.kv_channels", "80")
MODEL += ("--architecture.language.ffn_hidden_size", "2560", "--parallel.bucket_size", "1000000000")
_LOOK_SECONDS = 0.002


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; 0 where all was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown = "data-parallel ranks (default: %(default)s)"
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help=shown)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, Any] = facts()
    for ranks in options.ranks:
        for how in ("owners", "all_on_each_rank"):
            with tempfile.TemporaryDirectory(prefix="megavlm-benchmark-") as folder:
                found = on_ranks(on_rank, ranks, folder, how == "owners")
            row = {"ranks": ranks} | {
                name: max(one[name] for one in found) for name in sorted(found[0])
            }
            print(how, json.dumps(row), flush=True)
            results.setdefault(how, []).append(row)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def on_rank(folder: str, by_owners: bool) -> dict[str, float]:
    """Save a checkpoint and load it again, on every rank; megabytes and seconds of this one."""
    from megavlm.checkpoint import shared_saving, step_folder, train_state
    from megavlm.checkpoint.async_writer import Writing
    from megavlm.checkpoint.shared_loading import Replicas
    from megavlm.config.cli import parse, to_yaml
    from megavlm.model.weights import fill
    from megavlm.parallel import backend, process_groups
    from megavlm.planner.layout import make_layout
    from megavlm.train import checkpoint
    from megavlm.train.build_model import build_model
    from tools.benchmark.trainer import random_weights

    config = parse(MODEL)
    device = backend.start(5)
    layout = make_layout(config)
    groups = process_groups.create(config.parallel, 0, layout.embedding_chunk)
    draw = random_weights(device.device)
    step = Path(folder) / "step_00000001"
    with contextlib.nullcontext() if by_owners else as_megatron_core():
        built = build_model(config, layout, groups, device, lambda chunks: fill(chunks, draw))
        of_run = (built.chunks, built.optimizer, config.fp8)
        checkpoint.sharded(*of_run, is_loading=True)  # makes the moments, as a first step does
        writings: list[Writing] = []

        def save() -> None:
            tensors = checkpoint.sharded(*of_run, is_loading=False)
            if by_owners:
                replicas = Replicas.of(groups.collection)
                tensors["model"] = shared_saving.share(tensors["model"], replicas)
            (step / "shards").mkdir(parents=True, exist_ok=True)
            writings.append(Writing(tensors, step / "shards", beside=False))

        saving = _measured(save)
        error = writings[0].describe()
        assert not error, error
        if groups.rank == 0:
            (step / step_folder.CONFIG_NAME).write_text(to_yaml(config))
            train_state.write(train_state.State(step=1), step)
        groups.any_rank(False, device.device)  # a barrier
        found = step_folder.read(step)
        loading = _measured(lambda: checkpoint.load_optimizer(found, *of_run))
    sums = writings[0].wait().sums or {}
    return {
        "parameters": sum(one.numel() for one in built.chunks[0].parameters()),
        "saving_mb": saving[0],
        "saving_s": saving[1],
        "loading_mb": loading[0],
        "loading_s": loading[1],
        "written_mb": sum(size for size, _ in sums.values()) / 1e6,
    }


@contextlib.contextmanager
def as_megatron_core() -> Iterator[None]:
    """Gather all of the optimizer's state on every rank inside the context. Ranks still read a
    share each; there is one bucket, where megatron-core cuts parameters out at the right offsets.
    """
    from megavlm.checkpoint import shared_loading
    from megavlm.train import optimizer_state

    with (
        mock.patch.object(optimizer_state, "own_whole_tensors"),
        mock.patch.object(shared_loading, "OWNED", ()),
    ):
        yield


def _measured(action: Callable[[], None]) -> tuple[float, float]:
    """Return the most megabytes that this process took more than before, and seconds."""
    process = psutil.Process()
    before = process.memory_info().rss
    most = [before]
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_SECONDS):
            most[0] = max(most[0], process.memory_info().rss)

    watching = threading.Thread(target=look)
    watching.start()
    start = time.perf_counter()
    try:
        action()
    finally:
        seconds = time.perf_counter() - start
        ended.set()
        watching.join()
    return (most[0] - before) / 1e6, seconds


if __name__ == "__main__":
    sys.exit(main())
