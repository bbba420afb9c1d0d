"""Several packed datasets as one, mixed by weight while training.

Which dataset a position takes from, and which of its packs, is a pure function of the seed and the
position, as with one dataset: nothing is stored, and resuming anywhere costs the same. Up to the
end of any window of 64 positions each dataset has its share to within a pack, so batches are mixed
alike; inside a window the order is shuffled, so that no data-parallel rank is always given the same
dataset. Or the window is a global batch, and each has the same number of packs of each dataset.
Each dataset's own packs come in the order that its own plan has.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from megavlm.config.sampling import BLOCK, exact_shares, shares_of, whole_shares
from megavlm.config.schema import Config
from megavlm.data.loading.batch import AS_PACKED, Batch, BatchOptions
from megavlm.data.loading.curriculum import Curriculum
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.order import Order, Plan, permute
from megavlm.data.loading.weights import weight_of
from megavlm.data.store.index_format import RECORD
from megavlm.data.store.manifest import Manifest
from megavlm.io.open_files import OpenFiles

WINDOW = 64


@dataclass(frozen=True, kw_only=True)
class BlendPlan(Order):
    """The order of the packs of several datasets; the packs of the second are numbered on from
    those of the first.

    Args:
        plans: the order of each.
        weights: share of the packs that are taken from each, compared with the others.
        seed: fixes the order inside windows.
        shuffle: whether that is shuffled.
        block: positions that hold whole numbers of packs of each dataset, as close to the weights
            as such numbers can be.
        window: positions that are shuffled together; divides the block.

    Raises:
        ValueError: not as many weights as plans, or a weight that is not above 0 or too small
            beside the others.
    """

    plans: tuple[Order, ...]
    weights: tuple[float, ...]
    seed: int = 0
    shuffle: bool = True
    block: int = BLOCK
    window: int = WINDOW

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.plans):
            raise ValueError(
                f"--data.weights: {len(self.weights)} weights for {len(self.plans)} datasets of"
                " --data.train"
            )
        if (
            not all(weight > 0 and math.isfinite(weight) for weight in self.weights)
            or not self.counts.all()
        ):
            raise ValueError(
                f"--data.weights {','.join(map(str, self.weights))}: each must be above 0, and at"
                f" least 1/{self.block} of the sum"
            )

    @property
    def num_packs(self) -> int:
        """Packs of all datasets."""
        return sum(plan.num_packs for plan in self.plans)

    @cached_property
    def starts(self) -> np.ndarray:
        """The number of the first pack of each dataset; int64."""
        packs = [plan.num_packs for plan in self.plans]
        return np.cumsum([0, *packs[:-1]], dtype=np.int64)

    @cached_property
    def counts(self) -> np.ndarray:
        """Positions of a block that each dataset has: its share, rounded by the largest remainders;
        int64, their sum is ``block``.
        """
        return np.array(whole_shares(self.weights, self.block), np.int64)

    def describe(self, names: Sequence[str]) -> str:
        """Describe the shares of datasets with these ``names``."""
        return ", ".join(
            f"{100 * count / self.block:.3g}% from {name}"
            for count, name in zip(self.counts.tolist(), names, strict=True)
        )

    @cached_property
    def pattern(self) -> np.ndarray:
        """The dataset at each position of a block, each evenly spread over it; int64 [block].

        Up to any position each dataset has its share of turns, rounded up or down. The k-th turn of
        a dataset with share w lies between k / w and (k + 1) / w; giving each position to the
        dataset whose turn ends soonest keeps all of them (S. Baruah et al., "Proportionate
        Progress", Algorithmica 15, 1996).
        """
        pattern = np.empty(self.block, np.int64)
        waiting = []
        # From which position, dataset, how often it came before.
        opening = [(0, owner, 0) for owner in range(len(self.counts))]
        for position in range(self.block):
            while opening and opening[0][0] <= position:
                _, owner, turn = heapq.heappop(opening)
                heapq.heappush(
                    waiting, (-(-(turn + 1) * self.block // int(self.counts[owner])), owner, turn)
                )
            _, owner, turn = heapq.heappop(waiting)
            pattern[position] = owner
            heapq.heappush(
                opening, ((turn + 1) * self.block // int(self.counts[owner]), owner, turn + 1)
            )
        return pattern

    @cached_property
    def before(self) -> np.ndarray:
        """How often each dataset comes in a block before each window; int64 [block / window,
        datasets].
        """
        datasets = len(self.counts)
        windows = self.block // self.window
        place = np.repeat(np.arange(windows), self.window) * datasets + self.pattern
        in_window = np.bincount(place, minlength=windows * datasets).reshape(windows, datasets)
        return np.cumsum(in_window, axis=0) - in_window

    def at(self, positions: np.ndarray) -> np.ndarray:
        """See ``Order.at``."""
        flat = np.ravel(positions).astype(np.int64)
        datasets, offsets = self.split(flat)
        ids = np.empty_like(flat)
        for number in np.unique(datasets).tolist():
            chosen = datasets == number
            ids[chosen] = self.plans[number].at(offsets[chosen]) + self.starts[number]
        return ids.reshape(np.shape(positions))

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the dataset of each position, and the position in that dataset's own sequence; all
        are int64 [n].
        """
        windows, row = np.unique(positions // self.window, return_inverse=True)
        slots = np.tile(np.arange(self.window, dtype=np.int64), len(windows))
        if self.shuffle:
            slots = permute(slots, self.window, self.seed, np.repeat(windows, self.window))
        blocks, in_block = np.divmod(windows, self.block // self.window)
        datasets = self.pattern[in_block[:, None] * self.window + slots.reshape(-1, self.window)]
        column = positions % self.window
        chosen = datasets[row, column]
        place = in_block[row]
        earlier = blocks[row] * self.counts[chosen] + self.before[place, chosen]
        return chosen, earlier + _earlier_alike(datasets)[row, column]


def _earlier_alike(rows: np.ndarray) -> np.ndarray:
    """Return how often the number at each place of a row stands before it in its row; int64, shaped
    like ``rows``.
    """
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    places = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    begins = np.diff(ordered, axis=1, prepend=-1) != 0
    found = np.empty_like(order)
    firsts = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    np.put_along_axis(found, order, places - firsts, axis=1)
    return found


class BlendedDataset:
    """Several packed datasets behind one numbering of their packs; it answers what
    ``PackedDataset`` answers.

    Args:
        datasets: of one tokenizer and one capacity.
    """

    def __init__(self, datasets: Sequence[PackedDataset]) -> None:
        self.datasets = tuple(datasets)
        self.starts = np.cumsum([0] + [len(dataset) for dataset in self.datasets], dtype=np.int64)
        self._first_sources = [
            0,
            *accumulate(len(dataset.source_names) for dataset in self.datasets),
        ]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def folder(self) -> Path:
        """Where the dataset of ``manifest`` lies; the others have the same tokenizer."""
        return self._first.folder

    @property
    def manifest(self) -> Manifest:
        """The facts of the first dataset that has images, or the first of all; the tokenizer and
        the capacity are those of all.
        """
        return self._first.manifest

    @cached_property
    def _first(self) -> PackedDataset:
        """The first dataset that has images, as ``first_with_images`` chooses it."""
        return next((each for each in self.datasets if each.has_images), self.datasets[0])

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        """The sources of all datasets, one dataset after the other, as ``FOLDER/SOURCE``: a source
        may be in several.
        """
        names = [Path(dataset.folder).name for dataset in self.datasets]
        if len(set(names)) < len(names):
            names = [str(dataset.folder) for dataset in self.datasets]
        if len(set(names)) < len(names):
            names = [f"{name}:{index}" for index, name in enumerate(names)]
        return tuple(
            f"{name}/{source}"
            for name, dataset in zip(names, self.datasets, strict=True)
            for source in dataset.source_names
        )

    @property
    def has_images(self) -> bool:
        """Whether any pack has an image."""
        return any(dataset.has_images for dataset in self.datasets)

    def records(self, pack_ids: np.ndarray) -> np.ndarray:
        """Return the index's records of packs."""
        found = np.empty(pack_ids.shape, RECORD)
        owners = self._owner(pack_ids)
        for number in np.unique(owners).tolist():
            chosen = owners == number
            own_ids = pack_ids[chosen] - self.starts[number]
            found[chosen] = self.datasets[number].records(own_ids)
        return found

    def some_records(self) -> np.ndarray:
        """Return index records of some packs of every dataset, to estimate means."""
        return np.concatenate([dataset.some_records() for dataset in self.datasets])

    def pack_weights(
        self,
        pack_ids: np.ndarray,
        records: np.ndarray,
        reduction: str,
        loss_weights: Sequence[float],
    ) -> dict[int, float]:
        """Return what the summed loss of each pack of a step is divided by, so that the loss is the
        sum over the datasets of ``loss_weights`` times the mean loss of their labels in the step.

        Args:
            pack_ids: of the step.
            records: of these packs in the index.
            reduction: as for ``weight_of``.
            loss_weights: of each dataset.
        """
        owners = self._owner(np.asarray(pack_ids))
        divisors = {}
        for number, weight in enumerate(loss_weights):
            is_own = owners == number
            # Without a label every loss weight is 0, and any divisor will do.
            total = weight_of(records[is_own], reduction) or 1.0
            divisors |= dict.fromkeys(pack_ids[is_own].tolist(), total / weight)
        return divisors

    def batch(self, pack_id: int, position: int, options: BatchOptions = AS_PACKED) -> Batch:
        """Make the batch of a pack; arguments and errors as for ``PackedDataset.batch``."""
        number, own_id = self._within(pack_id)
        batch = self.datasets[number].batch(own_id, position, options)
        return dataclasses.replace(
            batch, pack_id=int(pack_id), sources=batch.sources + self._first_sources[number]
        )

    def blank(self, pack_id: int, position: int, options: BatchOptions = AS_PACKED) -> Batch:
        """Make what takes a pack's place; arguments as for ``PackedDataset.blank``."""
        number, own_id = self._within(pack_id)
        batch = self.datasets[number].blank(own_id, position, options)
        return dataclasses.replace(batch, pack_id=int(pack_id))

    def origins(self, pack_id: int) -> list[str]:
        """Where the samples of a pack come from: ``annotations.jsonl:line`` of each."""
        number, own_id = self._within(pack_id)
        return self.datasets[number].origins(own_id)

    def file_of(self, pack_id: int) -> str:
        """Return the file that holds a pack."""
        number, own_id = self._within(pack_id)
        return self.datasets[number].file_of(own_id)

    def _within(self, pack_id: int) -> tuple[int, int]:
        """Return the number of a pack's dataset, and that of the pack in it."""
        number = int(self._owner(np.asarray(pack_id)))
        return number, int(pack_id - self.starts[number])

    def _owner(self, pack_ids: np.ndarray) -> np.ndarray:
        """Return the dataset of each pack."""
        return np.searchsorted(self.starts, pack_ids, side="right") - 1


Packs = PackedDataset | BlendedDataset
"""What training reads: one dataset, or several as one."""


def open_blend(config: Config) -> tuple[Packs, Order]:
    """Open the training packs of a run as one dataset, and fix their order. Nobody looks at the
    shards: ``check_shards`` does.

    Args:
        config: the run. With strata the groups of a dataset are its share of ``config.group``, as
            the packs are that a step has of it. A dataset without levels of difficulty is of one
            level.
    """
    data = config.data
    opened = OpenFiles()
    datasets = [
        PackedDataset(
            folder,
            augment=data.augment,
            next_image=data.next_image,
            reference=config.reference,
            opened=opened,
            with_shards=False,
        )
        for folder in data.train_folders
    ]
    samples = [dataset.manifest.totals.samples for dataset in datasets]
    shares = shares_of(data.weights, data.sampling, [len(each) for each in datasets], samples)
    plans = tuple(
        _plan_of(dataset, config, share)
        for dataset, share in zip(datasets, exact_shares(shares), strict=True)
    )
    if len(datasets) == 1:
        return datasets[0], plans[0]
    batch = config.training.global_batch_size
    windows = {"block": batch, "window": batch} if data.batch_shares else {}
    return BlendedDataset(datasets), BlendPlan(
        plans=plans,
        weights=shares,
        seed=config.training.seed,
        shuffle=data.shuffle,
        **windows,
    )


def _plan_of(dataset: PackedDataset, config: Config, share: float) -> Order:
    """Return the order of the packs of one dataset, which has a share of all."""
    order = {
        "seed": config.training.seed,
        "shuffle": config.data.shuffle,
        "group": max(1, round(config.group * share)) if config.strata > 1 else config.group,
        "strata": config.strata,
    }
    levels = dataset.manifest.levels
    if config.data.curriculum and levels:
        return Curriculum(levels=tuple(level.packs for level in levels), **order)
    return Plan(num_packs=len(dataset), **order)
