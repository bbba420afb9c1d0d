"""Frozen weights in 4 bits (NF4: Dettmers et al., QLoRA, arXiv 2305.14314), which are dequantised
where they are multiplied with.

A block is 64 neighbours in a row of the whole weight, and its scale a float32 number, so every
layout has the same values: ranks that share a row agree on the scales of its blocks. For rows of a
multiple of 64 numbers the values are those of bitsandbytes without nested scales.

Shape letters: R rows, C columns on this rank, B blocks that these are in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from megavlm.config.lora import NF4_BLOCK

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""What a code of 4 bits means, as a share of the largest number of its block."""


class Nf4Weight(nn.Module):
    """The weight of a linear layer in 4 bits.

    Args:
        weight: this rank's share [R, C].
        first: number of its first column in the whole weight.
        group: ranks that share rows; none: rows are whole.
        device: where scales are compared with those of other ranks.
    """

    def __init__(
        self,
        weight: Tensor,
        first: int = 0,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.shape = weight.shape
        self.dtype = weight.dtype
        self.left = first % NF4_BLOCK
        blocks = _blocks(self.left + weight.shape[1])
        right = blocks * NF4_BLOCK - self.left - weight.shape[1]
        padded = pad(weight.float(), (self.left, right)).view(len(weight), blocks, NF4_BLOCK)
        scales = padded.abs().amax(dim=-1)
        if group is not None and group.size() > 1:
            start = first // NF4_BLOCK
            every = scales.new_zeros(len(weight), _blocks(weight.shape[1] * group.size()))
            every[:, start : start + blocks] = scales
            every = every.to(device)
            dist.all_reduce(every, op=dist.ReduceOp.MAX, group=group)
            scales = every[:, start : start + blocks].to(weight.device).contiguous()
        levels = torch.tensor(LEVELS, device=weight.device)
        shares = padded / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
        codes = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        codes = codes.flatten(1)
        byte = torch.arange(256, device=weight.device)
        self.register_buffer("codes", codes[:, 0::2] * 16 + codes[:, 1::2], persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        pairs = torch.stack([levels[byte // 16], levels[byte % 16]], dim=1)
        self.register_buffer("pairs", pairs, persistent=False)

    def whole(self) -> Tensor:
        """Return the weight [R, C] in its own dtype."""
        function = _dequantise_by_kernel if self.codes.is_cuda else dequantise
        given = (self.codes, self.pairs, self.scales)
        return function(*given, self.left, self.shape[1], self.dtype)


def dequantise(
    codes: Tensor, pairs: Tensor, scales: Tensor, left: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """See ``nf4_kernel.dequantise``."""
    rows = len(codes)
    shares = pairs.index_select(0, codes.flatten().int())
    values = shares.view(rows, -1, NF4_BLOCK) * scales.unsqueeze(-1)
    return values.view(rows, -1)[:, left : left + columns].to(dtype).contiguous()


def _dequantise_by_kernel(*given: Any) -> Tensor:
    from megavlm.model.triton_kernels import nf4_kernel

    return nf4_kernel.dequantise(*given)


def _blocks(columns: int) -> int:
    return (columns + NF4_BLOCK - 1) // NF4_BLOCK


def rounded(weight: Tensor) -> Tensor:
    """Return a whole weight as it is after it was in 4 bits."""
    return Nf4Weight(weight).whole()
