"""Point-to-point communication of a pipeline with several model chunks on each rank:
megatron-core's interleaved 1F1B (Narayanan et al., arXiv 2104.04473), with the same two savings as
in ``p2p``.

Activations go around the ring of the pipeline's ranks once for every chunk that a rank holds, and
gradients go the other way. The schedule says when to send and when to receive. Which pack of which
chunk arrives next, and so its shape, follows from the schedule's table on both sides.

**Why this cannot deadlock.** What is sent after the forward pass number ``k`` of rank ``r``
belongs to round ``k + r``, on the sender as on the receiver, which makes pass ``k - 1`` or, on the
first rank, as many passes later as there are ranks in between. In the same way gradients of
backward pass ``k`` belong to round ``k - r``. A rank makes ``2 (P - r - 1) + (V - 1) P`` forward
passes more than backward ones before both alternate, so that gradients' round ``s`` comes after
activations' round ``s + 2 (P - 1) + (V - 1) P`` on every rank alike: all ranks go through the
rounds of both kinds in one order, and so do the messages between two of them, even if there are
only two, which are each other's neighbours on both sides. What is not sent is missing at both
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


def receiving_passes(passes: Sequence[Pass], chunks: int, wraps: bool) -> list[Pass]:
    """Return the pass that each arriving tensor is for, in the order of arrival.

    Args:
        passes: of every rank, in order.
        chunks: model chunks on each rank.
        wraps: whether tensors come from the other end of the pipeline; they are then for the next
            chunk.
    """
    if wraps:
        return [(pack, chunk + 1) for pack, chunk in passes if chunk + 1 < chunks]
    return list(passes)


class PendingMessages:
    """Messages in flight. ``forward_backward_pipelining_with_interleaving`` calls ``wait``,
    perhaps several times.
    """

    def __init__(self, operations: list[dist.P2POp]):
        self._pending = dist.batch_isend_irecv(operations) if operations else []
        # Kept until they have arrived.
        self._tensors = [operation.tensor for operation in operations]

    def wait(self) -> None:
        """Wait until all are sent and received."""
        for request in self._pending:
            request.wait()
        self._pending = []
        self._tensors = []


class InterleavedP2P(P2PCommunicator):
    """Sends and receives for all model chunks of a rank. A new one is made for every step.

    megatron-core's ``forward_backward_pipelining_with_interleaving`` calls every method below but
    ``finish``. It passes tensor shapes of its own, which are not used.

    Args:
        group: the ranks of one pipeline.
        config: megatron-core's configuration of the model.
        packs: microbatches of the step.
        shape: ``shape(pack, chunk)`` returns the shape of what arrives for a pack at a chunk of
            this rank.
        first_trained: index, among all chunks of the pipeline, of the first that has anything to
            train.
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
            shape(pack, chunk) for pack, chunk in receiving_passes(passes, chunks, wraps=is_first)
        )
        self._leaving: Iterator[int] = (
            chunk for _, chunk in passes if not (is_last and chunk == chunks - 1)
        )
        # Backward passes go through the chunks from the last to the first, and count them that way.
        self._returning = (
            chunks - 1 - chunk for _, chunk in receiving_passes(passes, chunks, wraps=is_last)
        )
        indices = range(group.rank(), chunks * group.size(), group.size())
        self._gradient_arrives = [first_trained <= index for index in indices]
        # Of activations whose gradients have not arrived yet; these have the same shapes.
        self._sent = [deque[Shape]() for _ in range(chunks)]
        self._pending: list[PendingMessages] = []

    def finish(self) -> None:
        """Wait for the last messages, which the schedule does not wait for."""
        for messages in self._pending:
            messages.wait()
        self._pending = []

    def recv_forward(self, tensor_shapes: object, is_first_stage: bool) -> Tensor | None:
        """Receive the first activations."""
        return self.send_forward_recv_forward(None, not is_first_stage, tensor_shapes)

    def recv_backward(self, tensor_shapes: object, is_last_stage: bool) -> Tensor | None:
        """Receive the first gradient."""
        return self.send_backward_recv_backward(None, not is_last_stage, tensor_shapes)

    def send_forward_recv_forward(
        self,
        output_tensor: Tensor | None,
        recv_prev: bool,
        tensor_shape: object,
        overlap_p2p_comm: bool = False,
    ) -> Tensor | tuple[Tensor | None, dict[str, PendingMessages]] | None:
        """Send activations to the next rank and receive those of the next pass."""
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
    ) -> Tensor | tuple[Tensor | None, dict[str, PendingMessages]] | None:
        """Send a gradient to the previous rank and receive the next one. ``input_tensor_grad`` is
        None if nothing upstream is trained.
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
    ) -> PendingMessages:
        sent = [] if leaving is None else [dist.P2POp(dist.isend, leaving, to, self.pp_group)]
        received = (
            [] if arriving is None else [dist.P2POp(dist.irecv, arriving, source, self.pp_group)]
        )
        messages = PendingMessages(sent + received)
        if wait:
            messages.wait()
        else:
            self._pending.append(messages)
        return messages

    def _empty(self, shape: Shape) -> Tensor:
        return torch.empty(
            shape,
            requires_grad=True,
            device=torch.cuda.current_device(),
            dtype=self.config.pipeline_dtype,
        )


def _named(messages: PendingMessages, **tensors: Tensor | None) -> dict[str, PendingMessages]:
    """Return the messages under the schedule's names for sending and receiving."""
    return {name: messages for name, tensor in tensors.items() if tensor is not None}
