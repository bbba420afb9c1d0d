"""Keys and values of questions, kept while their answers grow: a pass over the questions (prefill)
fills them in, and each pass behind it (decode) runs one new token of each question.

Shape letters: T tokens of a pack, Q questions of a group, R rows of a decode pass, one for each
question and some of padding, G key and value heads, W slots of a group, I tiles, F features of a
tile, d width of a head.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megavlm.data.loading.rotary_positions import AXES
from megavlm.parallel.context_parallel import gather_tokens


def slots_for(tokens: int) -> int:
    """Return the most slots, one for each token, that a question and its answer take."""
    return 1 << (tokens - 1).bit_length()


@dataclass(kw_only=True)
class _Group:
    """Questions whose keys share a tensor in each layer, at most one twice as long as another.

    Args:
        questions: in the order of the rows.
        width: W, tokens of the longest with its answer.
        layers: keys and values of each layer: [Q, G, W, d], or [Q, G, F, d] of images.
    """

    questions: list[int]
    width: int
    layers: dict[nn.Module, tuple[Tensor, Tensor]]

    def of_layer(self, layer: nn.Module, like: Tensor, width: int = 0) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer, zeros at first.

        Args:
            layer: any that attends.
            like: keys [..., G, d].
            width: their number for a question; 0: W.
        """
        if layer not in self.layers:
            heads, size = like.shape[-2:]
            shape = (len(self.questions), heads, width or self.width, size)
            # What is not written yet is multiplied by zero, and must be finite.
            self.layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[layer]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the other rows; one tensor after the other, so that memory holds one of them twice
        at most.
        """
        self.questions = [self.questions[row] for row in rows]
        for layer, pair in list(self.layers.items()):
            index = torch.tensor(rows, device=pair[0].device)
            self.layers[layer] = tuple(one.index_select(0, index) for one in pair)


class KeyValueCache:
    """The keys and values of questions and of their answers so far, in the layers of this rank: of
    its heads, and of all tokens if context-parallel ranks share them.

    Args:
        lengths: tokens of each question, by its number.
        room: tokens of the longest answer.
        device: where keys and values are.
        shifts: by how much the tokens behind each question are rotated further than their places in
            its sample say (see ``Batch.rotary_positions``); none: by nothing.
    """

    def __init__(
        self,
        lengths: Mapping[int, int],
        room: int,
        device: torch.device,
        shifts: Mapping[int, int] | None = None,
    ):
        by_size: dict[int, list[int]] = {}
        for question, length in lengths.items():
            by_size.setdefault(slots_for(length + room), []).append(question)
        self.groups = [
            _Group(questions=own, width=max(lengths[one] for one in own) + room, layers={})
            for _, own in sorted(by_size.items())
        ]
        self.lengths = dict(lengths)
        self.shifts = shifts or {}
        self.device = device
        self.longest = max(lengths.values(), default=0) + room

    @property
    def questions(self) -> list[int]:
        """Those whose keys are kept, in the order of the rows of a decode pass."""
        return [one for group in self.groups for one in group.questions]

    def keep(self, questions: Container[int]) -> None:
        """Drop the keys and values of all other questions."""
        kept = []
        for group in self.groups:
            rows = [row for row, one in enumerate(group.questions) if one in questions]
            if 0 < len(rows) < len(group.questions):
                group.keep(rows)
            if rows:
                kept.append(group)
        self.groups = kept


class Prefill:
    """What attention keeps of a pass over a pack of questions.

    Args:
        cache: where.
        starts: position in the pack where each of its questions starts, by its number.
        ends: int [N + 1], where the samples of the whole pack start and end.
        tiles: which tile of the pack each question's answer reads by cross-attention, if any.
        questions: those whose next token this rank finds, in the order of its logits.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        starts: Mapping[int, int],
        ends: np.ndarray,
        tiles: Mapping[int, int],
        questions: Sequence[int] = (),
    ):
        self.questions = questions
        self._ends = ends
        self._parts: list[tuple[_Group, tuple[Tensor, Tensor, Tensor]]] = []
        self._tiles: list[tuple[_Group, Tensor, Tensor]] = []
        for group in cache.groups:
            reading = [(row, tiles[one]) for row, one in enumerate(group.questions) if one in tiles]
            if reading:
                rows, numbers = torch.tensor(reading, device=cache.device).unbind(1)
                self._tiles.append((group, rows, numbers))
            own = [(row, one) for row, one in enumerate(group.questions) if one in starts]
            if not own:
                continue
            lengths = [cache.lengths[one] for _, one in own]
            slots = np.concatenate([np.arange(length) for length in lengths])
            rows = np.repeat([row for row, _ in own], lengths)
            tokens = slots + np.repeat([starts[one] for _, one in own], lengths)
            where = (torch.from_numpy(one).to(cache.device) for one in (rows, slots, tokens))
            self._parts.append((group, tuple(where)))

    def record(self, layer: nn.Module, key: Tensor, value: Tensor, ranks: ProcessGroup) -> None:
        """Keep the keys and values of the questions' tokens. Collective over context-parallel
        ranks.

        Args:
            layer: any that attends.
            key, value: of this rank's tokens of the pack [T / ranks, G, d].
            ranks: the context-parallel ranks.
        """
        if ranks.size() > 1:
            joined = gather_tokens(torch.cat([key, value], dim=-1), self._ends, ranks)
            key, value = joined.split((key.shape[-1], value.shape[-1]), dim=-1)
        for group, (rows, slots, tokens) in self._parts:
            for kept, new in zip(group.of_layer(layer, key), (key, value), strict=True):
                kept[rows, :, slots] = new[tokens]

    def record_tiles(self, layer: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep the keys and values of the tiles that answers read.

        Args:
            layer: one of cross-attention.
            key, value: of all tiles of the pack [I, F, G, d].
        """
        for group, rows, tiles in self._tiles:
            pair = group.of_layer(layer, key, key.shape[1])
            for kept, new in zip(pair, (key, value), strict=True):
                kept[rows] = new[tiles].transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class CachedKeys:
    """Keys and values that the new tokens of a group's questions read.

    Args:
        rows: of the pass.
        keys, values: of their samples [Q, G, W of the longest so far, d], or of images
            [Q, G, F, d].
        slots: int64 [Q], of the last keys that are read.
    """

    rows: slice
    keys: Tensor
    values: Tensor
    slots: Tensor


class Decode:
    """What attention reads in a pass that runs one new token of each question, and what it adds.

    Args:
        cache: of the questions, which count as one token longer from now on.
        multiple: what the number of rows must be a multiple of.

    Attributes:
        questions: of the rows, in their order; rows of padding follow.
        positions: int64 [R], the place of each row's token in its sample.
        rotary_positions: int64 [3, R], its frame, row and column, which are equal: it is of a text.
        longest: an upper bound of the tokens of a sample, the same in all passes.
    """

    def __init__(self, cache: KeyValueCache, multiple: int):
        self.questions = cache.questions
        self.longest = max(cache.longest, 1)
        slots = [cache.lengths[one] for one in self.questions]
        rows = -(-max(len(slots), 1) // multiple) * multiple
        padding = [0] * (rows - len(slots))
        self.positions = torch.tensor(slots + padding)
        shifts = [cache.shifts.get(one, 0) for one in self.questions]
        self.rotary_positions = (self.positions + torch.tensor(shifts + padding)).expand(AXES, -1)
        self._parts: list[tuple[_Group, slice, Tensor, int]] = []
        start = 0
        for group in cache.groups:
            own = slice(start, start + len(group.questions))
            where = torch.tensor(slots[own], device=cache.device)
            self._parts.append((group, own, where, max(slots[own]) + 1))
            start = own.stop
        for question in self.questions:
            cache.lengths[question] += 1

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor) -> Iterator[CachedKeys]:
        """Keep the keys and values of the new tokens, and yield what each group reads.

        Args:
            layer: any that attends.
            key, value: [R, G, d].
        """
        for group, rows, slots, longest in self._parts:
            pair = group.of_layer(layer, key)
            numbers = torch.arange(len(slots), device=slots.device)
            for kept, new in zip(pair, (key, value), strict=True):
                kept[numbers, :, slots] = new[rows]
            keys, values = (kept[:, :, :longest] for kept in pair)
            yield CachedKeys(rows=rows, keys=keys, values=values, slots=slots)

    def tiles(self, layer: nn.Module) -> Iterator[CachedKeys]:
        """Yield what the groups read of images, which is zeros for questions without an image, and
        nothing for groups without one.

        Args:
            layer: one of cross-attention.
        """
        for group, rows, slots, _ in self._parts:
            if layer in group.layers:
                keys, values = group.layers[layer]
                last = torch.full_like(slots, keys.shape[2] - 1)
                yield CachedKeys(rows=rows, keys=keys, values=values, slots=last)
