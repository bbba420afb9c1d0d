"""YaRN (Peng et al., arXiv 2309.00071): rotary positions for samples that are longer than those a
model was trained on first.

megatron-core's own class for it makes tables when it is built, which fails with context parallelism
on a CPU, and its factor of queries and keys is one that fused kernels do not know.
"""

from __future__ import annotations

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from megavlm.config.schema import Language

# Rotations over the longest first sample from which on a frequency stays, and up to which it is
# divided by the whole factor.
_FAST = 32
_SLOW = 1


def frequencies(language: Language) -> Tensor:
    """Return the angle that each pair of numbers of a head turns by from token to token; float32
    [head size / 2].

    Fast ones are as without YaRN, slow ones are divided by its factor, and between them a ramp
    mixes both (section 3.2).
    """
    size = language.head_size
    base = language.rotary_base
    plain = base ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    begin, end = (
        size * log(language.rotary_yarn_positions / (rotations * 2 * pi)) / (2 * log(base))
        for rotations in (_FAST, _SLOW)
    )
    if language.rotary_yarn_truncate:
        begin = floor(begin)
        end = ceil(end)
    begin = max(begin, 0)
    end = min(end, size - 1)
    width = end - begin if end != begin else 0.001
    share = ((torch.arange(size // 2, dtype=torch.float32) - begin) / width).clamp(0, 1)
    return plain / language.rotary_yarn_factor * share + plain * (1 - share)


def product_scale(language: Language) -> float | None:
    """Return the factor of the products of queries and keys: with YaRN, each is multiplied by 0.1
    log(factor) + 1 beside 1 / sqrt(head size) (section 3.4); none: 1 / sqrt(head size) it is.
    """
    if language.rotary_yarn_factor == 1 and not language.query_pre_attn_scalar:
        return None
    growth = 0.1 * log(language.rotary_yarn_factor) + 1
    return growth**2 * (language.query_pre_attn_scalar or language.head_size) ** -0.5
