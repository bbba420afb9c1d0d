"""Whole tensors that fill a model: those of Hugging Face folders, of which each rank reads its
share only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megavlm.config.schema import Architecture
from megavlm.convert.weights.tables import EMBEDDING_KEY, HEAD_KEY
from megavlm.convert.weights.transforms import Shape
from megavlm.convert.weights.views import MegatronView
from megavlm.model.positions import POSITIONS_KEY, resize_positions

_BLOCK_ROWS = 8192
Index = tuple[slice, ...]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a Hugging Face folder under our key: what is taken of it is read, and nothing
    else.

    Args:
        view: of the folder.
        key: checkpoint key.
    """

    view: MegatronView
    key: str

    def __getitem__(self, index: Index) -> Tensor:
        return self.view.part(self.key, index)


def vision_tensor(
    view: MegatronView, found: Architecture, wanted: Architecture, key: str
) -> LazyTensor | Tensor:
    """Return a tensor of a vision encoder; position embeddings are resized if the tile size differs
    from the one it was trained with.
    """
    if key == POSITIONS_KEY and found.vision.grid != wanted.vision.grid:
        return resize_positions(view[key], wanted.vision.grid, int(wanted.vision.has_class_token))
    return LazyTensor(view, key)


def head_source(key: str, found: Architecture, wanted: Architecture) -> str:
    """Return the key of the folder's tensor that fills ``key``: a head that is tied in the folder
    but not in the wanted model starts as a copy of the token embedding.
    """
    return (
        EMBEDDING_KEY
        if key == HEAD_KEY and found.language.tied_head and not wanted.language.tied_head
        else key
    )


@dataclass(frozen=True, kw_only=True)
class ExtendedVocabulary:
    """Token embedding or head of a language model whose tokenizer got new tokens, as InternVL
    starts them.

    Rows are kept as far as the table goes (those of Qwen2.5 goes beyond its tokenizer's ids), rows
    beyond it are drawn, and rows of new tokens in a head are the mean of the rows before them.

    Args:
        tensor: the table as it is.
        rows: that are wanted.
        new: ids of the new tokens.
        std: standard deviation of rows that are drawn.
        seed: they are drawn from.
        averaged: whether rows of new tokens become the mean: in a head, and in an embedding that is
            the head too.
    """

    tensor: LazyTensor
    rows: int
    new: tuple[int, ...]
    std: float
    seed: int
    averaged: bool

    def __getitem__(self, index: Index) -> Tensor:
        known, width = self.tensor.view.headers[self.tensor.key].shape
        begin, end, _ = index[0].indices(self.rows)
        middle = min(max(begin, known), end)
        drawn = torch.empty(0)
        if middle < end:
            generator = torch.Generator().manual_seed(
                zlib.crc32(f"{self.seed} new rows of {self.tensor.key}".encode())
            )
            drawn = torch.normal(0.0, self.std, (self.rows - known, width), generator=generator)[
                middle - known : end - known
            ]
        kept = self.tensor[(slice(begin, middle), *index[1:])]
        found = (
            torch.cat([kept, drawn[(slice(None), *index[1:])].to(kept.dtype)])
            if len(drawn)
            else kept.clone()
        )
        inside = [token - begin for token in self.new if begin <= token < end]
        if self.averaged and inside:
            found[inside] = self._mean(min(self.new[0], known))[index[1:]].to(found.dtype)
        return found

    def _mean(self, rows: int) -> Tensor:
        """Mean of the first rows."""
        blocks = [
            self.tensor[(slice(start, min(start + _BLOCK_ROWS, rows)),)]
            for start in range(0, rows, _BLOCK_ROWS)
        ]
        return torch.stack([block.float().sum(0) for block in blocks]).sum(0) / rows


Served = LazyTensor | ExtendedVocabulary | Tensor
FullTensor = Callable[[str, Shape], Served]
"""Takes a checkpoint key and a shape, which may have padding, and gives the whole tensor."""
