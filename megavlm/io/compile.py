"""Plain loops over arrays as machine code. Imported only if numba is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numba


@lru_cache
def compiled(loop: Callable) -> Callable:
    """Return a plain loop over arrays as machine code, compiled at its first call and cached on
    disk.
    """
    return numba.njit(loop, cache=True)
