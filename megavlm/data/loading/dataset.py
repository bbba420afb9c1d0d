"""A packed dataset as the trainer sees it: from a pack id to the tensors of its batch.

Shapes: T tokens of the pack (its capacity), t tokens stored, N samples, I tiles, F features a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from megavlm.data.images.feature_layout import FeatureLayout, feature_layout, in_text_order
from megavlm.data.loading.batch import AS_PACKED, Batch, BatchOptions, Media
from megavlm.data.loading.draws import (
    drop_path_draws,
    next_image_draws,
    pack_draw,
    patch_draws,
)
from megavlm.data.loading.feature_places import feature_places
from megavlm.data.loading.instructions import find_instructions
from megavlm.data.loading.media import find_media
from megavlm.data.loading.native_images import refuse_other_tiles, share_images
from megavlm.data.loading.pair_ids import pair_ids
from megavlm.data.loading.preferences import find_preferences
from megavlm.data.loading.prefixes import find_prefixes
from megavlm.data.loading.rotary_positions import rotary_positions
from megavlm.data.loading.tiles import TileDecoder
from megavlm.data.loading.weights import weight_field, weight_of
from megavlm.data.store.manifest import Manifest
from megavlm.data.store.reader import Index, Pack, Reader, empty_pack
from megavlm.data.store.reference import Reference, reference_folder
from megavlm.io.open_files import OpenFiles
from megavlm.io.storage import ReadError

_LOSS_MULTIPLE = 128


class PackedDataset:
    """A folder of packs, of which it reads what is asked for; it can be pickled, as workers need.

    Args:
        folder: folder that ``tools/pack_dataset.py`` wrote, or the URL of a copy of it in object
            storage; or what reads packs from elsewhere.
        augment: changes that images of sources with ``data_augment`` go through: jpeg, crop, flip,
            colour.
        next_image: share of the samples whose tokens read the next image by cross-attention, if
            their text has one, not the last one.
        reference: folder of the probabilities that a reference model gives the answers of this
            and other datasets; empty: batches have none.
        opened: open files that it shares with other datasets; none: it has its own.
        with_shards: as for ``Reader``.

    Raises:
        FileNotFoundError: no complete dataset there.
        ValueError: damaged, or of a newer format.
    """

    def __init__(
        self,
        folder: Path | str | Reader,
        *,
        augment: Sequence[str] = (),
        next_image: float = 0.0,
        reference: Path | str = "",
        opened: OpenFiles | None = None,
        with_shards: bool = True,
    ) -> None:
        is_open = isinstance(folder, Reader)
        self.reader = folder if is_open else Reader(folder, opened, with_shards=with_shards)
        self._opened = opened
        self.augment = tuple(augment)
        self._decoder = TileDecoder(self.manifest, self.augment, self.folder, self.reader.origin)
        self.next_image = next_image
        self._reference_root = reference
        self._reference = None
        if reference:
            place = reference_folder(reference, self.folder, self.manifest)
            self._reference = Reference(place, opened)

    def __reduce__(self) -> tuple:
        options = {
            "augment": self.augment,
            "next_image": self.next_image,
            "reference": self._reference_root,
            "with_shards": False,
        }
        return partial(type(self), self.folder, **options, opened=self._opened), ()

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def folder(self) -> Path | str:
        """Where the dataset lies."""
        return self.reader.folder

    @property
    def manifest(self) -> Manifest:
        """The facts of the dataset."""
        return self.reader.manifest

    @property
    def index(self) -> Index:
        """The records of the packs: ``index[pack_ids]["tiles"]``."""
        return self.reader.index

    def records(self, pack_ids: np.ndarray) -> np.ndarray:
        """Return the index's records of packs."""
        return self.index[pack_ids]

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        """The sources of the samples; the annotation files of one entry of a meta file are one
        source.
        """
        return tuple(dict.fromkeys(source.name for source in self.manifest.sources))

    @cached_property
    def _number_of_file(self) -> np.ndarray:
        """The index in ``source_names`` of each annotation file; int32 [files]."""
        numbers = {name: number for number, name in enumerate(self.source_names)}
        return np.array([numbers[source.name] for source in self.manifest.sources], np.int32)

    def some_records(self, limit: int = 4096) -> np.ndarray:
        """Return index records of packs spread evenly over the dataset: all of them, or ``limit``
        of a large one.
        """
        return self.index[np.linspace(0, len(self) - 1, min(limit, len(self)), dtype=np.int64)]

    @property
    def has_images(self) -> bool:
        """Whether any pack has an image."""
        return self.manifest.totals.tiles > 0

    def weight_sum(self, pack_ids: np.ndarray, reduction: str) -> float:
        """Sum of the loss weights of packs, from the index. The order of the ids does not change
        the result's last bit.
        """
        return weight_of(self.index[pack_ids], reduction)

    def batch(self, pack_id: int, position: int, options: BatchOptions = AS_PACKED) -> Batch:
        """Make the batch of a pack, or a rank's slice of it.

        Args:
            pack_id: the pack.
            position: its index in the run's order.
            options: how the run reads its packs.

        Raises:
            ReadError: damaged bytes or images, or wrong context tokens.
            ValueError: samples that cannot be cut for ``options.rank_slice``.
        """
        pack = self.reader.read(pack_id, with_images=options.with_tiles or options.with_pair_ids)
        weight = self.index[pack_id][weight_field(options.reduction)]
        return self._batch_of(pack, float(weight), position, options)

    def blank(self, pack_id: int, position: int, options: BatchOptions = AS_PACKED) -> Batch:
        """Make the batch that takes the place of a pack that cannot be read: padding alone, and no
        image. Arguments as for ``batch``.
        """
        return self._batch_of(empty_pack(pack_id), 0.0, position, options)

    def _batch_of(
        self, pack: Pack, weight_sum: float, position: int, options: BatchOptions
    ) -> Batch:
        """Make the batch of a pack that has been read, and whose loss weights have this sum; other
        arguments as for ``batch``.
        """
        manifest = self.manifest
        positions, ends = sample_positions(pack.lengths, manifest.alignment, manifest.capacity)
        own = options.rank_slice.tokens(ends)
        local = np.full(manifest.capacity, -1)
        local[own] = np.arange(len(own))

        def on_rank(values: np.ndarray, fill: int | bool = 0) -> np.ndarray:
            return _spread(values, positions, manifest.capacity, fill)[own]

        labels, weights = map(
            on_rank, label(pack.tokens, pack.supervised, pack.lengths, options.reduction)
        )
        chosen = options.rank_slice.tiles(pack.tiles, options.tile_multiple)
        share = None
        images = None
        if options.spans_tiles:
            share = share_images(self.folder, pack, manifest, options)
            chosen = share.tiles
            images = share.images
            if options.with_tiles and share.pairs is not None:
                images = images.with_second_frames(
                    self._decoder.decode(
                        pack, share.pairs, options.seed, position, second_frames=True
                    )
                )
        decoded = chosen if options.with_tiles else chosen[:0]
        return Batch.of(
            tokens=on_rank(pack.tokens.astype(np.int64), manifest.pad_token_id),
            labels=labels.astype(np.int64),
            loss_weights=weights,
            loss_positions=loss_positions(weights),
            sources=on_rank(np.repeat(self._source_numbers(pack), pack.lengths)),
            is_padding=on_rank(np.zeros(len(pack.tokens), bool), True),
            **_of_samples(pack, ends, options.with_pair_ids),
            prefixes=find_prefixes(pack.supervised, positions, ends),
            media=self._media(pack, local[positions], options.seed, position),
            instructions=find_instructions(pack, manifest, chosen),
            tiles=self._decoder.decode(
                pack, decoded, options.seed, position, black=options.image_size
            ),
            images=images,
            **feature_places(self.folder, pack, manifest, self.layout, positions, local, share),
            rotary_positions=np.stack([on_rank(axis) for axis in self._rotary(pack, options)])
            if options.rotary_axes
            else None,
            preferences=find_preferences(pack, on_rank, self._reference)
            if options.with_preferences
            else None,
            **_draws(pack.tiles, chosen, position, options),
            weight_sum=weight_sum,
            pack_id=pack.pack_id,
        )

    def origins(self, pack_id: int) -> list[str]:
        """Where the samples of a pack come from: ``annotations.jsonl:line`` of each."""
        pack = self.reader.read(pack_id, with_images=False)
        return [self.reader.origin(pack, sample) for sample in range(len(pack.lengths))]

    def file_of(self, pack_id: int) -> str:
        """Return the file that holds a pack."""
        return self.reader.bin_path(pack_id)

    def _media(self, pack: Pack, rows: np.ndarray, seed: int, position: int) -> Media | None:
        """Return which of the rank's tokens read which image; ``rows`` as for ``find_media``."""
        reads_next = None
        if self.next_image:
            reads_next = next_image_draws(seed, position, len(pack.lengths)) < self.next_image
        return find_media(pack, self.manifest, rows, reads_next)

    def _rotary(self, pack: Pack, options: BatchOptions) -> np.ndarray:
        """Return frame, row and column of each stored token, int64 [3, t]."""
        refuse_other_tiles(self.folder, pack, self.manifest)
        shown = in_text_order(pack.images, preferences=self.manifest.preferences)
        context = self.manifest.context_token_id
        rate = options.tokens_per_second
        return rotary_positions(pack.tokens, pack.lengths, shown, context, rate).of_tokens

    def _source_numbers(self, pack: Pack) -> np.ndarray:
        """Return the index in ``source_names`` of each sample's source; int32 [N]."""
        numbers = self._number_of_file
        named = pack.provenance["source"]
        unknown = named[(named < 0) | (named >= len(numbers))]
        if len(unknown):
            raise ReadError(
                f"{self.folder}: pack {pack.pack_id} has samples of source {unknown[0]}, but"
                f" manifest.json lists {len(numbers)} sources; pack the dataset again"
            )
        return numbers[named]

    @cached_property
    def layout(self) -> FeatureLayout:
        """Which features of an image stand in its text."""
        return feature_layout(self.manifest.tiling, self.manifest.features_per_tile)


def sample_positions(
    lengths: np.ndarray, alignment: int, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of stored tokens in a pack whose samples start at multiples of
    ``alignment``, and the ends of the samples.

    Returns:
        positions: int64 [t], the position of each stored token.
        ends: int32 [N + 1], or [N + 2] with the padding at the end as one more sample; from 0 to
            ``capacity``.
    """
    lengths = lengths.astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(-(-lengths // alignment) * alignment)])
    stored = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) + np.repeat(ends[:-1] - stored, lengths)
    if ends[-1] < capacity:
        ends = np.append(ends, capacity)
    return positions, ends.astype(np.int32)


def label(
    tokens: np.ndarray, supervised: np.ndarray, lengths: np.ndarray, reduction: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the next token of each stored token inside its sample, and the weight of its loss.

    A supervised token of a sample with n of them weighs 1 (token), 1/n (sample) or 1/sqrt(n)
    (square; InternVL 2.5, arXiv:2412.05271, section 3.3). The first token of a sample is no label
    and does not count in n.

    Returns:
        labels: int32 [t], 0 at a sample's end.
        weights: float32 [t], 0 where the label is not supervised.
    """
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    counted = supervised.copy()
    counted[starts] = False
    counts = np.maximum(np.add.reduceat(counted, starts, dtype=np.int64), 1)
    power = {"token": 0.0, "sample": -1.0, "square": -0.5}[reduction]
    weight_of_token = np.repeat((counts**power).astype(np.float32), lengths) * counted
    labels = np.zeros_like(tokens)
    weights = np.zeros(len(tokens), np.float32)
    labels[:-1] = tokens[1:]
    weights[:-1] = weight_of_token[1:]
    labels[starts + lengths - 1] = 0
    return labels, weights


def _of_samples(
    pack: Pack, ends: np.ndarray, with_pair_ids: bool
) -> dict[str, np.ndarray | tuple[int, ...] | int | None]:
    """Return what a batch says of its samples; arguments as in ``PackedDataset.batch``."""
    lengths = tuple(np.diff(ends).tolist())
    return {
        "sample_ends": ends,
        "sample_lengths": lengths,
        "longest_sample": max(lengths),
        "samples": len(pack.lengths),
        "pair_ids": pair_ids(pack) if with_pair_ids else None,
    }


def _draws(
    tiles: int, chosen: np.ndarray, position: int, options: BatchOptions
) -> dict[str, np.ndarray | int]:
    """Return what is random in the batch of a pack.

    Args:
        tiles: of the pack.
        chosen: tiles of the rank.
        position, options: as for ``PackedDataset.batch``.
    """
    seed = options.seed
    found = drop_path_draws(seed, position, 2 * options.vision_layers + 2, max(1, tiles))
    drawn = {
        "drop_path_draws": _columns(found[:-2], chosen),
        "pair_draws": found[-2:],
        "draw": pack_draw(seed, position),
    }
    if options.patches is not None:
        count, kept = options.patches
        of_patches = _columns(patch_draws(seed, position, count, max(1, tiles)), chosen)
        order = np.argsort(of_patches, axis=0, kind="stable")
        drawn["kept_patches"] = np.sort(order[:kept], axis=0)
    return drawn


def _columns(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the chosen columns of a table, zero beyond its last."""
    is_inside = chosen < values.shape[1]
    found = np.zeros((len(values), len(chosen)), values.dtype)
    found[:, is_inside] = values[:, chosen[is_inside]]
    return found


def _spread(values: np.ndarray, positions: np.ndarray, capacity: int, fill: int = 0) -> np.ndarray:
    """Put values at their positions in a pack, ``fill`` elsewhere."""
    result = np.full(capacity, fill, values.dtype)
    result[positions] = values
    return result


def loss_positions(loss_weights: np.ndarray) -> np.ndarray:
    """Choose the positions whose loss is computed.

    Their number is filled up with positions without a loss weight, to a multiple that suits matrix
    products and keeps the number of shapes small; there is always one, since a rank may have no
    supervised token and must still run what the others run.

    Args:
        loss_weights: float [T], 0 where there is no loss.

    Returns:
        int64 [P], ascending, each position once
    """
    multiple = min(_LOSS_MULTIPLE, max(1, len(loss_weights) // 16))
    has_loss = loss_weights > 0
    wanted = max(1, int(has_loss.sum()))
    count = -(-wanted // multiple) * multiple
    filler = np.flatnonzero(~has_loss)[: count - int(has_loss.sum())]
    return np.sort(np.concatenate([np.flatnonzero(has_loss), filler])).astype(np.int64)
