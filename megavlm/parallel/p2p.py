"""Point-to-point communication of a pipeline with one model chunk on each rank (1F1B).

megatron-core either assumes that all shapes are equal, or sends the shape of every tensor before
the tensor itself and waits for the device in between. Here early stages send tiles and later ones
tokens, and packs differ in their tiles. But all ranks of a pipeline read the same packs, so the
receiver knows every shape beforehand. A gradient that trains nothing upstream is not sent at all.
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


class SharedBatches(Generic[Item]):
    """Gives the same batches to several readers, in order. Each is made once, and dropped when
    every reader has read it.

    Args:
        items: the batches.
        readers: number of readers, each of which reads all batches.
    """

    def __init__(self, items: Iterator[Item], readers: int = 1):
        self._items = items
        self._kept = dict[int, Item]()
        self._made = 0
        self._read = [0] * readers

    def peek(self, index: int) -> Item:
        """Return the item at ``index``, counted from 0, which not every reader has read yet."""
        while self._made <= index:
            self._kept[self._made] = next(self._items)
            self._made += 1
        return self._kept[index]

    def reader(self, index: int) -> Iterator[Item]:
        """Yield the items for the reader at ``index``, as long as it asks for more."""
        while True:
            item = self.peek(self._read[index])
            self._read[index] += 1
            self._kept.pop(min(self._read) - 1, None)
            yield item


class VariableShapeP2P(P2PCommunicator):
    """Sends and receives for one model chunk, with shapes that the receiver computes. A new one is
    made for every step.

    megatron-core's ``forward_backward_pipelining_without_interleaving`` calls every method below.
    It passes tensor shapes of its own, which are not used.

    Args:
        group: the ranks of one pipeline.
        config: megatron-core's configuration of the chunk.
        arriving: shapes of the activations that arrive, in order.
        first_trained: index of the first chunk that has anything to train.
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
        # Of activations whose gradients have not arrived yet; these have the same shapes.
        self._sent = deque[Shape]()

    def recv_forward(self, tensor_shapes: object, is_first_stage: bool) -> list[Tensor | None]:
        """Receive the activations of the next microbatch."""
        if is_first_stage:
            return [None]
        return super().recv_forward([next(self._arriving)], is_first_stage)

    def send_forward(self, output_tensors: list[Tensor], is_last_stage: bool) -> None:
        """Send activations, and remember their shape."""
        self._sent.append(tuple(output_tensors[0].shape))
        super().send_forward(output_tensors, is_last_stage)

    def recv_backward(self, tensor_shapes: object, is_last_stage: bool) -> list[Tensor | None]:
        """Receive a gradient, if the stage after this one computes any."""
        if is_last_stage or not self._gradient_arrives:
            return [None]
        return super().recv_backward([self._sent.popleft()], is_last_stage)

    def send_backward(self, input_tensor_grads: list[Tensor | None], is_first_stage: bool) -> None:
        """Send a gradient, if anything before this stage is trained."""
        if self._gradient_leaves:
            super().send_backward(input_tensor_grads, is_first_stage)

    def send_forward_recv_backward(
        self, output_tensors: list[Tensor], tensor_shapes: object, is_last_stage: bool
    ) -> list[Tensor | None]:
        """Send activations, and receive the gradient of earlier ones."""
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
        """Send a gradient, and receive the next activations."""
        if is_first_stage or not self._gradient_leaves:
            return self.recv_forward(tensor_shapes, is_first_stage)
        return super().send_backward_recv_forward(
            input_tensor_grads, [next(self._arriving)], is_first_stage
        )
