"""On CUDA devices that are not there, no tensor of any rank's training step is on the wrong device,
nothing in it makes the host wait, and what the ranks send each other ends.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.te import fake_cuda
from tests.te.exchanges import hang
from tests.te.fake_ranks import LAYOUTS
from tests.te.process import answer_of
from tests.te.test_fake_step import MISSING

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return what ``fake_ranks.py`` prints, from a process of its own."""
    libraries = fake_cuda.libraries(tmp_path_factory.mktemp("libraries"))
    return answer_of("tests.te.fake_ranks", variables=libraries)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_rank_mixes_devices_or_waits(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert len(found[name]) == LAYOUTS[name][0]
    for rank in found[name]:
        assert "error" not in rank, rank["error"]
        assert rank["weights"] > 1e5
        assert rank["stray"] == [] and rank["waits"] == {}


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_ask_nccl_in_an_order_that_ends(
    found: dict[str, list[dict[str, Any]]], name: str
) -> None:
    lines = [rank["exchanges"] for rank in found[name]]
    shared = [line for line in lines[0] if len(line.get("ranks", ())) > 1]
    assert shared
    assert not hang(lines), hang(lines)


def test_planted_faults_are_found(found: dict[str, list[dict[str, Any]]]) -> None:
    ((wait,),) = (rank["waits"] for rank in found["planted wait"])
    assert ".total.sum().item()" in wait
    assert "two different devices" in found["planted mismatch"][0]["error"]
