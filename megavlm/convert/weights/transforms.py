"""What becomes of one tensor of megatron-core in Hugging Face's format, and back: invertible
operations on whole tensors.

Each operation takes a tensor of megatron-core apart (``split``) and puts it together again
(``join``), bit for bit. Shape letters: H query heads, G query groups, d numbers of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Operation(ABC):
    """An invertible operation between one tensor of megatron-core and one or more of Hugging
    Face's.
    """

    checks_parts: ClassVar[bool] = False
    """Whether joining raises ValueError for some tensors, so that it is tried before others."""

    @property
    def moves_rows(self) -> bool:
        """Whether it does nothing but move whole rows (along the first axis), so that it can be
        done on files.
        """
        return False

    @abstractmethod
    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Split megatron-core's tensor into Hugging Face's; they may be views of it."""

    @abstractmethod
    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Join Hugging Face's tensors into megatron-core's."""

    @abstractmethod
    def part_shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Return the shapes of Hugging Face's tensors for a tensor of megatron-core of shape
        ``whole``.
        """

    def takes(self, found: Shape, expected: Shape) -> bool:
        """Whether a tensor of megatron-core of shape ``found`` can stand for one of shape
        ``expected``.
        """
        return found == expected


@dataclass(frozen=True)
class Same(Operation):
    """The same tensor on both sides."""

    @property
    def moves_rows(self) -> bool:
        """Yes."""
        return True

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return the tensor."""
        return (whole,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the tensor."""
        return parts[0]

    def part_shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Return the shape."""
        return (whole,)


@dataclass(frozen=True)
class Padded(Operation):
    """Another operation on a tensor of megatron-core that may be longer than what it holds, so that
    it divides over ranks: rows for tokens that do not exist, or for heads. The end is cut off.

    Args:
        size: length without padding.
        axis: that is padded.
        inner: what is done with the rest.
    """

    size: int
    axis: int = 0
    inner: Operation = Same()

    @property
    def moves_rows(self) -> bool:
        """Where rows are cut off and the rest moves."""
        return self.axis == 0 and self.inner.moves_rows

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Split the tensor without its padding into Hugging Face's tensors."""
        return self.inner.split(whole.narrow(self.axis, 0, self.size))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Join Hugging Face's tensors into megatron-core's, without padding."""
        return self.inner.join(parts)

    def part_shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Return the shapes that the inner operation gives."""
        return self.inner.part_shapes(whole)

    def takes(self, found: Shape, expected: Shape) -> bool:
        """Accept a padded axis that is longer than ``size``, never one that is shorter."""
        others = [number for number in range(len(expected)) if number != self.axis]
        return (
            len(found) == len(expected)
            and found[self.axis] >= self.size
            and all(found[n] == expected[n] for n in others)
        )


@dataclass(frozen=True)
class Fused(Operation):
    """One tensor of Hugging Face: what another operation gives, one part below the other.

    Args:
        inner: gives the parts.
        rows: of each part.
    """

    inner: Operation
    rows: tuple[int, ...]

    @property
    def moves_rows(self) -> bool:
        """Where the other operation does."""
        return self.inner.moves_rows

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Stack the inner operation's parts in one tensor."""
        return (torch.cat(self.inner.split(whole)),)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Split the stack into its parts and join them with the inner operation."""
        return self.inner.join(parts[0].split(self.rows))

    def part_shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Return one shape with the rows of all parts."""
        return ((sum(self.rows), *whole[1:]),)


@dataclass(frozen=True)
class Stacked(Operation):
    """Several tensors of the same shape, one below the other, such as ``[gate; up]``.

    Args:
        count: tensors.
    """

    count: int

    @property
    def moves_rows(self) -> bool:
        """Yes."""
        return True

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Split the stack into ``count`` tensors."""
        return whole.chunk(self.count)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Stack the tensors."""
        return torch.cat(list(parts))

    def part_shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Return ``count`` shapes with a ``count``-th of the rows each."""
        return ((whole[0] // self.count, *whole[1:]),) * self.count


@dataclass(frozen=True)
class GroupedQKV(Operation):
    """Query, key and value projections, weights or biases, that megatron-core keeps in one tensor:
    for each query group the rows of its query heads, then of its key head, then of its value head.

    Args:
        heads: query heads H.
        groups: query groups G; key and value have a head for each. G = H is plain multi-head
            attention.
        head_size: rows of a head d.
    """

    heads: int
    groups: int
    head_size: int

    @property
    def moves_rows(self) -> bool:
        """Yes."""
        return True

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Split [(H + 2G) d, ...] into query [H d, ...], key [G d, ...] and value [G d, ...]."""
        heads = whole.unflatten(0, (self.groups, self._heads_of_group, self.head_size))
        return tuple(
            part.flatten(0, 2) for part in heads.split([self.heads // self.groups, 1, 1], dim=1)
        )

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave query, key and value by query group, as ``split`` takes them."""
        grouped = [part.unflatten(0, (self.groups, -1, self.head_size)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 2)

    def part_shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Return the shapes of query, key and value."""
        return tuple(
            (heads * self.head_size, *whole[1:]) for heads in (self.heads, self.groups, self.groups)
        )

    @property
    def _heads_of_group(self) -> int:
        """Query heads of a group, its key head and its value head."""
        return self.heads // self.groups + 2


@dataclass(frozen=True)
class Absent(Operation):
    """A tensor of megatron-core that Hugging Face's format has no place for: files do not hold it,
    and what comes from files starts it anew.

    Args:
        shape: of the tensor.
        start: value of all its elements, or of the diagonal of a matrix.
    """

    shape: Shape
    start: float

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return nothing."""
        return ()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the tensor as it starts."""
        if len(self.shape) == 2:
            return torch.eye(*self.shape) * self.start
        return torch.full(self.shape, self.start)

    def part_shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Return no shape."""
        return ()


@dataclass(frozen=True)
class Reshaped(Operation):
    """The same numbers in another shape.

    Args:
        part: Hugging Face's shape.
        whole: megatron-core's.
    """

    part: Shape
    whole: Shape

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return the tensor in Hugging Face's shape."""
        return (whole.reshape(self.part),)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the tensor in megatron-core's shape."""
        return parts[0].reshape(self.whole)

    def part_shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Return Hugging Face's shape."""
        return (self.part,)


@dataclass(frozen=True)
class Transposed(Operation):
    """A matrix whose axes are the other way around."""

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return Hugging Face's matrix."""
        return (whole.T.contiguous(),)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return megatron-core's matrix."""
        return parts[0].T.contiguous()

    def part_shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Return the shape of Hugging Face's matrix."""
        return (whole[::-1],)


@dataclass(frozen=True)
class Interleaved(Operation):
    """A fused gate whose two halves alternate: of a weight as columns of the transposed matrix, of
    a bias as numbers.
    """

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return Hugging Face's tensor [..., 2 M] of megatron-core's [2 M, ...]."""
        gate, other = whole.chunk(2)
        return (torch.stack([gate, other], dim=1).flatten(0, 1).movedim(0, -1).contiguous(),)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return megatron-core's tensor."""
        rows = parts[0].movedim(-1, 0)
        return torch.cat([rows[::2], rows[1::2]])

    def part_shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Return the shape of Hugging Face's tensor."""
        return ((*whole[1:], whole[0]),)


@dataclass(frozen=True)
class BesideIdentity(Operation):
    """A linear layer, weight or bias, beside a second one that changes nothing: an identity matrix,
    or zeros.

    Args:
        size: rows of both.
    """

    size: int
    checks_parts: ClassVar[bool] = True

    def split(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return the tensor, and the second layer's."""
        return whole, self._nothing(whole)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the first tensor.

        Raises:
            ValueError: the second layer does change something.
        """
        if not torch.equal(parts[1], self._nothing(parts[1])):
            raise ValueError(
                "the connector's second layer is no identity, and nothing stands between it and the"
                " first (projector_hidden_act linear): no connector here computes that"
            )
        return parts[0]

    def part_shapes(self, whole: Shape) -> tuple[Shape, ...]:
        """Return the shapes of both."""
        return whole, (self.size, self.size) if len(whole) == 2 else (self.size,)

    def _nothing(self, like: Tensor) -> Tensor:
        """Return the second layer's tensor, in the dtype and with the axes of another."""
        if like.dim() == 1:
            return torch.zeros(self.size, dtype=like.dtype)
        return torch.eye(self.size, dtype=like.dtype)
