"""Context parallelism for layers that need all tokens of a sample: gathering them from the
context-parallel ranks.

Shapes: t tokens of a rank, T tokens of the pack.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megavlm.data.loading.rank_slice import RankSlice


def ends_of(lengths: Sequence[int]) -> np.ndarray:
    """Return where samples of these lengths start and end in a pack; see ``RankSlice.tokens``."""
    return np.cumsum([0, *lengths], dtype=np.int32)


def own_positions(ends: np.ndarray, group: ProcessGroup) -> Tensor:
    """Return the positions in the pack of this rank's tokens, in this rank's order; int64 [t].
    ``ends`` is as for ``RankSlice.tokens``.
    """
    return torch.from_numpy(
        RankSlice(context_rank=group.rank(), context_ranks=group.size()).tokens(ends)
    )


def gather_tokens(own: Tensor, ends: np.ndarray, group: ProcessGroup) -> Tensor:
    """Gather the values of all tokens of a pack.

    Args:
        own: values of this rank's tokens [t, ...].
        ends: where samples end, as for ``RankSlice.tokens``.
        group: the context-parallel ranks.

    Returns:
        [T, ...], in the order of the pack. In the backward pass the gradients of all ranks are
            summed.
    """
    shares = [
        RankSlice(context_rank=rank, context_ranks=group.size()).tokens(ends)
        for rank in range(group.size())
    ]
    order = torch.from_numpy(np.argsort(np.concatenate(shares)))
    gathered = gather_from_sequence_parallel_region(
        own, tensor_parallel_output_grad=True, group=group
    )
    return gathered[order.to(own.device, non_blocking=True)]
