"""The likeliest token, over a vocabulary that tensor-parallel ranks share.

Shape letters: P positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def likeliest_tokens(logits: Tensor, real_rows: int, group: ProcessGroup) -> Tensor:
    """Return the token of the largest logit at each position, int64 [P]; of equal ones the first,
    whatever the number of ranks. Collective.

    Args:
        logits: this rank's share [P, padded V / ranks].
        real_rows: of the share; the others are the vocabulary's padding.
        group: the tensor-parallel ranks.
    """
    rows = logits.shape[-1]
    if real_rows:
        # Weights that are NaN give the first token, and no index outside the vocabulary.
        real = logits[:, :real_rows].float().nan_to_num(nan=float("-inf"))
        values = real.max(dim=-1).values
        # ``max`` and ``argmax`` may return any of equal ones.
        numbers = torch.arange(real_rows, device=logits.device)
        indices = torch.where(real == values[:, None], numbers, rows).min(dim=-1).values
    else:
        values = logits.new_full((len(logits),), float("-inf"), dtype=torch.float32)
        indices = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    tokens = indices + group.rank() * rows
    if group.size() == 1:
        return tokens
    all_values = values.new_empty(group.size() * len(values))
    all_tokens = tokens.new_empty(group.size() * len(tokens))
    dist.all_gather_into_tensor(all_values, values.contiguous(), group=group)
    dist.all_gather_into_tensor(all_tokens, tokens.contiguous(), group=group)
    all_values = all_values.view(group.size(), -1)
    all_tokens = all_tokens.view(group.size(), -1)
    is_largest = all_values == all_values.max(dim=0).values
    return torch.where(is_largest, all_tokens, rows * group.size()).min(dim=0).values
