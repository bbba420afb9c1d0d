"""Triton kernels compute what torch's operations do, on a GPU as in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from megavlm.parallel import backend
from tests.te import branches, interpreted, sorted_tokens

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def device() -> str:
    """Return the name of the device of this process."""
    return str(backend.start(5).device)


@pytest.mark.parametrize("name", branches.SETTINGS)
def test_kernels_add_residual_branches_as_torch_does(device: str, name: str) -> None:
    for dtype, limit in zip(DTYPES, (1e-6, 2**-7), strict=True):
        assert max(branches.distances(dtype, branches.SETTINGS[name], device)) <= limit


def test_kernels_drop_and_dequantise_the_same_numbers(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, one in interpreted.dropped(generator, device).items():
        assert all(one["equal"]), name
        assert one["farthest"] <= (1e-6 if "float32" in name else 2**-7), name
    for name, one in interpreted.dequantised(generator, device).items():
        assert one["farthest"] <= (1e-6 if "float32" in name else 2**-7), name


@pytest.mark.parametrize("need", sorted_tokens.NEEDS)
@pytest.mark.parametrize("name", sorted_tokens.CASES)
def test_kernels_sort_tokens_as_torch_does(device: str, name: str, need: str) -> None:
    from megavlm.model.kernels import transformer_engine_kernels

    transformer_engine_kernels()  # sorts by kernels from now on
    found = sorted_tokens.distances(sorted_tokens.CASES[name], need, device)
    assert all(distance < 1e-3 for distance in found), found
