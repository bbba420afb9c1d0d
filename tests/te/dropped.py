"""Runs the Triton kernel of dropout on adapters' inputs in Triton's interpreter, on a CPU, beside
torch's operations, and prints whether both give the same bits, as JSON. ``test_dropout_kernel``
starts it.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from megavlm.model.lora_dropout import Location, multiply, multiply_by_kernel

# Neither rows nor columns fill the last block; the hash of the first rows overflows.
SHAPES = {"text": (37, 1, 136), "tiles": (5, 7, 264)}
LOCATIONS = {
    "start": Location(draw=0),
    "middle": Location(draw=0, first_row=524_280, first_tile=12, first_feature=1000),
}
SEEDS = (0, 1, 123_456_789, -(2**31), 2**31 - 1)


def main() -> None:
    """Compare every setting and print what was found."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, shape in SHAPES.items():
        for where, location in LOCATIONS.items():
            for kind in (torch.float32, torch.bfloat16):
                values = torch.randn(shape, generator=generator).to(kind)
                pairs = [
                    [
                        drop(values, seed, int(0.3 * 2**31), 1 / 0.7, location)
                        for drop in (multiply_by_kernel, multiply)
                    ]
                    for seed in SEEDS
                ]
                zeros = [float((one == 0).float().mean()) for one, _ in pairs]
                found[f"{name}, {where}, {str(kind).split('.')[1]}"] = {
                    "equal": [torch.equal((one == 0), (two == 0)) for one, two in pairs],
                    "farthest": max(
                        float(((one - two).abs() / two.abs().clamp(min=1e-6)).max())
                        for one, two in pairs
                    ),
                    "zeros": zeros,
                }
    json.dump(found, os.fdopen(int(sys.argv[1]), "w"))


if __name__ == "__main__":
    main()
