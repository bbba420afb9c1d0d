"""What all tests share: how garbage is collected in the process that runs them. It holds thousands
of tests and large packages, and each collection would look at all their objects.
"""

from __future__ import annotations

import gc

import pytest


def pytest_collection() -> None:
    """Collect no garbage while the tests are imported; called by pytest."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave out of later collections what is there now; called by pytest."""
    _leave_out()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Leave out what a file of tests has imported; called by pytest after each test."""
    if nextitem is not None and nextitem.path != item.path:
        _leave_out()


def _leave_out() -> None:
    """Free what is garbage, and leave what is not out of later collections."""
    gc.collect()
    gc.freeze()
