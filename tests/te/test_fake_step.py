"""On a CUDA device that is not there, no tensor of a training step is on the wrong device, and
nothing in it makes the host wait.
"""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

import pytest
import torch

from tests.te import fake_cuda
from tests.te.fake_step import SETTINGS
from tests.te.process import answer_of

MISSING = [
    what
    for what, found in {
        "Transformer Engine": importlib.util.find_spec("transformer_engine"),
        "a CUDA build of torch": torch.version.cuda,
        "gcc and g++": shutil.which("gcc") and shutil.which("g++"),
    }.items()
    if not found
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what ``fake_step.py`` prints, from a process of its own."""
    libraries = fake_cuda.libraries(tmp_path_factory.mktemp("libraries"))
    return answer_of("tests.te.fake_step", variables=libraries)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_tensor_is_on_the_device(found: dict[str, Any], name: str) -> None:
    assert "error" not in found[name], found[name]["error"]
    assert found[name]["weights"] > 1e6
    assert found[name]["stray"] == []


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "local layers"])
def test_the_host_never_waits(found: dict[str, Any], name: str) -> None:
    assert found[name]["waits"] == {}


def test_local_layers_wait_in_rotary_embedding_only(found: dict[str, Any]) -> None:
    waits = found["local layers"]["waits"]
    assert waits
    assert all("rope_utils.py" in wait for wait in waits), waits


def test_a_planted_wait_is_found(found: dict[str, Any]) -> None:
    (wait,) = found["planted wait"]["waits"]
    assert ".total.sum().item()" in wait


def test_a_planted_tensor_of_the_host_is_found(found: dict[str, Any]) -> None:
    assert "two different devices" in found["planted mismatch"]["error"]
