"""One pipeline over all layers: which layers stand in which chunk.

The layers of the vision encoder and of the language model are counted through, vision first. Patch and class embedding go with the
first layer of the vision encoder, projector and token embedding with the first layer of the language model, final norm and head with the
last. Borders may lie anywhere, inside the vision encoder too.
"""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What one pipeline rank holds.

    Args:
        vision_layers: numbers of its vision layers, from 0.
        language_layers: numbers of its language layers, from 0.
        has_patch_embedding: whether it turns pixels into patches.
        has_projector: whether it projects features, embeds tokens and puts both together.
        has_head: whether it ends in logits and loss.
    """

    vision_layers: range
    language_layers: range
    has_patch_embedding: bool
    has_projector: bool
    has_head: bool

    @property
    def has_language(self) -> bool:
        """Whether any part of the language model stands here."""
        return len(self.language_layers) > 0 or self.has_head


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All chunks, in the order of the pipeline."""

    chunks: tuple[Chunk, ...]

    def vision_counts(self) -> tuple[int, ...]:
        """Vision layers of each chunk."""
        return tuple(len(chunk.vision_layers) for chunk in self.chunks)

    def language_counts(self) -> tuple[int, ...]:
        """Language layers of each chunk."""
        return tuple(len(chunk.language_layers) for chunk in self.chunks)


def split_evenly(layers: int, chunks: int) -> tuple[int, ...]:
    """Layers of each chunk, as equal as can be; the later chunks get what is left over, since the first also embeds."""
    least, more = divmod(layers, chunks)
    return tuple(least + (chunk >= chunks - more) for chunk in range(chunks))


def make_layout(config: Config) -> Layout:
    """Cut the layers as ``parallel.pipeline_split`` says, or evenly."""
    vision, language = config.architecture.vision.num_layers, config.architecture.language.num_layers
    split = config.parallel.pipeline_split or split_evenly(vision + language, config.parallel.pipeline_model_parallel_size)
    chunks, start = [], 0
    for count in split:
        end = start + count
        chunks.append(
            Chunk(
                vision_layers=range(min(start, vision), min(end, vision)),
                language_layers=range(max(start - vision, 0), max(end - vision, 0)),
                has_patch_embedding=start == 0,
                has_projector=start <= vision < end,
                has_head=end == vision + language,
            )
        )
        start = end
    return Layout(chunks=tuple(chunks))
