"""Connectors: what stands between vision encoder and language model, and how large it is.

A connector is known in three places, by the same name: its sizes here, its module in
``megavlm/model/connector``, and its weights' names in Hugging Face's files in
``megavlm/convert/weights/connectors.py``. ``megavlm.model.connector.register`` fills the first two.
The planner, the checks and the packer read only what stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from megavlm.config.connector_ends import PART, Ends
from megavlm.config.merger import MergerSizes
from megavlm.config.pieces import Piece, linear, norm, products, vector
from megavlm.config.qformer import QFormer, QFormerSizes
from megavlm.config.resampler import Resampler, ResamplerSizes


@dataclass(frozen=True, kw_only=True)
class Connector:
    """The connector, from features of the vision encoder to embeddings of the language model.

    Args:
        kind: connector type; mlp is InternVL's and LLaVA 1.5's, linear the one matrix of LLaVA
            1.0, PaliGemma and Fuyu, merger that of Qwen2-VL, qformer the Q-Former of BLIP-2,
            resampler the Perceiver resampler of Flamingo. class_token, mean, attention and
            mean_query make one embedding of a tile, for the objective contrastive: of its class
            token (CLIP), of the mean of its patches, of what a learned query sees (SigLIP), or of
            what the mean of all tokens sees (InternVL-C).
        pixel_shuffle: for mlp: merge squares of this many patches a side into one feature (2: a
            quarter of the tokens; 1, as in LLaVA: none).
        heads: for mean_query: attention heads.
        norm: for mlp: LayerNorm before the linear layers, as in InternVL; LLaVA has none.
        bias: for mlp and linear: whether the linear layers have biases.
        newline: for mlp and linear: whether a learned embedding ends each row of an image's
            features, as in LLaVA-NeXT; for packs of ``--tiling anyres``.
        qformer: for qformer: its sizes.
        resampler: for resampler: its sizes.
    """

    kind: str = "mlp"
    pixel_shuffle: int = 2
    norm: bool = True
    bias: bool = True
    newline: bool = False
    heads: int = 16
    qformer: QFormer = field(default_factory=QFormer)
    resampler: Resampler = field(default_factory=Resampler)

    @property
    def instruction_tokens(self) -> int:
        """Tokens of an instruction that it reads beside a tile; 0: it reads none."""
        return self.qformer.instruction_tokens if self.kind == "qformer" else 0


LLAVA = Connector(pixel_shuffle=1, norm=False)
WITH_NEWLINES = ("mlp", "linear")
"""Kinds that can have ``newline``."""


def _newline(settings: Connector, width: int) -> Iterator[Piece]:
    """Yield the embedding of the end of a row, if there is one."""
    if settings.newline:
        yield vector("connector.newline", PART, width)


class ConnectorSizes(Protocol):
    """How large a connector is: a row of ``CONNECTORS`` makes one of its settings and its ends."""

    @property
    def placeholders(self) -> int:
        """Placeholder tokens that a tile has in the text."""

    @property
    def features(self) -> int:
        """Features that the connector gives for a tile."""

    @property
    def feature_size(self) -> int:
        """Width of what its first matrix reads; fresh matrices are drawn for it."""

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the settings, each naming the flag to change."""

    def pieces(self) -> Iterator[Piece]:
        """Yield every weight, in the order of the forward pass. Names that end in ``linear_fc1``
        or ``linear_fc2`` are sharded over the tensor-parallel ranks.
        """

    def kept(self, tensor_size: int) -> float:
        """Return the elements that the forward pass keeps for the backward pass, for each tile.

        Args:
            tensor_size: ranks that share the connector's matrices.
        """

    @property
    def all_reduced_elements(self) -> int:
        """Elements of a tile that the forward pass all-reduces over the tensor-parallel ranks."""


@dataclass(frozen=True)
class Mlp:
    """Pixel shuffle, LayerNorm, linear, GELU, linear: the ``mlp1`` of InternVL. Without norm and
    shuffle it is LLaVA's.
    """

    settings: Connector
    ends: Ends

    @property
    def features(self) -> int:
        """See ``ConnectorSizes``."""
        return (self.ends.grid // self.settings.pixel_shuffle) ** 2

    placeholders = features

    @property
    def feature_size(self) -> int:
        """See ``ConnectorSizes``."""
        return self.ends.input_size * self.settings.pixel_shuffle**2

    def problems(self) -> Iterator[str]:
        """See ``ConnectorSizes``."""
        factor = self.settings.pixel_shuffle
        flag = f"--architecture.connector.pixel_shuffle {factor}"
        if factor < 1:
            yield f"{flag}: must be 1 or more"
        elif self.ends.grid % factor:
            yield f"{flag} does not divide the {self.ends.grid} patches along a tile's side"

    def pieces(self) -> Iterator[Piece]:
        """See ``ConnectorSizes``."""
        inputs = self.feature_size
        width = self.ends.output_size
        rows = self.features
        if self.settings.norm:
            yield from norm("connector.norm", PART, inputs, has_bias=True)
        for name, size in (("linear_fc1", inputs), ("linear_fc2", width)):
            key = f"connector.mlp.{name}"
            has_bias = self.settings.bias
            yield from linear(key, PART, size, width, rows=rows, unit="tile", has_bias=has_bias)
        yield from _newline(self.settings, width)

    def kept(self, tensor_size: int) -> float:
        """Count inputs and results of the norm, and what goes into GELU and comes out of it."""
        return self.features * 2 * (self.feature_size + self.ends.output_size / tensor_size)

    @property
    def all_reduced_elements(self) -> int:
        """See ``ConnectorSizes``."""
        return self.features * self.ends.output_size


@dataclass(frozen=True)
class Linear:
    """One linear layer on each patch, whole on every rank: LLaVA 1.0's (arXiv 2304.08485), and
    Fuyu's, on the pixels of a patch.
    """

    settings: Connector
    ends: Ends
    all_reduced_elements = 0

    @property
    def features(self) -> int:
        """See ``ConnectorSizes``."""
        return self.ends.grid**2

    placeholders = features

    @property
    def feature_size(self) -> int:
        """See ``ConnectorSizes``."""
        return self.ends.input_size

    def problems(self) -> Iterator[str]:
        """See ``ConnectorSizes``."""
        yield from ()

    def pieces(self) -> Iterator[Piece]:
        """See ``ConnectorSizes``."""
        sizes = dict(rows=self.features, unit="tile", has_bias=self.settings.bias)
        ends = self.ends
        yield from linear("connector.linear", PART, ends.input_size, ends.output_size, **sizes)
        yield from _newline(self.settings, ends.output_size)

    def kept(self, tensor_size: int) -> float:
        """Count what goes into the layer."""
        return self.features * self.ends.input_size


@dataclass(frozen=True)
class Pool:
    """Norm, a choice among the tokens of a tile, and a projection without bias."""

    settings: Connector
    ends: Ends

    features = 1
    placeholders = 0

    @property
    def feature_size(self) -> int:
        """See ``ConnectorSizes``."""
        return self.ends.input_size

    @property
    def all_reduced_elements(self) -> int:
        """See ``ConnectorSizes``."""
        return 0

    def problems(self) -> Iterator[str]:
        """See ``ConnectorSizes``."""
        return iter(())

    def pieces(self) -> Iterator[Piece]:
        """See ``ConnectorSizes``."""
        inputs = self.ends.input_size
        sizes = dict(rows=1, unit="tile", has_bias=False)
        yield from norm("connector.norm", PART, inputs, has_bias=True)
        yield from linear("connector.projection", PART, inputs, self.ends.output_size, **sizes)

    def kept(self, tensor_size: int) -> float:
        """Count what goes into the norm and into the projection."""
        return 2 * self.ends.tokens * self.ends.input_size + self.ends.output_size


@dataclass(frozen=True)
class AttentionPool(Pool):
    """Norm, one learned query that attends to the tokens of a tile, and an MLP beside it."""

    def problems(self) -> Iterator[str]:
        """See ``ConnectorSizes``."""
        if self.ends.output_size != self.ends.input_size:
            yield (
                f"--architecture.connector.kind attention: gives embeddings of"
                f" --architecture.vision.hidden_size {self.ends.input_size}, but"
                f" --architecture.contrastive.size is {self.ends.output_size}; make them equal"
            )

    def pieces(self) -> Iterator[Piece]:
        """See ``ConnectorSizes``."""
        width = self.ends.input_size
        inner = self.ends.inner_size
        tokens = self.ends.tokens
        once = dict(rows=1, unit="tile", has_bias=True)
        yield from norm("connector.norm", PART, width, has_bias=True)
        yield vector("connector.query", PART, width)
        inputs = linear(
            "connector.in_proj", PART, width, 3 * width, rows=tokens, unit="tile", has_bias=True
        )
        for piece in inputs:
            # Keys and values alone are of a tile; there is one query.
            key = piece.key.replace("proj.", "proj_")
            yield replace(piece, key=key, forward=piece.forward // 3 * 2)
        yield products(PART, 4 * tokens * width, "tile")
        yield from linear("connector.out_proj", PART, width, width, **once)
        yield from norm("connector.mlp_norm", PART, width, has_bias=True)
        yield from linear("connector.up", PART, width, inner, **once)
        yield from linear("connector.down", PART, inner, width, **once)

    def kept(self, tensor_size: int) -> float:
        """Count inputs and results of the norm, keys and values, and the MLP."""
        return 5 * self.ends.tokens * self.ends.input_size + 2 * self.ends.inner_size


@dataclass(frozen=True)
class MeanQueryPool(Pool):
    """Norms for queries, keys and values, and the mean of all tokens of a tile as the one query
    that attends to them: the pool of InternVL-C (arXiv 2312.14238).
    """

    def problems(self) -> Iterator[str]:
        """See ``ConnectorSizes``."""
        heads = self.settings.heads
        if heads < 1 or self.ends.input_size % heads:
            yield (
                f"--architecture.connector.heads {heads}: must divide"
                f" --architecture.vision.hidden_size {self.ends.input_size}"
            )

    def pieces(self) -> Iterator[Piece]:
        """See ``ConnectorSizes``."""
        width = self.ends.input_size
        tokens = self.ends.tokens
        for name, rows in (("query", 1), ("key", tokens), ("value", tokens)):
            yield from norm(f"connector.{name}_norm", PART, width, has_bias=True)
            sizes = dict(rows=rows, unit="tile", has_bias=True)
            yield from linear(f"connector.{name}_proj", PART, width, width, **sizes)
        yield products(PART, 4 * tokens * width, "tile")
        once = dict(rows=1, unit="tile", has_bias=True)
        yield from linear("connector.projection", PART, width, self.ends.output_size, **once)

    def kept(self, tensor_size: int) -> float:
        """Count inputs and results of the norms of keys and values, keys and values."""
        return 6 * self.ends.tokens * self.ends.input_size + self.ends.output_size


CONNECTORS: dict[str, Callable[[Connector, Ends], ConnectorSizes]] = {
    "mlp": Mlp,
    "linear": Linear,
    "merger": lambda settings, ends: MergerSizes(ends),
    "class_token": Pool,
    "mean": Pool,
    "attention": AttentionPool,
    "mean_query": MeanQueryPool,
    "qformer": lambda settings, ends: QFormerSizes(settings.qformer, ends),
    "resampler": lambda settings, ends: ResamplerSizes(settings.resampler, ends),
}


def connector_sizes(settings: Connector, ends: Ends) -> ConnectorSizes:
    """Return the sizes of a connector.

    Raises:
        ValueError: there is no such kind; the message lists the names.
    """
    if settings.kind not in CONNECTORS:
        raise ValueError(
            f"--architecture.connector.kind {settings.kind}: no such connector; known are"
            f" {', '.join(CONNECTORS)}"
        )
    return CONNECTORS[settings.kind](settings, ends)
