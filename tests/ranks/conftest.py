"""The pool of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from megavlm.config.schema import Config
from megavlm.evaluate import run as evaluation
from tests.ranks import commands
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, train_curve

# What tests/run.sh --quick runs with ranks; the others of this folder are slow.
QUICK = ("test_packs.py",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests with ranks as slow, but for a few; called by pytest."""
    for item in items:
        if item.path.parent.name == "ranks" and item.path.name not in QUICK:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Offer gloo ranks that run functions: ``ranks.run(function, world_size, *args)``."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def train_alone(ranks: Pool) -> Callable[[Config], Curve]:
    """Return a function that trains in one process, each configuration of a file once."""
    return cache(lambda config: ranks.run(train_curve, 1, config)[0])


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let tools that answer with ``pretrain_vlm.py`` start it as ``commands`` does."""

    def run(words: Sequence[str], ranks: int, model: Path, *, is_quiet: bool) -> None:
        done = commands.run([words] * ranks, tmp_path / "told")
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(evaluation, "_run", run)
