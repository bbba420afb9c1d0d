"""Transformer Engine's layers, as packs of samples and sums of gradients in float32 need them: each
function takes a class of megatron-core's ``extensions.transformer_engine`` and returns one that
extends it.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
from collections.abc import Callable

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megavlm.model.attention import attend_with_prefixes
from megavlm.model.named_after import named_after


def split_without_copies() -> None:
    """Give megatron-core Transformer Engine's split of queries, keys and values, whose backward
    pass copies nothing if the gradients stand side by side.

    ``SelfAttention.get_query_key_value_tensors`` of megatron-core takes torch's otherwise: it looks
    for the name in a module that has lost it.
    """
    from megatron.core.transformer import attention

    with contextlib.suppress(ImportError):
        from transformer_engine.pytorch.utils import SplitAlongDim

        attention.SplitAlongDim = SplitAlongDim.apply


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One kernel for any number of tiles; compiled at the first call."""
    return torch.compile(function, dynamic=True)


def accumulating(linear: type) -> type:
    """Let ``linear`` of Transformer Engine add its weight gradient to the float32 sum inside the
    matrix product.

    megatron-core's own layers (embedding, head) can do so with Apex only, so the switch is set for
    each layer, not for the whole model. The constructors of megatron-core's ``TELinear`` and its
    like read it.
    """

    @named_after(linear)
    class Accumulating(linear):
        """A linear layer that adds to ``main_grad`` of its weight."""

        def __init__(self, *args, config, **kwargs):
            config = copy.copy(config)
            config.gradient_accumulation_fusion = True
            super().__init__(*args, config=config, **kwargs)

    return Accumulating


def without_draws(attention: type) -> type:
    """Keep ``attention`` of Transformer Engine from exchanging the random state around every call,
    which it does for its dropout. That is 0.

    The ``forward`` of each of its three kernels enters the context that is replaced here.
    """

    @named_after(attention)
    class WithoutDraws(attention):
        """Attention that leaves the random state alone."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for kernel in (self.flash_attention, self.fused_attention, self.unfused_attention):
                kernel.attention_dropout_ctx = contextlib.nullcontext

    return WithoutDraws


class _BottomRight(enum.Enum):
    """A mask that megatron-core has no name for; it hands the name on to Transformer Engine."""

    padding_causal_bottom_right = 1


def of_packs(attention: type) -> type:
    """Tell ``attention`` of Transformer Engine whether padding stands between samples, and attend
    twice if samples have prefixes.

    megatron-core's ``TEDotProductAttention.forward`` hands the named fields of the packed samples
    on; 0.16.1 does not name the one of the padding.
    """

    @named_after(attention)
    class OfPacks(attention):
        """Attention inside the samples of a pack."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.kept_packed_seq_params.add("pad_between_seqs")

        def forward(self, query, key, value, *args, packed_seq_params, **kwargs):
            """Attend; ``Attention.forward`` of megatron-core calls this."""
            call = super().forward
            if packed_seq_params.prefixes is None:
                samples = packed_seq_params
                return call(query, key, value, *args, packed_seq_params=samples, **kwargs)

            def attend(query, key, value, samples, is_causal):
                mask = _BottomRight.padding_causal_bottom_right
                mask = mask if is_causal else AttnMaskType.no_mask
                return call(query, key, value, None, mask, packed_seq_params=samples)

            return attend_with_prefixes(attend, query, key, value, packed_seq_params)

    return OfPacks
