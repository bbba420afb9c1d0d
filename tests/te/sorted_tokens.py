"""Sorts tokens by expert in Transformer Engine's Triton kernels, in Triton's interpreter on a CPU,
and in megatron-core's torch operations, and prints how far results and gradients are from each
other, as JSON. ``test_sorted_tokens`` starts it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

from tests.te.branches import let_numpy_count

# Tokens, width, experts, experts of a token, share of tokens that go nowhere.
CASES = {
    "all tokens": (37, 24, 5, 2, 0.0),
    "padding": (41, 40, 6, 3, 0.4),
    "an expert a token": (19, 16, 4, 1, 0.2),
    "every expert": (7, 32, 3, 3, 0.0),
    "nothing but padding": (9, 16, 4, 2, 1.0),
}
NEEDS = ("both", "weights", "tokens")
"""What needs a gradient."""


def on_cpu() -> None:
    """Let Transformer Engine's Python make tensors on the CPU, and try no sizes of blocks."""
    import transformer_engine.pytorch.triton.permutation as kernels

    from megavlm.parallel.cpu_backend import TorchOnCpu

    kernels.torch = TorchOnCpu(["empty"])
    for name in ("_permute_kernel", "_unpermute_kernel", "_sort_chunks_by_map_kernel"):
        kernel = vars(kernels)[name]
        kernel.configs = kernel.configs[:1]
    let_numpy_count()


def route(case: tuple[int, int, int, int, float], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens [T, D], where they go [T, E], and weights [T, E]."""
    (count, width, experts, each, share) = case
    draws = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, experts, generator=draws).topk(each, -1).indices
    routed = torch.zeros(count, experts, dtype=torch.bool).scatter_(1, chosen, True)
    routed &= (torch.rand(count, generator=draws) >= share)[:, None]
    tokens = torch.randn(count, width, generator=draws)
    return tokens, routed, torch.rand(count, experts, generator=draws) * routed


def there_and_back(
    case: tuple[int, int, int, int, float], need: str, device: str, fused: bool
) -> list[Tensor]:
    """Sort, change and return tokens; then the gradients of tokens and weights, as far as they are
    needed.
    """
    from megatron.core.transformer.moe import token_dispatcher

    (tokens, routed, weights) = (one.to(device) for one in route(case, 1))
    tokens.requires_grad_(need in ("both", "tokens"))
    weights.requires_grad_(need in ("both", "weights"))
    sizes = routed.sum(0)
    back = torch.arange(len(sizes), device=device).flip(0)
    (copies, own, places, *_) = token_dispatcher.permute(
        tokens,
        routed,
        probs=weights,
        num_out_tokens=routed.sum(),
        fused=fused,
        drop_and_pad=False,
    )
    turned, own = token_dispatcher.sort_chunks_by_idxs(copies, sizes, back, probs=own, fused=fused)
    changed = turned.square() * own[:, None]
    sizes = sizes.flip(0)
    changed, _ = token_dispatcher.sort_chunks_by_idxs(changed, sizes, back, fused=fused)
    made = token_dispatcher.unpermute(
        changed,
        places,
        restore_shape=tokens.shape,
        routing_map=routed,
        fused=fused,
        drop_and_pad=False,
    )
    made.square().sum().backward()
    wanted = [one for one in (tokens, weights) if one.requires_grad]
    return [made.detach(), *(one.grad for one in wanted)]


def distances(
    case: tuple[int, int, int, int, float], need: str, device: str = "cpu"
) -> list[float]:
    """Return how far the results and gradients of both ways are from each other; infinitely where
    one is missing.
    """
    pairs = zip(
        *(there_and_back(case, need, device, fused) for fused in (True, False)), strict=True
    )
    return [
        float("inf") if one is None or two is None else float((one - two).abs().max())
        for one, two in pairs
    ]


def main() -> None:
    """Compare every case and print what was found."""
    import megatron.core.extensions.transformer_engine  # noqa: F401  before its functions are looked for

    from megavlm.model.token_sorting import sort_by_kernels

    on_cpu()
    sort_by_kernels()
    found: dict[str, Any] = {
        f"{name}, {need}": distances(case, need) for name, case in CASES.items() for need in NEEDS
    }
    json.dump(found, os.fdopen(int(sys.argv[1]), "w"))


if __name__ == "__main__":
    main()
