"""A token embedding that is also the head, where both stand in different chunks: two copies of one
weight, on one rank or on two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from megavlm.model.vlm import VisionLanguageModel


def sum_tied_gradients(chunks: Sequence[VisionLanguageModel]) -> None:
    """Give both copies of a tied weight the sum of their gradients. Collective for the two ranks,
    where there are two.

    Each copy lies in a bucket of its own (``LanguageModel.setup_embeddings_and_output_layer``), so
    that it is shared out over the data-parallel ranks like the other one, and this may follow the
    sum over those ranks.

    Args:
        chunks: those of this rank.
    """
    weights = [chunk.tied_weight for chunk in chunks]
    gradients = [
        weight.main_grad for weight in weights if weight is not None and weight.requires_grad
    ]
    if not gradients:
        return
    first, *others = gradients
    for other in others:
        first.add_(other)
    group = chunks[0].groups.collection.embd
    if dist.get_world_size(group) > 1:
        dist.all_reduce(first, group=group)
    for other in others:
        other.copy_(first)
