"""On CUDA devices that are not there, the step of every recipe mixes no devices and makes the host
wait nowhere but where local kernels and experts need numbers of the device.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

from tests.te import fake_cuda
from tests.te.exchanges import hang
from tests.te.fake_recipes import CASES
from tests.te.process import answer_of
from tests.te.test_fake_step import MISSING

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
LOCAL = ("rope_utils.py",)
EXPERTS = ("cpu_tensor = tensor.to",)
MASKS = ("masked_select(routing_map)",) if version("megatron-core").startswith("0.16.") else ()
# Words of the lines that need numbers of the device: lengths of samples, tokens of experts.
WAITS = {
    "PaliGemma 2, local": LOCAL,
    "experts": EXPERTS,
    "Qwen3-VL, experts": EXPERTS,
    "experts beside a shared one, FP8": EXPERTS,
    "GPT-OSS": EXPERTS,
    "GPT-OSS, FP8": EXPERTS,
    "GPT-OSS, local": LOCAL + EXPERTS + MASKS,
    "GPT-OSS, CP2": EXPERTS,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return what ``fake_recipes.py`` prints, from a process of its own."""
    libraries = fake_cuda.libraries(tmp_path_factory.mktemp("libraries"))
    return answer_of("tests.te.fake_recipes", variables=libraries)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_on_the_device(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert len(found[name]) == CASES[name].ranks
    for rank in found[name]:
        assert "error" not in rank, rank["error"]
        assert rank["weights"] > 1e7
        assert rank["stray"] == []


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_nothing_else(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    lines = WAITS.get(name, ())
    for rank in found[name]:
        waits = rank["waits"]
        assert [wait for wait in waits if not any(line in wait for line in lines)] == []
        assert all(any(line in wait for wait in waits) for line in lines)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ranks > 1])
def test_ranks_ask_nccl_in_an_order_that_ends(
    found: dict[str, list[dict[str, Any]]], name: str
) -> None:
    lines = [rank["exchanges"] for rank in found[name]]
    assert [line for line in lines[0] if len(line.get("ranks", ())) > 1]
    assert not hang(lines), hang(lines)
