"""Packs through the pipeline: megatron-core's schedules with this package's communicators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megavlm.data.loading.batch import Batch
from megavlm.model.tied import sum_tied_gradients
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel.backend import Backend
from megavlm.parallel.p2p import Shape, SharedBatches, VariableShapeP2P
from megavlm.parallel.p2p_interleaved import InterleavedP2P

LossOf = Callable[[Batch, Tensor], Tensor]
"""Makes the part of the loss that a pack has, a scalar, of the pack and of what the last chunk
ended in.
"""


def _finalize(
    model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **kwargs
) -> None:
    """Finish the gradients without dividing them: the loss is already divided by the weight of the
    step.
    """
    finalize_model_grads(model, None, **kwargs)
    for chunk in model:
        chunk.module.finish_gradients()
    sum_tied_gradients([chunk.module for chunk in model])


def set_schedule_hooks(model: Sequence[DistributedDataParallel]) -> None:
    """Tell megatron-core's pipeline schedules how gradients are finished after the last backward
    pass, and when not to sum them yet. They read the configuration of a rank's first chunk.
    """
    config = model[0].config
    overlaps = model[0].ddp_config.overlap_grad_reduce
    config.finalize_model_grads_func = _finalize
    no_syncs = [chunk.no_sync for chunk in model] if overlaps else [None]
    config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]


def _as_asked(loss: LossOf, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what megatron-core's ``forward_step_calc_loss`` asks for: the loss of a pack, a count
    of tokens (an integer, which could not carry our weights, and so is not used), and a copy of the
    loss.
    """
    found = loss(batch, output)
    return found, torch.zeros((), dtype=torch.int, device=found.device), found.detach()


def on_device(batches: Iterator[Batch], backend: Backend) -> Iterator[Batch]:
    """Yield batches on the device, for whose copies the host does not wait where it need not."""
    for batch in batches:
        yield batch.to(backend.device, non_blocking=backend.asynchronous)


def run_pipeline(
    model: Sequence[DistributedDataParallel],
    batches: Iterator[Batch],
    count: int,
    loss: LossOf,
    backend: Backend,
    *,
    forward_only: bool = False,
    with_loss: bool = True,
) -> Tensor:
    """Run ``count`` packs through the pipeline, backward too unless ``forward_only``.

    Args:
        model: this rank's chunks.
        batches: packs of this data-parallel rank, in order.
        count: packs to take; a multiple of the pipeline's ranks where each has several chunks.
        loss: called for each pack, in their order, on ranks with the last chunk.
        backend: where tensors live.
        forward_only: no gradients.
        with_loss: end in losses, otherwise in the logits of ``Batch.loss_positions``.

    Returns:
        Sum of the losses; 0 but in the last chunk.
    """

    def forward_step(iterator: Iterator[Batch], chunk: VisionLanguageModel):
        batch = next(iterator)
        output = chunk(batch, with_loss=with_loss, only_loss_positions=not with_loss)
        return output, partial(_as_asked, loss, batch)

    # megatron-core does so only if the language model has a recipe for FP8.
    for module in (module for chunk in model for module in chunk.modules()):
        if "is_first_microbatch" in vars(module):
            module.is_first_microbatch = True
    chunks = [chunk.module for chunk in model]
    groups = chunks[0].groups
    packs = SharedBatches(on_device(batches, backend), len(chunks))
    communicator = None
    between: dict[str, Any] = {}
    if groups.pipeline_size > 1:
        communicator = _communicator(chunks, packs, count)
        between = {"p2p_communicator": communicator, "pg_collection": groups.collection}
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[packs.reader(number) for number in range(len(chunks))],
        model=list(model),
        num_microbatches=count,
        seq_length=1,  # not used: the communicator computes the shapes
        micro_batch_size=1,
        forward_only=forward_only,
        **between,
    )
    if isinstance(communicator, InterleavedP2P):
        communicator.finish()
    return torch.stack(losses).sum() if losses else torch.zeros((), device=backend.device)


def _communicator(
    chunks: Sequence[VisionLanguageModel], packs: SharedBatches[Batch], count: int
) -> VariableShapeP2P | InterleavedP2P:
    """Make what sends and receives for this rank's model chunks, in a step of ``count`` packs."""

    def shape(pack: int, chunk: int) -> Shape:
        return chunks[chunk].received_shape(packs.peek(pack))

    first = chunks[0]
    group = chunks[0].groups.collection.pp
    if len(chunks) > 1:
        return InterleavedP2P(group, first.config, count, shape, first.first_trained)
    return VariableShapeP2P(
        group, first.config, (shape(pack, 0) for pack in range(count)), first.first_trained
    )
