"""What a command is told of its configuration: what is wrong with it, or, for ``--check``, that
nothing is, and what it would start from.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from megavlm.config import torchrun
from megavlm.config.schema import Config

FindStart = Callable[[Sequence[Config], int], str]
"""Looks at what the stages of a command would start from on so many ranks, writes nothing, and
returns it in words. It raises ValueError or OSError if that would be refused."""

PROGRAM = "pretrain_vlm.py"
_PATIENCE_SECONDS = 3.0


def end_check(runs: Sequence[Config], ranks: int, find_start: FindStart | None) -> NoReturn:
    """End a ``--check`` that has found nothing wrong with the configurations themselves.

    Args:
        runs: of all stages.
        ranks: that they were checked for.
        find_start: looks at what they would start from; none: nothing does.
    """
    try:
        start = find_start(runs, ranks) if find_start else ""
    except (ValueError, OSError) as error:
        print_problems([str(error)])
        raise SystemExit(2) from None
    if is_first_rank():
        named = "1 rank" if ranks == 1 else f"{ranks} ranks"
        print(f"nothing is wrong with the configuration for {named}")
        if start:
            print(start)
    raise SystemExit(0)


def print_problems(found: Sequence[str]) -> None:
    """Print what is wrong with a configuration."""
    listed = "\n  ".join(found)
    print_error(f"{counted(found)} with the configuration:\n  {listed}")


def counted(found: Sequence[str]) -> str:
    """Return how many problems there are, in words."""
    return f"{len(found)} problem" if len(found) == 1 else f"{len(found)} problems"


def print_error(error: str) -> None:
    """Print the error once: other ranks wait, and print it only if the first rank has not ended
    the job (torchrun kills all ranks as soon as one exits).
    """
    where = ""
    if not is_first_rank():
        time.sleep(_PATIENCE_SECONDS)
        where = f" on {torchrun.name_of_rank()}"
    hint = "--help lists the sections of options, and --help SECTION the options of one"
    torchrun.refuse(f"{PROGRAM}: error{where}: {error}\n{hint}")


def warn(text: str) -> None:
    """Print a warning once."""
    if is_first_rank():
        print(f"WARNING: {text}", file=sys.stderr, flush=True)


def is_first_rank() -> bool:
    """Return whether this process is the first of its job; one without torchrun is alone."""
    return os.environ.get("RANK", "0") == "0"
