"""The Perceiver resampler (Flamingo, arXiv 2204.14198, section 3.1.1): its settings, and how large
it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.config.connector_ends import PART, Ends
from megavlm.config.pieces import Piece, linear, norm, products, table


@dataclass(frozen=True, kw_only=True)
class Resampler:
    """Learned latents that read a tile by cross-attention, as IDEFICS has them (arXiv 2306.16527).

    Args:
        latents: learned latents, and so features of a tile.
        num_layers: layers, each of an attention and an MLP.
        num_attention_heads: attention heads.
        head_size: width of a head.
        ffn_hidden_size: width inside the MLPs; 0: four times the width of the vision encoder.
        qk_norm: whether the queries and keys of each head are normalised.
    """

    latents: int = 64
    num_layers: int = 6
    num_attention_heads: int = 16
    head_size: int = 96
    ffn_hidden_size: int = 0
    qk_norm: bool = True

    def inner_size(self, width: int) -> int:
        """Return the width inside the MLPs, behind a vision encoder of a width."""
        return self.ffn_hidden_size or 4 * width


@dataclass(frozen=True)
class ResamplerSizes:
    """Sizes of a resampler, see ``ConnectorSizes``.

    It is whole on every tensor-parallel rank, and has the width of the vision encoder. Its latents
    are what the cross-attention layers of the language model read; a model without such layers has
    them in the places of placeholder tokens, behind a linear layer.
    """

    settings: Resampler
    ends: Ends
    all_reduced_elements = 0

    @property
    def features(self) -> int:
        """See ``ConnectorSizes``."""
        return self.settings.latents

    @property
    def placeholders(self) -> int:
        """See ``ConnectorSizes``: one token marks where an image stands that is read elsewhere."""
        return 1 if self.ends.is_memory else self.settings.latents

    @property
    def feature_size(self) -> int:
        """See ``ConnectorSizes``."""
        return self.ends.input_size

    def problems(self) -> Iterator[str]:
        """See ``ConnectorSizes``."""
        flag = "--architecture.connector.resampler"
        values = vars(self.settings)
        for name in ("latents", "num_layers", "num_attention_heads", "head_size"):
            if values[name] < 1:
                yield f"{flag}.{name} {values[name]}: must be 1 or more"
        if values["ffn_hidden_size"] < 0:
            yield f"{flag}.ffn_hidden_size {values['ffn_hidden_size']}: must be 0 or more"

    def pieces(self) -> Iterator[Piece]:
        """See ``ConnectorSizes``."""
        width = self.ends.input_size
        yield table("connector.latents", PART, self.settings.latents, width)
        for layer in range(self.settings.num_layers):
            yield from self._layer(f"connector.layers.{layer}")
        yield from norm("connector.norm", PART, width, has_bias=True)
        if not self.ends.is_memory:
            size = self.ends.output_size
            yield from self._linear("connector.output", width, size, has_bias=True)

    def _layer(self, key: str) -> Iterator[Piece]:
        """Yield the pieces of one layer."""
        settings = self.settings
        width = self.ends.input_size
        heads = settings.num_attention_heads * settings.head_size
        latents = settings.latents
        seen = self.ends.tokens + latents
        yield from norm(f"{key}.tile_norm", PART, width, has_bias=True)
        yield from norm(f"{key}.latent_norm", PART, width, has_bias=True)
        yield from self._linear(f"{key}.query", width, heads)
        yield from self._linear(f"{key}.key_value", width, 2 * heads, rows=seen)
        for name in ("query_norm", "key_norm") if settings.qk_norm else ():
            yield from norm(f"{key}.{name}", PART, settings.head_size, has_bias=True)
        yield products(PART, 4 * latents * seen * heads, "tile")
        yield from self._linear(f"{key}.proj", heads, width)
        yield from norm(f"{key}.mlp_norm", PART, width, has_bias=True)
        yield from self._linear(f"{key}.up", width, settings.inner_size(width))
        yield from self._linear(f"{key}.down", settings.inner_size(width), width)

    def _linear(
        self, key: str, size: int, outputs: int, *, rows: int = 0, has_bias: bool = False
    ) -> Iterator[Piece]:
        """Yield a linear layer, by default on the latents of a tile."""
        rows = rows or self.settings.latents
        yield from linear(key, PART, size, outputs, rows=rows, unit="tile", has_bias=has_bias)

    def kept(self, tensor_size: int) -> float:
        """Count in every layer both inputs before and after their norms, queries, keys, values and
        result of the attention, and the MLP; and the last norm.
        """
        settings = self.settings
        width = self.ends.input_size
        heads = settings.num_attention_heads * settings.head_size
        norms = 2 if settings.qk_norm else 1
        of_latents = 5 * width + (2 * norms + 2) * heads + 2 * settings.inner_size(width)
        of_tokens = width + (norms + 1) * heads
        of_layer = settings.latents * of_latents + self.ends.tokens * of_tokens
        return settings.num_layers * of_layer + 2 * settings.latents * width
