"""What travels along a pipeline whose ranks hold several chunks each: megatron-core's interleaved
schedule (Narayanan et al., arXiv 2104.04473), with the same two savings as in ``pipeline``.

From chunk to chunk activations travel once around the ring of the pipeline's ranks for every chunk
that a rank holds, and gradients go the other way round. The schedule says when to send and when to
receive; which pack of which chunk arrives next, and so its shape, follows from its table on both
sides.

**Why no rank waits for ever.** What is sent after the forward pass number ``k`` of rank ``r``
belongs to round ``k + r``, on the sender as on the receiver, which makes pass ``k - 1`` or, on the
first rank, as many passes later as there are ranks in between. In the same way gradients of
backward pass ``k`` belong to round ``k - r``. A rank makes ``2 (P - r - 1) + (V - 1) P`` forward
passes more than backward ones before both alternate, so that gradients' round ``s`` comes after
activations' round ``s + 2 (P - 1) + (V - 1) P`` on every rank alike: all ranks go through the
rounds of both kinds in one order, and so do the messages between two of them, even where there are
only two, which are each other's neighbours on both sides. What does not travel is missing at both
ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch import Tensor

from megavlm.parallel.p2p import Shape

Pass = tuple[int, int]
"""A pack and a chunk of this rank, both counted from 0."""


def sources(passes: Sequence[Pass], chunks: int, wraps: bool) -> list[Pass]:
    """For what arrives along the ring, in order: the pass that it is for.

    Args:
        passes: of every rank, in order.
        chunks: on each rank.
        wraps: whether it comes from the other end of the pipeline, where a chunk's follower is the
            next one.
    """
    return (
        [(pack, chunk + 1) for pack, chunk in passes if chunk + 1 < chunks]
        if wraps
        else list(passes)
    )


class Messages:
    """Messages under way, which the schedule may wait for several times."""

    def __init__(self, operations: list[dist.P2POp]):
        self._under_way = dist.batch_isend_irecv(operations) if operations else []
        self._tensors = [operation.tensor for operation in operations]  # kept until they are there

    def wait(self) -> None:
        """Wait until all are sent and received."""
        for request in self._under_way:
            request.wait()
        self._under_way = []
        self._tensors = []


class Rings(P2PCommunicator):
    """The borders of all chunks of a rank, for megatron-core's interleaved schedule. It is made
    anew for every step.

    Args:
        group: the ranks of one pipeline.
        config: megatron-core's, of the model.
        packs: of the step.
        shape: answers with the shape of what arrives at a chunk of this rank for a pack,
            ``shape(pack, chunk)``.
        first_trained: number of the first chunk of all that has anything to train.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        config: ModelParallelConfig,
        packs: int,
        shape: Callable[[int, int], Shape],
        first_trained: int,
    ):
        super().__init__(group, config)
        chunks = config.virtual_pipeline_model_parallel_size
        is_first = group.rank() == 0
        is_last = group.rank() == group.size() - 1
        passes = get_schedule_table(packs, chunks, config.microbatch_group_size_per_vp_stage)
        self._arriving = (
            shape(pack, chunk) for pack, chunk in sources(passes, chunks, wraps=is_first)
        )
        self._leaving: Iterator[int] = (
            chunk for _, chunk in passes if not (is_last and chunk == chunks - 1)
        )
        # The backward pass goes through the chunks from the last to the first, and so are they
        # counted in its passes.
        self._returning = (
            chunks - 1 - chunk for _, chunk in sources(passes, chunks, wraps=is_last)
        )
        numbers = range(group.rank(), chunks * group.size(), group.size())
        self._gradient_arrives = [first_trained <= number for number in numbers]
        # Of activations whose gradients have not arrived yet, which have the same shapes.
        self._sent = [deque[Shape]() for _ in range(chunks)]
        self._under_way: list[Messages] = []

    def finish(self) -> None:
        """Wait for what the schedule sent last, and has not waited for."""
        for messages in self._under_way:
            messages.wait()
        self._under_way = []

    def recv_forward(self, tensor_shapes: object, is_first_stage: bool) -> Tensor | None:
        """Called by the schedule, which knows no shapes; nor do the methods below look at those
        that it gives.
        """
        return self.send_forward_recv_forward(None, not is_first_stage, tensor_shapes)

    def recv_backward(self, tensor_shapes: object, is_last_stage: bool) -> Tensor | None:
        """Called by the schedule."""
        return self.send_backward_recv_backward(None, not is_last_stage, tensor_shapes)

    def send_forward_recv_forward(
        self,
        output_tensor: Tensor | None,
        recv_prev: bool,
        tensor_shape: object,
        overlap_p2p_comm: bool = False,
    ) -> Tensor | tuple[Tensor | None, dict[str, Messages]] | None:
        """Called by the schedule."""
        if output_tensor is not None and self._gradient_arrives[chunk := next(self._leaving)]:
            self._sent[chunk].append(tuple(output_tensor.shape))
        arriving = self._empty(next(self._arriving)) if recv_prev else None
        messages = self._exchange(
            output_tensor, self.next_rank, arriving, self.prev_rank, wait=not overlap_p2p_comm
        )
        return (
            (arriving, _named(send_next=output_tensor, recv_prev=arriving, messages=messages))
            if overlap_p2p_comm
            else arriving
        )

    def send_backward_recv_backward(
        self,
        input_tensor_grad: Tensor | None,
        recv_next: bool,
        tensor_shape: object,
        overlap_p2p_comm: bool = False,
    ) -> Tensor | tuple[Tensor | None, dict[str, Messages]] | None:
        """Called by the schedule; there is no gradient to send where nothing upstream is
        trained.
        """
        arriving = None
        if recv_next and self._gradient_arrives[chunk := next(self._returning)]:
            arriving = self._empty(self._sent[chunk].popleft())
        messages = self._exchange(
            input_tensor_grad, self.prev_rank, arriving, self.next_rank, wait=not overlap_p2p_comm
        )
        return (
            (arriving, _named(send_prev=input_tensor_grad, recv_next=arriving, messages=messages))
            if overlap_p2p_comm
            else arriving
        )

    def _exchange(
        self, leaving: Tensor | None, to: int, arriving: Tensor | None, source: int, *, wait: bool
    ) -> Messages:
        sent = [] if leaving is None else [dist.P2POp(dist.isend, leaving, to, self.pp_group)]
        received = (
            [] if arriving is None else [dist.P2POp(dist.irecv, arriving, source, self.pp_group)]
        )
        messages = Messages(sent + received)
        if wait:
            messages.wait()
        else:
            self._under_way.append(messages)
        return messages

    def _empty(self, shape: Shape) -> Tensor:
        return torch.empty(
            shape,
            requires_grad=True,
            device=torch.cuda.current_device(),
            dtype=self.config.pipeline_dtype,
        )


def _named(messages: Messages, **tensors: Tensor | None) -> dict[str, Messages]:
    """What the schedule waits for, under its names for sending and receiving."""
    return {name: messages for name, tensor in tensors.items() if tensor is not None}
