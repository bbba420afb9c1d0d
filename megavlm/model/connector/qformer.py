"""The Q-Former of BLIP-2 and InstructBLIP (arXiv 2301.12597, 2305.06500): learned queries read a
tile, and may read a text beside it.

It is a BERT: every norm stands behind a residual sum. megatron-core's layers have their norms in
front, so these are torch's, whole on every tensor-parallel rank; with ``--parallel.vision data``
each rank runs them on its own tiles. There is no dropout, unlike in the authors' code: a run does
not depend on random states.

Shape letters: I tiles, N tokens of a tile in the vision encoder, Q queries, L tokens of a text, R
rows (Q queries, if they are there, then L tokens), D hidden size, H heads.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from megavlm.config.qformer import QFormer
from megavlm.config.schema import Config
from megavlm.data.loading.batch import Instructions
from megavlm.model.connector.heads import attend, split_heads
from megavlm.model.connector.qformer_mask import TextRows, seen_by
from megavlm.model.kernels import Kernels
from megavlm.model.transformer import connector_config


class _Attention(nn.Module):
    """Attention of rows among themselves, or to the tokens of a tile, with its last projection.

    Args:
        settings: sizes.
        dtype: of the parameters.
        memory_size: width of what is attended to; 0: the rows themselves.
    """

    def __init__(self, settings: QFormer, dtype: torch.dtype, memory_size: int = 0):
        super().__init__()
        width = settings.hidden_size
        self.heads = settings.num_attention_heads
        if memory_size:
            self.query = nn.Linear(width, width, dtype=dtype)
            self.key_value = nn.Linear(memory_size, 2 * width, dtype=dtype)
        else:
            self.qkv = nn.Linear(width, 3 * width, dtype=dtype)
        self.proj = nn.Linear(width, width, dtype=dtype)

    def forward(
        self, rows: Tensor, memory: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """Attend from rows [I, R, D] to themselves, or to ``memory`` [I, N, its width]; ``seen``
        [I or 1, 1, R, R] says which pairs do, by default all.
        """
        if memory is None:
            parts = self.qkv(rows).chunk(3, dim=-1)
        else:
            parts = (self.query(rows), *self.key_value(memory).chunk(2, dim=-1))
        heads = (split_heads(part, self.heads) for part in parts)
        return self.proj(attend(*heads, seen=seen))


class _Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, settings: QFormer, dtype: torch.dtype):
        super().__init__()
        self.up = nn.Linear(settings.hidden_size, settings.ffn_hidden_size, dtype=dtype)
        self.down = nn.Linear(settings.ffn_hidden_size, settings.hidden_size, dtype=dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """[I, R, D] -> [I, R, D]"""
        return self.down(gelu(self.up(rows)))


def _norm(settings: QFormer, dtype: torch.dtype) -> nn.LayerNorm:
    return nn.LayerNorm(settings.hidden_size, eps=settings.layernorm_epsilon, dtype=dtype)


class QFormerLayer(nn.Module):
    """Self-attention of all rows; in some layers cross-attention of the queries to the tile; then
    an MLP, another one for queries than for text.

    Args:
        settings: sizes.
        layer: its number, from 0.
        memory_size: width of the tokens of a tile.
        dtype: of the parameters.
    """

    def __init__(self, settings: QFormer, layer: int, memory_size: int, dtype: torch.dtype):
        super().__init__()
        self.attention = _Attention(settings, dtype)
        self.attention_norm = _norm(settings, dtype)
        self.has_cross_attention = settings.has_cross_attention(layer)
        if self.has_cross_attention:
            self.cross_attention = _Attention(settings, dtype, memory_size)
            self.cross_attention_norm = _norm(settings, dtype)
        self.query_mlp = _Mlp(settings, dtype)
        self.query_mlp_norm = _norm(settings, dtype)
        if settings.text:
            self.text_mlp = _Mlp(settings, dtype)
            self.text_mlp_norm = _norm(settings, dtype)

    def forward(
        self, rows: Tensor, memory: Tensor | None, seen: Tensor | None, queries: int
    ) -> Tensor:
        """Run the layer.

        Args:
            rows: [I, R, D], the queries first.
            memory: tokens of the tiles [I, N, width]; none if there are no queries.
            seen: which row sees which, bool [I or 1, 1, R, R]; none: all see all.
            queries: how many of the rows are queries.

        Returns:
            [I, R, D]
        """
        rows = self.attention_norm(rows + self.attention(rows, seen=seen))
        if not queries:
            return self._read(rows)
        asking = rows[:, :queries]
        if self.has_cross_attention:
            asking = self.cross_attention_norm(asking + self.cross_attention(asking, memory))
        asking = self.query_mlp_norm(asking + self.query_mlp(asking))
        if queries == rows.shape[1]:
            return asking
        return torch.cat([asking, self._read(rows[:, queries:])], dim=1)

    def _read(self, text: Tensor) -> Tensor:
        return self.text_mlp_norm(text + self.text_mlp(text))


class QFormerConnector(MegatronModule):
    """The norm behind the vision encoder, the Q-Former, and a linear layer to the width of the
    language model.

    The norm belongs to the connector since it is trained while the encoder is frozen.

    Args:
        config: the run.
        kernels: of the layers.
        groups: process groups of the vision encoder.
    """

    def __init__(self, config: Config, kernels: Kernels, groups: ProcessGroupCollection):
        super().__init__(connector_config(config, kernels))
        architecture = config.architecture
        settings = architecture.connector.qformer
        vision = architecture.vision
        width = settings.hidden_size
        dtype = self.config.params_dtype
        self.norm = nn.LayerNorm(vision.hidden_size, eps=vision.layernorm_epsilon, dtype=dtype)
        self.instruction_tokens = settings.instruction_tokens
        self.queries = nn.Parameter(torch.zeros(settings.queries, width, dtype=dtype))
        if settings.text:
            self.token_embedding = nn.Embedding(settings.vocab_size, width, dtype=dtype)
            self.position_embedding = nn.Embedding(
                settings.max_position_embeddings, width, dtype=dtype
            )
        self.embedding_norm = _norm(settings, dtype)
        self.layers = nn.ModuleList(
            QFormerLayer(settings, layer, vision.hidden_size, dtype)
            for layer in range(settings.num_layers)
        )
        output_size = architecture.needs.connector_output(architecture)
        self.output = nn.Linear(width, output_size, dtype=dtype) if output_size else None

    def forward(
        self,
        hidden: Tensor,
        text: Tensor | None = None,
        seen: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        instructions: Instructions | None = None,
    ) -> Tensor:
        """Turn hidden states of tiles into features, or read texts beside the tiles.

        Args:
            hidden: of the vision encoder [N, I, D of vision], a class token first.
            text, seen, positions: as for ``read``.
            instructions: what is read beside the tiles, and changes their features.

        Returns:
            [I * Q, 1, D of language], tile by tile; without a last linear layer the hidden states
                of the queries. With texts the hidden states of all rows [I, R, D].
        """
        if text is not None:
            return self.read(self.memory(hidden), text, seen, positions)
        asked = self._asked(self.memory(hidden), instructions)
        features = asked if self.output is None else self.output(asked)
        return features.flatten(0, 1)[:, None]

    def _asked(self, memory: Tensor, instructions: Instructions | None) -> Tensor:
        """Run the queries [I, Q, D], beside instructions if there are any: all see each other.

        Nothing reads what the last layer makes of the instructions. It is computed all the same:
        its weights are part of the model in other programs, and DDP waits for their gradients.
        """
        if instructions is None:
            return self.read(memory)
        missing = self.instruction_tokens - instructions.tokens.shape[1]
        if missing < 0:
            raise ValueError(
                f"instructions of up to {instructions.tokens.shape[1]} tokens, but"
                " --architecture.connector.qformer.instruction_tokens is"
                f" {self.instruction_tokens}"
            )
        text = pad(instructions.tokens, (0, missing))
        real = torch.arange(text.shape[1], device=text.device) < instructions.lengths[:, None]
        queries = len(self.queries)
        seen = seen_by(queries, [TextRows(mode="bidirectional", real=real)])
        return self.read(memory, text, seen)[:, :queries]

    def memory(self, hidden: Tensor) -> Tensor:
        """Normalise what the queries read: [N, I, D of vision] -> [I, N, D of vision]."""
        return self.norm(hidden.transpose(0, 1))

    def read(
        self,
        memory: Tensor | None,
        text: Tensor | None = None,
        seen: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Run the Q-Former on the queries, on texts, or on both.

        Args:
            memory: tokens of the tiles [I, N, D of vision], from ``memory``; none: without queries.
            text: token ids [I, L]; none: without texts.
            seen: which row sees which, bool [I or 1, 1, R, R], see ``seen_by``; none: all see all.
            positions: of the tokens in their texts [I or 1, L]; none: counted from 0.

        Returns:
            [I, R, D], the queries first.
        """
        parts = []
        if memory is not None:
            parts.append(self.queries.expand(len(memory), -1, -1))
        if text is not None:
            if positions is None:
                positions = torch.arange(text.shape[1], device=text.device)
            parts.append(self.token_embedding(text) + self.position_embedding(positions))
        queries = 0 if memory is None else len(self.queries)
        rows = self.embedding_norm(torch.cat(parts, dim=1))
        for layer in self.layers:
            rows = layer(rows, memory, seen, queries)
        return rows
