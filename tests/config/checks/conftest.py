"""What the tests of the cross checks have in common."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def packs(tmp_path: Path) -> Path:
    (tmp_path / "packs").mkdir()
    return tmp_path / "packs"
