"""What happens to one rank ends all of them: the others would wait for it, on other machines until
``--parallel.timeout_minutes`` are over.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

_MOST_SHOWN = 8


class RankError(RuntimeError):
    """What went wrong on some ranks, with files as a rule; every rank raises it."""


def gather_errors(error: str) -> str:
    """Return what went wrong on all ranks, each text with the first rank that says it, and how many
    there are if they are many, since each may name a file of its rank; empty if nothing did.
    Collective.

    Args:
        error: of this rank; empty if there is none.
    """
    errors: list = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    told = {text: rank for rank, text in reversed(list(enumerate(errors))) if text}
    listed = [f"rank {rank}: {text}" for text, rank in reversed(told.items())]
    more = [f"and {len(listed) - _MOST_SHOWN} more"] if len(listed) > _MOST_SHOWN else []
    return "; ".join([*listed[:_MOST_SHOWN], *more])


@contextmanager
def raised_on_all() -> Iterator[None]:
    """Raise on every rank what the block raises on one, which reads or writes files and exchanges
    nothing. Collective, at the end of the block. Where an error may be a mistake in the code, the
    rank that made it prints the traceback.

    Raises:
        RankError: the block raised an error on some rank.
    """
    told = ""
    try:
        yield
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        if not isinstance(error, OSError | ValueError):
            traceback.print_exc()
    if listed := gather_errors(told):
        raise RankError(listed)
