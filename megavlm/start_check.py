"""What a command would start from, for ``--check``, and what to be warned of: the code of the run
itself looks, and only reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megavlm import job_checks
from megavlm.config.schema import Config, Init


def check_start(stages: Sequence[Config], ranks: int) -> str:
    """Return in words what the stages of a command would start from on so many ranks, below
    warnings.

    Raises:
        ValueError: it would be refused.
        OSError: it cannot be read.
    """
    found = [text for run in stages for text in job_checks.warnings(run, ranks)]
    return "\n".join([*(f"warning: {text}" for text in dict.fromkeys(found)), _start(stages)])


def _start(stages: Sequence[Config]) -> str:
    """Return in words what the stages of a command would start from; raises as ``check_start``."""
    first = stages[0]
    if not first.checkpoint.load and first.init == Init() and not any(map(_has_begun, stages)):
        place = f"; {first.checkpoint.save} is new or empty" if first.checkpoint.save else ""
        return f"it would start with random weights{place}"
    # Only now, since it takes seconds: most checks have no checkpoint to look at.
    from megavlm.train.stages import describe_start

    return describe_start(stages)


def _has_begun(run: Config) -> bool:
    """Return whether there is anything in the save folder, or in its place."""
    save = Path(run.checkpoint.save)
    if not run.checkpoint.save or not save.exists():
        return False
    return not save.is_dir() or any(save.iterdir())
