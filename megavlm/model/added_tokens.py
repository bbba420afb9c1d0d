"""Rows of embedding and head for added tokens: parameters of their own, beside tables that may be
frozen (IDEFICS's decoupled embedding and head).

They are modules with a forward pass of their own, since DDP gathers a module's parameters before
that. Shape letters: T tokens, K added tokens, P positions with a loss, D hidden size, V padded
vocabulary.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import linear


class AddedEmbedding(MegatronModule):
    """Embeddings of the added tokens, whole on every tensor-parallel rank.

    Args:
        config: megatron-core's configuration of the language model.
        count: added tokens K.
        first: id of the first of them.
    """

    def __init__(self, config: TransformerConfig, count: int, first: int):
        super().__init__(config)
        self.first = first
        shape = (count, config.hidden_size)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))

    def forward(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """Replace the embeddings of added tokens.

        Args:
            tokens: int64 [T].
            embeddings: of the table [T, 1, D].

        Returns:
            [T, 1, D]
        """
        rows = self.weight.index_select(0, (tokens - self.first).clamp(min=0))
        is_added = (tokens >= self.first)[:, None, None]
        return torch.where(is_added, rows[:, None], embeddings)


class AddedHead(MegatronModule):
    """Rows of the head for the added tokens, whole on every tensor-parallel rank.

    Args:
        config, count, first: as of ``AddedEmbedding``.
        group: tensor-parallel ranks, which share the columns of the logits.
    """

    def __init__(self, config: TransformerConfig, count: int, first: int, group: ProcessGroup):
        super().__init__(config)
        self.first = first
        self.group = group
        shape = (count, config.hidden_size)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))

    def forward(self, hidden: Tensor, logits: Tensor, sums_gradient: bool) -> Tensor:
        """Replace the logits of added tokens, in place.

        Args:
            hidden: hidden states [P, 1, D].
            logits: this rank's share [P, 1, V / tensor-parallel ranks].
            sums_gradient: whether the gradient of the hidden states is summed over the ranks here;
                otherwise what made them does.

        Returns:
            [P, 1, V / tensor-parallel ranks]
        """
        columns = logits.shape[-1]
        first = self.first - columns * self.group.rank()
        start = min(max(first, 0), columns)
        stop = max(min(first + len(self.weight), columns), start)
        # Each rank knows the gradient from its own columns; the sum is the same on all.
        rows = copy_to_tensor_model_parallel_region(self.weight, self.group)
        rows = rows[start - first : stop - first] if stop > start else rows[:0]
        if sums_gradient:
            hidden = copy_to_tensor_model_parallel_region(hidden, self.group)
        # In place: of all numbers of a step, logits are the most. A rank without a column of these
        # tokens writes nothing, and still takes part in the sum of the gradients.
        logits[..., start:stop] = linear(hidden, rows)
        return logits
