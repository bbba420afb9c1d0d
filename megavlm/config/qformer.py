"""The Q-Former (BLIP-2, arXiv 2301.12597, section 3.1): its settings, and how large it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.config.connector_ends import PART, Ends
from megavlm.config.pieces import Piece, linear, norm, products, table


@dataclass(frozen=True, kw_only=True)
class QFormer:
    """A BERT whose learned queries read a tile by cross-attention.

    Args:
        queries: learned queries, and so features of a tile.
        num_layers: transformer layers.
        hidden_size: width of the layers.
        ffn_hidden_size: width inside the MLPs of a layer.
        num_attention_heads: attention heads.
        cross_attention_frequency: of every so many layers, the first lets the queries attend to the
            tile.
        layernorm_epsilon: added to the variance inside the norms, that of the tile's tokens
            excepted, which has the vision encoder's.
        text: whether it also reads texts, with embeddings and MLPs of their own.
        instruction_tokens: longest instruction that it reads beside a tile, as InstructBLIP's does;
            shorter ones are filled up to as many; 0: it reads none. Packs must have been made with
            at most this --instruction_length.
        vocab_size: rows of the embedding of its texts.
        max_position_embeddings: longest text that it can read.
    """

    queries: int = 32
    num_layers: int = 12
    hidden_size: int = 768
    ffn_hidden_size: int = 3072
    num_attention_heads: int = 12
    cross_attention_frequency: int = 2
    layernorm_epsilon: float = 1e-12
    text: bool = False
    instruction_tokens: int = 0
    vocab_size: int = 30523
    max_position_embeddings: int = 512

    def has_cross_attention(self, layer: int) -> bool:
        """Whether the queries attend to the tile in a layer, counted from 0."""
        return layer % self.cross_attention_frequency == 0


@dataclass(frozen=True)
class QFormerSizes:
    """Sizes of a Q-Former between a vision encoder and a language model, see ``ConnectorSizes``.

    It is whole on every tensor-parallel rank. FLOPs are those of the queries, and of an instruction
    beside them; what another text costs depends on what is done with it, so an objective counts
    that.
    """

    settings: QFormer
    ends: Ends
    all_reduced_elements = 0

    @property
    def features(self) -> int:
        """See ``ConnectorSizes``."""
        return self.settings.queries

    placeholders = features

    @property
    def feature_size(self) -> int:
        """See ``ConnectorSizes``."""
        return self.settings.hidden_size

    def problems(self) -> Iterator[str]:
        """See ``ConnectorSizes``."""
        flag = "--architecture.connector.qformer"
        names = (
            "queries",
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "cross_attention_frequency",
            "vocab_size",
            "max_position_embeddings",
        )
        small = [name for name in names if vars(self.settings)[name] < 1]
        for name in small:
            yield f"{flag}.{name} {vars(self.settings)[name]}: must be 1 or more"
        if not self.settings.layernorm_epsilon >= 0:
            yield (f"{flag}.layernorm_epsilon {self.settings.layernorm_epsilon}: must be 0 or more")
        asked = self.settings.instruction_tokens
        if asked < 0:
            yield f"{flag}.instruction_tokens {asked}: must be 0 or more"
        if asked and not self.settings.text:
            yield (
                f"{flag}.instruction_tokens {asked}: only a Q-Former that reads texts reads"
                f" instructions; use {flag}.text true, or 0"
            )
        if asked > self.settings.max_position_embeddings:
            yield (
                f"{flag}.instruction_tokens {asked}: it reads texts of at most"
                f" {flag}.max_position_embeddings {self.settings.max_position_embeddings} tokens"
            )
        if not small and self.settings.hidden_size % self.settings.num_attention_heads:
            yield (
                f"{flag}.num_attention_heads {self.settings.num_attention_heads} does not divide"
                f" {flag}.hidden_size {self.settings.hidden_size}"
            )

    def pieces(self) -> Iterator[Piece]:
        """See ``ConnectorSizes``."""
        settings = self.settings
        width = settings.hidden_size
        yield from norm("connector.norm", PART, self.ends.input_size, has_bias=True)
        yield table("connector.queries", PART, settings.queries, width)
        if settings.text:
            rows = {"token": settings.vocab_size, "position": settings.max_position_embeddings}
            for name, count in rows.items():
                yield table(f"connector.{name}_embedding.weight", PART, count, width)
        yield from norm("connector.embedding_norm", PART, width, has_bias=True)
        for layer in range(settings.num_layers):
            yield from self._layer(layer)
        if self.ends.output_size:
            yield from self._linear("connector.output", width, self.ends.output_size)

    def _layer(self, number: int) -> Iterator[Piece]:
        """Yield the pieces of one layer."""
        key = f"connector.layers.{number}"
        width = self.settings.hidden_size
        inner = self.settings.ffn_hidden_size
        queries = self.settings.queries
        texts = self.settings.instruction_tokens
        rows = queries + texts
        tokens = self.ends.tokens
        yield from self._linear(f"{key}.attention.qkv", width, 3 * width, rows=rows)
        yield products(PART, 4 * rows * rows * width, "tile")
        yield from self._linear(f"{key}.attention.proj", width, width, rows=rows)
        yield from norm(f"{key}.attention_norm", PART, width, has_bias=True)
        if self.settings.has_cross_attention(number):
            cross = f"{key}.cross_attention"
            yield from self._linear(f"{cross}.query", width, width)
            both = (self.ends.input_size, 2 * width)
            yield from self._linear(f"{cross}.key_value", *both, rows=tokens)
            yield products(PART, 4 * queries * tokens * width, "tile")
            yield from self._linear(f"{cross}.proj", width, width)
            yield from norm(f"{key}.cross_attention_norm", PART, width, has_bias=True)
        for name in ("query", "text") if self.settings.text else ("query",):
            rows = queries if name == "query" else texts
            yield from self._linear(f"{key}.{name}_mlp.up", width, inner, rows=rows)
            yield from self._linear(f"{key}.{name}_mlp.down", inner, width, rows=rows)
            yield from norm(f"{key}.{name}_mlp_norm", PART, width, has_bias=True)

    def _linear(
        self, key: str, size: int, outputs: int, rows: int | None = None
    ) -> Iterator[Piece]:
        """Yield a linear layer, by default on the queries of a tile."""
        rows = self.settings.queries if rows is None else rows
        yield from linear(key, PART, size, outputs, rows=rows, unit="tile", has_bias=True)

    def kept(self, tensor_size: int) -> float:
        """Count the tile's tokens before and after their norm; and of every layer the inputs of its
        linear layers and norms, queries, keys and values, and the MLP before and after GELU.
        """
        settings = self.settings
        width = settings.hidden_size
        crossed = sum(map(settings.has_cross_attention, range(settings.num_layers)))
        of_queries = settings.num_layers * (8 * width + 2 * settings.ffn_hidden_size)
        of_queries += crossed * 4 * width
        of_texts = settings.num_layers * (8 * width + 2 * settings.ffn_hidden_size)
        of_tokens = 2 * self.ends.input_size + crossed * 2 * width
        return (
            settings.queries * of_queries
            + settings.instruction_tokens * of_texts
            + self.ends.tokens * of_tokens
        )
