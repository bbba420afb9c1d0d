"""One pipeline over all layers: which layers stand in which chunk.

The layers of the vision encoder and of the language model are counted through, vision first. Patch
and class embedding go with the first layer of the vision encoder, connector and token embedding
with the first layer of the language model, final norm and head with the last. Stage boundaries may
lie anywhere, inside the vision encoder too. Without a language model the connector goes with the
last layer of the vision encoder, and the objective with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.config.layout_text import parse_layout, write_layout
from megavlm.config.schema import Architecture, Config
from megavlm.planner.partition import TYPICAL_IMAGE, PackSize, balance, run_costs


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Neighbouring layers, of which a pipeline rank holds one such piece or several.

    Args:
        vision_layers: numbers of its vision layers, from 0.
        language_layers: numbers of its language layers, from 0.
        has_patch_embedding: whether it turns pixels into patches.
        has_connector: whether it projects features, embeds tokens and puts both together.
        has_head: whether it ends in logits and loss.
    """

    vision_layers: range
    language_layers: range
    has_patch_embedding: bool
    has_connector: bool
    has_head: bool

    @property
    def has_language(self) -> bool:
        """Whether layers of the language model stand here; what is around them goes with them."""
        return len(self.language_layers) > 0

    def layer_numbers(self, vision_layers: int) -> range:
        """Its layers, counted through.

        Args:
            vision_layers: of the whole model.
        """
        first = (
            self.vision_layers.start
            if self.vision_layers
            else vision_layers + self.language_layers.start
        )
        return range(first, first + len(self.vision_layers) + len(self.language_layers))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All chunks, in the order of the pipeline."""

    chunks: tuple[Chunk, ...]

    def __str__(self) -> str:
        """Write the layout as ``parallel.layout`` takes it."""
        counts = [len(chunk.vision_layers) + len(chunk.language_layers) for chunk in self.chunks]
        return write_layout(counts, sum(self.vision_counts()))

    @property
    def embedding_chunk(self) -> int:
        """Number of the chunk that embeds tokens."""
        return next(number for number, chunk in enumerate(self.chunks) if chunk.has_connector)

    def vision_counts(self) -> tuple[int, ...]:
        """Vision layers of each chunk."""
        return tuple(len(chunk.vision_layers) for chunk in self.chunks)

    def language_counts(self) -> tuple[int, ...]:
        """Language layers of each chunk."""
        return tuple(len(chunk.language_layers) for chunk in self.chunks)


def split_evenly(layers: int, chunks: int) -> tuple[int, ...]:
    """Layers of each chunk, as equal as can be; the later chunks get what is left over, since the
    first also embeds.
    """
    least, more = divmod(layers, chunks)
    return tuple(least + (chunk >= chunks - more) for chunk in range(chunks))


def make_layout(config: Config, size: PackSize | None = None) -> Layout:
    """Cut the layers as ``parallel.layout`` says.

    Args:
        config: the run.
        size: what a pack holds, for the layout auto; none: as much text as vision.
    """
    arch = config.architecture
    parallel = config.parallel
    vision = arch.vision.num_layers
    language = arch.language.num_layers
    chunks = parallel.chunks
    if parallel.layout == "even":
        return from_counts(split_evenly(vision + language, chunks), vision)
    if parallel.layout == "auto":
        return from_counts(balance(run_costs(config, size or _typical(arch)), chunks), vision)
    return from_counts(parse_layout(parallel.layout, vision, language), vision)


def _typical(arch: Architecture) -> PackSize:
    """Return the size of a pack of one image, and as much text."""
    tiles = TYPICAL_IMAGE if arch.vision.spans_tiles else 1
    return PackSize(
        tokens=2.0 * arch.placeholders_per_tile * tiles,
        squared_lengths=0.0,
        tiles=float(tiles),
        squared_tiles=float(tiles**2),
    )


def from_counts(counts: Sequence[int], vision_layers: int) -> Layout:
    """Make the layout whose chunks have these numbers of layers, counted through the vision encoder
    and the language model, which may have none.
    """
    chunks = []
    connected = min(vision_layers, sum(counts) - 1)
    start = 0
    for count in counts:
        end = start + count
        chunks.append(
            Chunk(
                vision_layers=range(min(start, vision_layers), min(end, vision_layers)),
                language_layers=range(max(start - vision_layers, 0), max(end - vision_layers, 0)),
                has_patch_embedding=start == 0,
                has_connector=start <= connected < end,
                has_head=end == sum(counts),
            )
        )
        start = end
    return Layout(chunks=tuple(chunks))
