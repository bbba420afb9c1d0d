"""What a disk does to one rank ends all of them: the others would wait for it, on other machines
until ``--parallel.timeout_minutes`` are over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


class RankError(RuntimeError):
    """What went wrong with files on some ranks; every rank raises it."""


def gather_errors(error: str) -> str:
    """Return what went wrong on all ranks, each text with the first rank that says it; empty if
    nothing did. Collective.

    Args:
        error: of this rank; empty if there is none.
    """
    errors: list = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    told = {text: rank for rank, text in reversed(list(enumerate(errors))) if text}
    return "; ".join(f"rank {rank}: {text}" for text, rank in reversed(told.items()))


@contextmanager
def raised_on_all() -> Iterator[None]:
    """Raise on every rank what the block raises on one, which reads or writes files and exchanges
    nothing. Collective, at the end of the block.

    Raises:
        RankError: the block raised OSError or ValueError on some rank.
    """
    error = ""
    try:
        yield
    except (OSError, ValueError) as found:
        error = f"{type(found).__name__}: {found}"
    if listed := gather_errors(error):
        raise RankError(listed)
