"""Rows of all data-parallel ranks, with exact gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad


class _Gather(torch.autograd.Function):
    """Gather rows of all ranks of a group; a rank's gradient is the sum of what all ranks have for
    its rows.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty(len(rows) * group.size(), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty(len(gradient) // ctx.group.size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own, None


def gather_rows(rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Gather the rows of all ranks, with exact gradients. Collective.

    Args:
        rows: of this rank [n, ...].
        counts: rows of each rank, known to all without asking.
        group: the ranks.

    Returns:
        [N, ...], in the order of the ranks.
    """
    if group.size() == 1:
        return rows
    most = max(counts)
    # Collectives want equal shapes; the rows that fill up are left out again.
    filler = (0, 0) * (rows.ndim - 1) + (0, most - len(rows))
    gathered = _Gather.apply(pad(rows, filler), group)
    parts = gathered.unflatten(0, (group.size(), most))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
