"""Compiles the package's Triton kernels for a Hopper GPU, which need not be there, where they would
be started, and prints how they read, write and count large tensors, as JSON. ``test_branches`` and
``test_interpreted`` start it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from typing import Any

import torch

KINDS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8"}
CODES: dict[str, dict[str, Any]] = {}


def compile_for_hopper(function: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
    """Take the place of Triton's ``JITFunction.run``, which starts a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = function.signature.bind(*args, **settings).arguments
    kinds = {}
    constants = {}
    aligned = {}
    for number, (name, value) in enumerate(given.items()):
        kinds[name] = "constexpr"
        if isinstance(value, torch.Tensor):
            kinds[name] = KINDS[value.dtype]
            aligned[number,] = [["tt.divisibility", 16]]
        elif function.params[number].is_constexpr or value is None:
            constants[number,] = value
        else:
            kinds[name] = "i32"
    source = ASTSource(function, kinds, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    CODES[function.__name__] = compiled.asm


def main() -> None:
    """Compile the kernels and print what was counted in their code."""
    from triton.runtime.jit import JITFunction

    from megavlm.model.lora_dropout import Location, multiply_by_kernel
    from megavlm.model.triton_kernels import branch_kernels, nf4_kernel

    JITFunction.run = compile_for_hopper
    hidden = torch.zeros(1, 16, 1024, dtype=torch.bfloat16)
    row = hidden[0, 0]
    keep = torch.ones(16)
    # The last ones have everything, and are counted.
    for scale, factor in itertools.product((None, row), (None, keep)):
        branch_kernels.add(hidden, hidden, row, scale, factor)
        branch_kernels.add_backward(hidden, None, row, scale, factor)
    branch_kernels.add_backward(hidden, hidden, row, row, keep)
    codes = torch.zeros(3, 512, dtype=torch.uint8)
    pairs = torch.zeros(256, 2)
    nf4_kernel.dequantise(codes, pairs, torch.zeros(3, 16), 0, 1024, torch.bfloat16)
    multiply_by_kernel(hidden, -1, 2**28, 1.1, Location(draw=1))
    found = {
        name: {
            "reads": code["ptx"].count("ld.global.v4"),
            "writes": code["ptx"].count("st.global.v4"),
            # The only ones are of rows times width.
            "is_wide": "extsi" in code["ttir"],
        }
        for name, code in CODES.items()
    }
    json.dump(found, os.fdopen(int(sys.argv[1]), "w"))


if __name__ == "__main__":
    main()
