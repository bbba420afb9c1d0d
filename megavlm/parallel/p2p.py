"""What travels between the chunks of the pipeline, and what does not.

megatron-core either takes all shapes to be the same, or exchanges the shape of every tensor before
the tensor itself and waits for the device in between. Here tiles travel and then tokens, and packs
differ in their tiles; but the ranks of a pipeline read the same packs, so that the receiver knows
every shape beforehand. And a gradient that trains nothing upstream does not travel at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

Item = TypeVar("Item")
Shape = tuple[int, ...]


class Turns(Generic[Item]):
    """Hands the same items to several readers, in order; each is made once, and forgotten when
    every reader has had it.

    Args:
        items: what is read.
        readers: how many read all of it.
    """

    def __init__(self, items: Iterator[Item], readers: int = 1):
        self._items = items
        self._kept = dict[int, Item]()
        self._made = 0
        self._had = [0] * readers

    def look(self, number: int) -> Item:
        """Item ``number``, counted from 0, which not every reader has had."""
        while self._made <= number:
            self._kept[self._made] = next(self._items)
            self._made += 1
        return self._kept[number]

    def reader(self, number: int) -> Iterator[Item]:
        """The items for reader ``number``; they end when nobody asks for more."""
        while True:
            item = self.look(self._had[number])
            self._had[number] += 1
            self._kept.pop(min(self._had) - 1, None)
            yield item


class Borders(P2PCommunicator):
    """The two borders of a chunk, for megatron-core's schedule of chunks that are not interleaved.
    It is made anew for every step.

    Args:
        group: the chunks of one pipeline.
        config: megatron-core's, of the chunk.
        arriving: shapes of the activations that arrive, in order.
        first_trained: number of the first chunk that has anything to train.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        config: ModelParallelConfig,
        arriving: Iterator[Shape],
        first_trained: int,
    ):
        super().__init__(group, config)
        self._arriving = arriving
        self._gradient_leaves = first_trained < group.rank()
        self._gradient_arrives = first_trained <= group.rank()
        self._sent = deque[
            Shape
        ]()  # of activations whose gradients have not arrived yet, which have the same shapes

    def recv_forward(self, tensor_shapes: object, is_first_stage: bool) -> list[Tensor | None]:
        """Called by the schedule, which knows no shapes; nor do the methods below look at those
        that it gives.
        """
        return (
            [None]
            if is_first_stage
            else super().recv_forward([next(self._arriving)], is_first_stage)
        )

    def send_forward(self, output_tensors: list[Tensor], is_last_stage: bool) -> None:
        """Called by the schedule."""
        self._sent.append(tuple(output_tensors[0].shape))
        super().send_forward(output_tensors, is_last_stage)

    def recv_backward(self, tensor_shapes: object, is_last_stage: bool) -> list[Tensor | None]:
        """Called by the schedule."""
        if is_last_stage or not self._gradient_arrives:
            return [None]
        return super().recv_backward([self._sent.popleft()], is_last_stage)

    def send_backward(self, input_tensor_grads: list[Tensor | None], is_first_stage: bool) -> None:
        """Called by the schedule."""
        if self._gradient_leaves:
            super().send_backward(input_tensor_grads, is_first_stage)

    def send_forward_recv_backward(
        self, output_tensors: list[Tensor], tensor_shapes: object, is_last_stage: bool
    ) -> list[Tensor | None]:
        """Called by the schedule."""
        if is_last_stage or not self._gradient_arrives:
            super().send_forward(output_tensors, is_last_stage)
            return [None]
        self._sent.append(tuple(output_tensors[0].shape))
        return super().send_forward_recv_backward(
            output_tensors, [self._sent.popleft()], is_last_stage
        )

    def send_backward_recv_forward(
        self, input_tensor_grads: list[Tensor | None], tensor_shapes: object, is_first_stage: bool
    ) -> list[Tensor | None]:
        """Called by the schedule."""
        if is_first_stage or not self._gradient_leaves:
            return self.recv_forward(tensor_shapes, is_first_stage)
        return super().send_backward_recv_forward(
            input_tensor_grads, [next(self._arriving)], is_first_stage
        )
