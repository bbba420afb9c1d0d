"""Runs the Triton kernels of adapters in Triton's interpreter, on a CPU, beside torch's operations,
and prints how far they are from each other, as JSON. ``test_interpreted`` starts it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

from megavlm.model.lora_dropout import Location, multiply, multiply_by_kernel
from megavlm.model.nf4 import Nf4Weight, dequantise

DTYPES = (torch.float32, torch.bfloat16)
# Neither rows nor columns fill the last block; the hash of the first rows overflows.
SHAPES = {"text": (37, 1, 136), "tiles": (5, 7, 264)}
LOCATIONS = {
    "start": Location(draw=0),
    "middle": Location(draw=0, first_row=524_280, first_tile=12, first_feature=1000),
}
SEEDS = (0, 1, 123_456_789, -(2**31), 2**31 - 1)
# Rows, columns, and the first of these in the whole weight.
WEIGHTS = {"whole blocks": (5, 1088, 0), "parts of blocks and of bytes": (3, 1100, 151)}


def distance(one: Tensor, two: Tensor) -> float:
    """Return the largest difference relative to what it should be."""
    return float(((one - two).abs() / two.abs().clamp(min=1e-6)).max())


def dropped(generator: torch.Generator, device: str = "cpu") -> dict[str, Any]:
    """Compare what both drop of numbers of each shape and place."""
    found = {}
    for name, shape in SHAPES.items():
        for where, location in LOCATIONS.items():
            for dtype in DTYPES:
                # As some gradients are, not contiguous.
                values = torch.randn(shape[::-1], generator=generator).permute(2, 1, 0)
                values = values.to(device, dtype)
                pairs = [
                    [
                        drop(values, seed, int(0.3 * 2**31), 1 / 0.7, location)
                        for drop in (multiply_by_kernel, multiply)
                    ]
                    for seed in SEEDS
                ]
                found[f"{name}, {where}, {dtype}"] = {
                    "equal": [torch.equal((one == 0), (two == 0)) for one, two in pairs],
                    "farthest": max(distance(one, two) for one, two in pairs),
                    "zeros": [float((one == 0).float().mean()) for one, _ in pairs],
                }
    return found


def dequantised(generator: torch.Generator, device: str = "cpu") -> dict[str, Any]:
    """Compare what both make of weights in 4 bits."""
    from megavlm.model.triton_kernels import nf4_kernel

    found = {}
    for name, (rows, columns, first) in WEIGHTS.items():
        for dtype in DTYPES:
            weight = torch.randn(rows, columns, generator=generator).to(device, dtype)
            nf4 = Nf4Weight(weight, first)
            given = (nf4.codes, nf4.pairs, nf4.scales, nf4.left, columns, dtype)
            one = nf4_kernel.dequantise(*given)
            two = dequantise(*given)
            assert one.dtype == two.dtype == dtype and one.shape == two.shape
            found[f"{name}, {dtype}"] = {
                "farthest": distance(one, two),
                "from_weight": float((two - weight).norm() / weight.norm()),
            }
    return found


def main() -> None:
    """Compare every kernel and print what was found."""
    generator = torch.Generator().manual_seed(1)
    found = {"dropout": dropped(generator), "nf4": dequantised(generator)}
    json.dump(found, os.fdopen(int(sys.argv[1]), "w"))


if __name__ == "__main__":
    main()
