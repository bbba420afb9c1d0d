"""Runs the Triton kernels of residual branches in Triton's interpreter, on a CPU, and prints how
far they are from torch's operations, as JSON. ``test_branches`` starts it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

SETTINGS: dict[str, dict[str, bool]] = {
    "scale": dict(scale=True),
    "scale, drop path": dict(scale=True, keep=True),
    "frozen scale": dict(scale=True, trains_scale=False),
    "frozen scale, drop path": dict(scale=True, keep=True, trains_scale=False),
    "drop path": dict(keep=True),
    "bias alone": {},
}
# Two programs of a column have two rounds of rows, which end in the middle of one, and the last
# block of columns has some to spare.
PROGRAMS = 4
TOKENS = 5
TILES = 11
WIDTH = 136


def draw(
    dtype: torch.dtype,
    device: str,
    scale: bool = False,
    keep: bool = False,
    trains_scale: bool = True,
):
    """Return hidden, branch, bias, scale, keep, and the gradient of the sum."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    hidden = numbers(TOKENS, TILES, WIDTH).requires_grad_()
    branch = numbers(TOKENS, TILES, WIDTH).requires_grad_()
    bias = numbers(WIDTH).requires_grad_()
    factor = numbers(WIDTH).requires_grad_(trains_scale) if scale else None
    draws = torch.rand(TILES, generator=generator).to(device)
    kept = (draws < 0.7) / 0.7 if keep else None
    return hidden, branch, bias, factor, kept, numbers(TOKENS, TILES, WIDTH)


def results(function: Any, given: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return the sum and the gradients of what is trained, calculated in ``dtype``."""
    (*inputs, keep, grad) = given
    cast = [
        None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs
    ]
    if keep is not None:
        keep = keep.to(inputs[0].dtype).float()
    made = function(*cast, keep)
    trained = [x for x in cast if x is not None and x.requires_grad]
    return [made.detach(), *torch.autograd.grad(made, trained, grad.to(dtype))]


def distances(dtype: torch.dtype, settings: dict[str, bool], device: str = "cpu") -> list[float]:
    """Compare with float64, relative to the largest value of each result."""
    from megavlm.model.residual_branch import add_branch, add_branch_by_kernels
    from megavlm.model.triton_kernels import branch_kernels

    branch_kernels._PROGRAMS = PROGRAMS
    given = draw(dtype, device, **settings)
    exact = results(add_branch, given, torch.float64)
    found = results(add_branch_by_kernels, given, dtype)
    assert all(one.dtype == dtype for one in found)
    pairs = zip(found, exact, strict=True)
    return [float((one - two).abs().max() / two.abs().max()) for one, two in pairs]


def let_numpy_count() -> None:
    """Make loops up to a number of the device work: the interpreter of Triton 3.6 takes the number
    from an array of one element, which NumPy allows no more.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


def main() -> None:
    """Compare every setting and print what was found."""
    let_numpy_count()
    kinds = (torch.float32, torch.bfloat16)
    found = {
        name: {str(kind).split(".")[1]: distances(kind, settings) for kind in kinds}
        for name, settings in SETTINGS.items()
    }
    json.dump(found, os.fdopen(int(sys.argv[1]), "w"))


if __name__ == "__main__":
    main()
