"""Runs experts under the FP8 recipes on a CUDA device that is not there, forward and backward, with
numbers of tokens that FP8 does not multiply, and prints what the grouped products got, as JSON.

``test_fake_experts`` starts it, in a process of its own: it changes torch for good.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from megavlm.config.schema import Fp8
from tests.te.fake_step import prepare

TOKENS = (0, 5, 33, 16)
"""Of the experts of a layer."""
BIASES = " with biases"
SETTINGS = {
    "16 bits": Fp8(),
    "tensorwise": Fp8(language="tensorwise"),
    "blockwise": Fp8(language="blockwise"),
    "mxfp8": Fp8(language="mxfp8"),
    "a layer in 16 bits": Fp8(language="tensorwise", first_bf16_layers=1),
    f"16 bits{BIASES}": Fp8(),
    f"tensorwise{BIASES}": Fp8(language="tensorwise"),
    f"blockwise{BIASES}": Fp8(language="blockwise"),
    f"mxfp8{BIASES}": Fp8(language="mxfp8"),
}


class GroupedProducts:
    """Stand for the grouped products, and keep the sizes of their operands.

    Attributes:
        found: of each product: whether its operands are in 8 bits, rows of each expert.
    """

    def __init__(self) -> None:
        self.found: list[tuple[bool, list[int]]] = []

    def __call__(self, a: list, transpose_a: bool, b: list, transpose_b: bool, *rest: Any) -> Any:
        """Stand for ``tex.te_general_grouped_gemm``; rows of ``b`` are tokens."""
        from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage

        from tests.te.shape_kernels import _sides

        for left, right in zip(b, a, strict=True):
            first = _sides(left)
            second = _sides(right)
            if first[0 if transpose_b else 1] != second[1 if transpose_a else 0]:
                raise RuntimeError(f"mismatch: a grouped product of {first} and {second}")
        self.found.append((isinstance(b[0], QuantizedTensorStorage), [_sides(one)[0] for one in b]))
        return rest[3]


def split_quantize(tensor: Any, sizes: list[int], quantizers: list) -> list:
    """Stand for ``tex.split_quantize``."""
    from tests.te.shape_kernels import quantize

    return [
        quantize(rows, quantizer)
        for rows, quantizer in zip(tensor.split(sizes), quantizers, strict=True)
    ]


def run(fp8: Fp8, has_biases: bool, products: GroupedProducts) -> dict[str, Any]:
    """Run the experts of the first layer on sorted tokens, as the dispatcher gives them; those with
    biases have GPT-OSS's gate too.
    """
    import torch
    from megatron.core.fp8_utils import get_fp8_context

    from megavlm.model.vlm import VisionLanguageModel
    from megavlm.parallel import process_groups
    from megavlm.planner.layout import make_layout
    from tests.gpu.models import small
    from tests.te.build import mixture

    config = small(Path("unused"), kernels="transformer_engine", fp8=fp8)
    model = mixture(config.architecture)
    sizes = dict(num_experts=len(TOKENS), expert_ffn_hidden_size=96)
    if has_biases:
        sizes |= dict(linear_bias=True, activation="clamped_quick_geglu")
    model = dataclasses.replace(model, language=dataclasses.replace(model.language, **sizes))
    config = dataclasses.replace(config, architecture=model)
    groups = process_groups.create(config.parallel, 0)
    try:
        chunk = VisionLanguageModel(config, make_layout(config), groups)
        layer = chunk.language.decoder.layers[0]
        options = dict(device="cuda", dtype=torch.bfloat16)
        width = model.language.hidden_size
        hidden = torch.zeros(sum(TOKENS), width, requires_grad=True, **options)
        weights = torch.zeros(sum(TOKENS), device="cuda", requires_grad=True)
        for parameter in layer.mlp.experts.parameters():
            parameter.main_grad = torch.zeros(parameter.shape, device="cuda")
            parameter.grad_added_to_main_grad = False
        products.found.clear()
        with get_fp8_context(layer.config, 0):
            output, _ = layer.mlp.experts(hidden, _Counts(), weights)
            output.sum().backward()
    finally:
        process_groups.destroy()
    biases = [one for name, one in layer.mlp.experts.named_parameters() if ".bias" in name]
    return {
        "shapes": [list(one.shape) for one in (output, hidden.grad, weights.grad)],
        "biases": [None if one.grad is None else list(one.grad.shape) for one in biases],
        "products": products.found[:],
    }


class _Counts:
    """The numbers of tokens, which the dispatcher has on the host."""

    def tolist(self) -> list[int]:
        """Return them."""
        return list(TOKENS)


def install(products: GroupedProducts) -> None:
    """Replace the compiled functions of experts for the whole process."""
    import transformer_engine_torch as tex

    tex.te_general_grouped_gemm = products
    tex.split_quantize = split_quantize
    # They write into a tensor that the caller has made.
    tex.fused_multi_row_padding = tex.fused_multi_row_unpadding = lambda *given: None


def main() -> None:
    """Run every setting and print what was found."""
    waits = prepare()
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformer_engine.pytorch import quantization

    products = GroupedProducts()
    install(products)
    # Hopper has no MXFP8.
    quantization.check_recipe_support = lambda recipe: None
    quantization.FP8GlobalStateManager.is_mxfp8_available = lambda: (True, "")
    found = {}
    for name, fp8 in SETTINGS.items():
        with FakeTensorMode(allow_non_fake_inputs=True), waits:
            found[name] = run(fp8, name.endswith(BIASES), products)
    json.dump(found, os.fdopen(int(sys.argv[1]), "w"))


if __name__ == "__main__":
    main()
