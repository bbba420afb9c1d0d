"""The tensors of one pack on one rank.

Shapes: T tokens of the pack (its capacity) on this rank, P positions with a loss, N samples,
I tiles on this rank, F features a tile, S side of a tile in pixels. A rank has all tokens and all
tiles of a pack, or its share of them (see ``data/loading/rank_slice``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from megavlm.config.schema import Architecture
from megavlm.data.loading.rank_slice import WHOLE_PACK, RankSlice


class _Tensors:
    """Tensors of a pack, and what the host knows of them: the fields of a dataclass."""

    __slots__ = ()

    @classmethod
    def of(cls, **values: np.ndarray | float | tuple[int, ...] | _Tensors | None) -> Self:
        """Make them of arrays of the dtypes and shapes that the class describes, whose memory they
        share.
        """
        return cls(
            **{
                name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                for name, value in values.items()
            }
        )

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        theirs = other._values()
        return all(
            torch.equal(value, theirs[name])
            if isinstance(value, torch.Tensor)
            else value == theirs[name]
            for name, value in self._values().items()
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy the tensors to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy the tensors to page-locked memory, from which copies to a GPU need not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def share_memory(self) -> Self:
        """Move the tensors to shared memory, in which another process gets them without a copy.

        Raises:
            RuntimeError: there is no room for them.
        """
        return self._map(lambda tensor: tensor.share_memory_() if tensor.numel() else tensor)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        values = self._values()
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                values[name] = change(value)
            elif isinstance(value, _Tensors):
                values[name] = value._map(change)
        return type(self)(**values)

    def _values(self) -> dict[str, Any]:
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prefixes(_Tensors):
    """Where the samples of a whole pack are divided for a prefix-LM: in front of the first
    supervised token. A prefix has one token at least, which is the same as none; a sample without a
    supervised token, such as the padding at the end, has no longer one.

    Args:
        inside: int64 [tokens of all prefixes], their positions in the pack, ascending.
        outside: int64 [the other tokens], likewise.
        ends: int32 [N + 1], where the prefix of each sample starts and ends in ``inside``.
        lengths: tokens of each prefix, known without asking the device.
    """

    inside: torch.Tensor
    outside: torch.Tensor
    ends: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Media(_Tensors):
    """Which tokens of a rank read which image, in segments: tokens of a segment read the same one.

    Args:
        rows: int64 [R], positions of the tokens that read an image, among this rank's tokens;
            segment by segment.
        ends: int32 [segments + 1], where each segment starts and ends in ``rows``.
        images: int64 [segments], which tile of the whole pack each reads.
        image_ends: int32 [segments + 1], 0, 1, 2, ...: where the tile of each segment starts and
            ends among the tiles that are read.
        lengths: tokens of each segment, known without asking the device.
        is_real: whether any token reads an image. If none does there is one segment all the same,
            whose result counts nothing, so that every rank runs the same.
    """

    rows: torch.Tensor
    ends: torch.Tensor
    images: torch.Tensor
    image_ends: torch.Tensor
    lengths: tuple[int, ...]
    is_real: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Instructions(_Tensors):
    """What a Q-Former reads beside each tile of a rank: the instruction of the tile's sample.

    Args:
        tokens: int64 [I, L], of the Q-Former's tokenizer; 0 behind the end of an instruction, and
            everywhere for padding tiles.
        lengths: int64 [I], tokens of each instruction.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Preferences(_Tensors):
    """Pairs of a chosen and a rejected answer: the samples 2 i and 2 i + 1 of a pack.

    Args:
        answers: int64 [T], the sample that each token of this rank belongs to; N for padding, which
            belongs to none of N samples.
        reference: float32 [N / 2, 2], logarithms of the probabilities that the reference model
            gives the chosen and the rejected answer of each pair; none while they are computed.
    """

    answers: torch.Tensor
    reference: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mixed(_Tensors):
    """Weighted sums of features, for tokens of a rank; see ``data/images/feature_layout``.

    Args:
        positions: int64 [M], where among this rank's tokens they go, ascending.
        numbers: int64 [M, 4], which of the features of the whole pack each is made of.
        weights: float32 [M, 4].
    """

    positions: torch.Tensor
    numbers: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Images(_Tensors):
    """Where the tiles of a rank stand in their images, for a vision encoder whose patches see all
    tiles of an image. A rank has whole images, and the tiles of an image stand window by window;
    a padding tile is an image by itself. N patches of a tile, row by row.

    Args:
        places: int64 [2, I * N], row and column of each patch in its image, tile by tile.
        sizes: int64 [2, I * N], rows and columns of patches that its image has.
        ends: int32 [images + 1], where the patches of each image start and end.
        lengths: patches of each image, known without asking the device.
        window_ends: int32 [windows + 1], the same of windows; none: the encoder has none.
        window_lengths: patches of each window.
        pairs: int64 [V], tiles that show two frames of a video, ascending; none: no tile does.
        second_frames: uint8 [V, 3, S, S], the second one of each; none where the pixels were not
            asked for.
    """

    places: torch.Tensor
    sizes: torch.Tensor
    ends: torch.Tensor
    lengths: tuple[int, ...]
    window_ends: torch.Tensor | None = None
    window_lengths: tuple[int, ...] = ()
    pairs: torch.Tensor | None = None
    second_frames: torch.Tensor | None = None

    def with_second_frames(self, pixels: np.ndarray) -> Images:
        """Return them with the second frames of tiles, uint8 [V, 3, S, S]."""
        return dataclasses.replace(self, second_frames=torch.from_numpy(pixels))


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """How a run reads its packs.

    Args:
        reduction: how a sample's supervised tokens are weighed: token, sample or square.
        vision_layers: layers of the vision encoder that need draws.
        patches: how many a tile has, and how many of them are kept, see ``Batch.kept_patches``;
            none: all are kept.
        with_pair_ids: whether to say which pairs share an image or a text.
        with_preferences: whether to say which tokens are whose answer, of packs of preferences.
        seed: of the run; with a pack's position in its order it fixes all draws.
        with_tiles: whether to decode the images.
        image_size: side in pixels of the black tiles of packs without images, which may have been
            packed for tiles of another; 0: as they were packed.
        spans_tiles: whether patches see all tiles of an image, see ``Batch.images``.
        window_tiles: for spans_tiles: tiles along a side of a window; 0: there are none.
        tile_grid: for spans_tiles: patches along a side of a tile.
        rotary_axes: whether to say where tokens stand among frames, rows and columns, see
            ``Batch.rotary_positions``.
        tokens_per_second: how far apart the frames of a video are there, see
            ``rotary_positions.rotary_positions``.
        tile_multiple: of the number of a rank's tiles, filled up with black ones.
        rank_slice: which tiles and tokens are this rank's.
    """

    reduction: str = "square"
    vision_layers: int = 0
    patches: tuple[int, int] | None = None
    with_pair_ids: bool = False
    with_preferences: bool = False
    seed: int = 0
    with_tiles: bool = True
    image_size: int = 0
    spans_tiles: bool = False
    window_tiles: int = 0
    tile_grid: int = 1
    rotary_axes: bool = False
    tokens_per_second: int = 0
    tile_multiple: int = 1
    rank_slice: RankSlice = WHOLE_PACK


AS_PACKED = BatchOptions()
"""Whole packs, with their tiles and without draws."""


def options_of(architecture: Architecture) -> BatchOptions:
    """Return how a model reads packs on one rank, without what a run asks of them beside."""
    vision = architecture.vision
    return BatchOptions(
        vision_layers=vision.num_layers,
        image_size=vision.image_size,
        spans_tiles=vision.spans_tiles,
        window_tiles=vision.window_tiles,
        tile_grid=vision.grid,
        rotary_axes=bool(architecture.language.rotary_sections),
        tokens_per_second=vision.tokens_per_second,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch(_Tensors):
    """The tensors of one pack.

    Args:
        tokens: int64 [T].
        labels: int64 [T], the next token inside the sample; 0 where there is none.
        loss_weights: float32 [T], weight of the label at this position; 0 where it has no loss.
        loss_positions: int64 [P], where in ``tokens`` the loss is computed: every position with
            a loss weight, and others that fill their number up to a multiple. P is known without
            asking the device.
        sources: int32 [T], number of the source that the token's sample is from, among
            ``source_names`` of the dataset.
        is_padding: bool [T], whether a token belongs to no sample: it fills up the pack, or a
            sample to a multiple of the alignment.
        sample_ends: int32 [N + 1], from 0 to the capacity: where samples start and end in the whole
            pack. The padding at the end is one more sample.
        sample_lengths: tokens of each sample in the whole pack, known without asking the device.
        longest_sample: tokens of the longest sample, the padding counted as one; of new tokens, of
            the longest sample that any is from.
        prefixes: where samples are divided for a prefix-LM; none in a pass of new tokens.
        media: which tokens read which image, for cross-attention; none if images have more than one
            placeholder token.
        instructions: what a Q-Former reads beside the tiles; none if the packs have none.
        preferences: which tokens are whose answer; none unless it was asked for.
        tiles: uint8 [I, 3, S, S], those of the pack's images first. Black ones, which no feature is
            taken from, follow where a multiple is asked for; each rank has at least one, so that
            every rank runs the same. [0, 3, S, S] where the pixels were not asked for.
        images: where the tiles stand in their images; none unless it was asked for.
        feature_positions: int64 [placeholders], where in ``tokens`` image features go, ascending.
        feature_numbers: int64 [placeholders], which of the features of the whole pack (those of all
            its tiles, in their order) goes there.
        mixed: weighted sums of features that go to tokens too; none if the pack has none.
        newline_positions: int64 [newlines], where in ``tokens`` the connector's embedding of the
            end of a row goes; see ``data/images/feature_layout``.
        num_features: features of the whole pack, those of padding tiles not counted.
        drop_path_draws: float32 [2 * vision layers, I], uniform in [0, 1), drawn from (seed,
            position) alone.
        pair_draws: float32 [2, tiles of the whole pack], uniform in [0, 1), drawn as for drop path.
        kept_patches: int64 [K, I], ascending, which patches of each tile the vision encoder sees,
            drawn as for drop path; none: all.
        pair_ids: int64 [N, 2], equal for equal images and for equal texts, for an objective that
            asks which pairs share one; the padding at the end not counted.
        draw: a random number of 31 bits, from (seed, position) alone.
        samples: of the pack, the padding at the end not counted.
        weight_sum: sum of the loss weights of the whole pack, in float64 from the index.
        pack_id: the pack; -1 for new tokens.
        rotary_positions: int64 [3, T], frame, row and column of each token in its sample, by which
            queries and keys are rotated: a text advances all three by 1 a token, and goes on behind
            the largest of an image before it (arXiv 2409.12191, section 2.1); none unless it was
            asked for.
        positions: int64 [T], the place of each token in its sample, if they are not the tokens of a
            pack but one new token of each of T samples, whose tiles and earlier tokens have been
            seen; none: the places follow from ``sample_ends``.
        cached: what attention keeps or reads of earlier tokens while questions are answered, see
            ``model/key_value_cache``; none in training.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_weights: torch.Tensor
    loss_positions: torch.Tensor
    sources: torch.Tensor
    is_padding: torch.Tensor
    sample_ends: torch.Tensor
    sample_lengths: tuple[int, ...]
    longest_sample: int
    prefixes: Prefixes | None
    tiles: torch.Tensor
    images: Images | None = None
    feature_positions: torch.Tensor
    feature_numbers: torch.Tensor
    newline_positions: torch.Tensor
    mixed: Mixed | None = None
    num_features: int
    drop_path_draws: torch.Tensor
    pair_draws: torch.Tensor | None = None
    kept_patches: torch.Tensor | None = None
    pair_ids: torch.Tensor | None = None
    draw: int = 0
    samples: int = 0
    media: Media | None = None
    instructions: Instructions | None = None
    preferences: Preferences | None = None
    weight_sum: float
    pack_id: int
    rotary_positions: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    cached: Any = None

    @property
    def num_tiles(self) -> int:
        """Tiles of this rank, blank ones too, whether or not it has the pixels."""
        return self.drop_path_draws.shape[1]
