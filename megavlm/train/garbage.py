"""Python's garbage collector in a training loop."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def what_lives_set_aside() -> Iterator[None]:
    """Spare the collector the objects that live as long as the loop: model, optimizer, dataset,
    modules. It would look at all of them again and again, at other steps on each rank, and the
    device of that rank, and then every other one, would run out of kernels meanwhile.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
