"""The likeliest token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megavlm.model.greedy import likeliest_tokens

ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 2.0, 1.0, 9.0], 1),  # the last one is padding
        ([2.0, 2.0, 2.0, 9.0], 0),
        ([float("nan"), 1.0, float("nan"), 9.0], 1),
        ([float("nan"), float("nan"), float("nan"), 9.0], 0),
        ([float("-inf"), float("-inf"), float("inf"), 9.0], 2),
    ],
)
def test_the_first_of_the_largest_logits(logits: list[float], expected: int) -> None:
    assert likeliest_tokens(torch.tensor([logits]), 3, ALONE).tolist() == [expected]
