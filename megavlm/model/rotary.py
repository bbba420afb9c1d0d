"""Rotation of queries and keys by places that a pack names: rows and columns of patches, and
frames, rows and columns of tokens (RoPE, Su et al., arXiv 2104.09864; M-RoPE, arXiv 2409.12191).

megatron-core rotates the tokens of a pack by their places in their samples. Here each token brings
angles of its own.

Shape letters: T tokens, d width of a head, H heads of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megavlm.model.named_after import named_after

# Of the rotations of patches, whatever the model.
_PATCH_BASE = 10000.0


def patch_angles(places: Tensor, size: int) -> Tensor:
    """Return the angles of patches: half of the rotations of a head by the row, half by the column.

    Args:
        places: int64 [2, T], row and column.
        size: d.

    Returns:
        float32 [T, 1, 1, d]
    """
    exponents = torch.arange(0, size // 2, 2, dtype=torch.float32, device=places.device)
    frequencies = _PATCH_BASE ** -(exponents / (size // 2))
    angles = places[..., None].float() * frequencies
    return _of_both_halves(torch.cat([angles[0], angles[1]], dim=-1))


def section_angles(
    places: Tensor, frequencies: Tensor, sections: Sequence[int], *, interleaved: bool = False
) -> Tensor:
    """Return the angles of tokens: each section of a head's rotations by a place of another kind.

    Args:
        places: int64 [3, T], frame, row and column.
        frequencies: float32 [d / 2], the angle from place to place of each rotation.
        sections: rotations by each kind of place, d / 2 together.
        interleaved: whether the kinds take turns, as long as there are rotations of each (Qwen3-VL,
            arXiv 2511.21631), instead of following each other; what is left is by the frame.

    Returns:
        float32 [T, 1, 1, d]
    """
    angles = places[..., None].float() * frequencies
    if interleaved:
        found = angles[0].clone()
        for kind in (1, 2):
            own = slice(kind, 3 * sections[kind], 3)
            found[:, own] = angles[kind][:, own]
        return _of_both_halves(found)
    own = [part[kind] for kind, part in enumerate(angles.split(list(sections), dim=-1))]
    return _of_both_halves(torch.cat(own, dim=-1))


def _of_both_halves(angles: Tensor) -> Tensor:
    # A rotation turns a number of the first half of a head with one of the second.
    return torch.cat([angles, angles], dim=-1)[:, None, None]


def turning(attention: type[SelfAttention]) -> type[SelfAttention]:
    """Let ``attention`` rotate queries and keys by the angles of each token."""

    @named_after(attention)
    class Turning(attention):
        """Attention that takes angles [T, 1, 1, d], one of each token of this rank."""

        angles: Tensor | None = None  # in the forward pass at hand

        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Tensor | None,
            *args: Any,
            rotary_pos_emb: Tensor,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None]:
            """Attend; layers of megatron-core call this."""
            self.angles = rotary_pos_emb
            found = super().forward(hidden_states, attention_mask, *args, **kwargs)
            self.angles = None
            return found

        def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            """Project to query, key and value, and rotate the first two, [T, 1, H, d];
            ``Attention.forward`` of megatron-core calls this.
            """
            query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
            return self._turned(query), self._turned(key), *rest

        def _turned(self, states: Tensor) -> Tensor:
            # Without the ends of samples, by which it would count places itself.
            return apply_rotary_pos_emb(
                states, self.angles, self.config, cp_group=self.pg_collection.cp
            )

    return Turning
