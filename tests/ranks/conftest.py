"""The pool of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks.pool import Pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Offer gloo ranks that run functions: ``ranks.run(function, world_size, *args)``."""
    pool = Pool()
    yield pool
    pool.close()
