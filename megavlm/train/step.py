"""One optimizer update: microbatches forward and backward through the pipeline, then AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megavlm.data.loading.batch import Batch
from megavlm.model.loss import weighted_sum
from megavlm.model.objective.objective import Objective
from megavlm.model.tied import sum_tied_gradients
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel.backend import Backend
from megavlm.parallel.p2p import Shape, SharedBatches, VariableShapeP2P
from megavlm.parallel.p2p_interleaved import InterleavedP2P
from megavlm.train.meters import Meter
from megavlm.train.optimizer import step


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an update tells.

    Args:
        loss: this rank's part of the loss (0 but in the last chunk); the sum over data-parallel
            ranks is the loss of the step.
        grad_norm: norm of the whole gradient before clipping. Both are scalars on the device, for
            which nobody has waited yet.
    """

    loss: Tensor
    grad_norm: Tensor


def _finalize(
    model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **kwargs
) -> None:
    """Finish the gradients without dividing them: the loss is already divided by the weight of the
    step.
    """
    finalize_model_grads(model, None, **kwargs)
    for chunk in model:
        chunk.module.sum_gradients()
    sum_tied_gradients([chunk.module for chunk in model])


def prepare(model: Sequence[DistributedDataParallel]) -> None:
    """Tell megatron-core's schedules, which ask a rank's first chunk, how gradients are finished,
    and when not to sum them yet.
    """
    config = model[0].config
    overlaps = model[0].ddp_config.overlap_grad_reduce
    config.finalize_model_grads_func = _finalize
    no_syncs = [chunk.no_sync for chunk in model] if overlaps else [None]
    config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]


def _loss(
    objective: Objective,
    batch: Batch,
    weight_of_step: float,
    meters: Sequence[Meter],
    output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of a pack from what its last chunk ended in, megatron-core's count of tokens
    (an integer, which could not carry our weights, and so is not used), and a copy of the loss.
    """
    losses = objective.losses(output, batch)
    for meter in meters:
        meter.add(losses, batch, weight_of_step)
    loss = weighted_sum(losses, batch.loss_weights) / weight_of_step
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach()


def run_packs(
    model: Sequence[DistributedDataParallel],
    batches: Iterator[Batch],
    count: int,
    weight_of_step: float,
    backend: Backend,
    *,
    forward_only: bool = False,
    meters: Sequence[Meter] = (),
) -> Tensor:
    """Run ``count`` packs through the pipeline, backward too unless ``forward_only``.

    Args:
        model: this rank's chunks.
        batches: packs of this data-parallel rank, in order.
        count: packs to take; a multiple of the pipeline's ranks where each has several chunks.
        weight_of_step: sum of the loss weights of all packs of the step, over all ranks.
        backend: where tensors live.
        forward_only: no gradients.
        meters: observe the losses.

    Returns:
        This rank's part of the loss; 0 but in the last chunk.
    """

    def forward_step(iterator: Iterator[Batch], chunk: VisionLanguageModel):
        batch = next(iterator)
        objective = model[-1].module.objective
        return chunk(batch), partial(_loss, objective, batch, weight_of_step, meters)

    for module in (module for chunk in model for module in chunk.modules()):
        if "is_first_microbatch" in vars(
            module
        ):  # megatron-core does so only where the language model has a recipe for FP8
            module.is_first_microbatch = True
    chunks = [chunk.module for chunk in model]
    groups = model[0].module.groups
    packs = SharedBatches(
        (batch.to(backend.device, non_blocking=backend.asynchronous) for batch in batches),
        len(chunks),
    )
    communicator = _communicator(chunks, packs, count) if groups.pipeline_size > 1 else None
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[packs.reader(number) for number in range(len(chunks))],
        model=list(model),
        num_microbatches=count,
        seq_length=1,  # not used: the communicator computes the shapes
        micro_batch_size=1,
        forward_only=forward_only,
        **(
            {"p2p_communicator": communicator, "pg_collection": groups.collection}
            if communicator is not None
            else {}
        ),
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


def train_step(
    model: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: Iterator[Batch],
    count: int,
    weight_of_step: float,
    clip_grad: float,
    backend: Backend,
    meters: Sequence[Meter] = (),
) -> StepResult:
    """Update the parameters once; arguments as in ``run_packs`` and ``optimizer.step``."""
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    loss = run_packs(model, batches, count, weight_of_step, backend, meters=meters)
    return StepResult(loss=loss, grad_norm=step(optimizer, clip_grad, backend.device))
