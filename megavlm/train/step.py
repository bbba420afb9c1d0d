"""One step: microbatches forward and backward through the pipeline, then the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megavlm.data.loading.batch import Batch
from megavlm.model.loss import weighted_sum
from megavlm.model.router import end_step
from megavlm.parallel.backend import Backend
from megavlm.train.build_model import BuiltModel
from megavlm.train.meters import Meter
from megavlm.train.microbatches import Microbatches
from megavlm.train.optimizer import prepare_gradient, update_weights
from megavlm.train.pipeline import run_pipeline
from megavlm.train.whole_step import run_whole_step


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an update tells.

    Args:
        loss: this rank's part of the loss (0 but in the last chunk); the sum over data-parallel
            ranks is the loss of the step.
        grad_norm: norm of the whole gradient before clipping. Both are scalars on the device, for
            which nobody has waited yet.
        is_skipped: whether the parameters were not updated.
    """

    loss: Tensor
    grad_norm: Tensor
    is_skipped: bool


def run_packs(
    model: Sequence[DistributedDataParallel],
    packs: Microbatches,
    backend: Backend,
    *,
    forward_only: bool = False,
    meters: Sequence[Meter] = (),
) -> Tensor:
    """Run packs through the pipeline, backward too unless ``forward_only``.

    Args:
        model: this rank's chunks.
        packs: of the step.
        backend: where tensors live.
        forward_only: no gradients.
        meters: observe the losses.

    Returns:
        This rank's part of the loss; 0 but in the last chunk.
    """
    objective = model[-1].module.objective

    def loss(batch: Batch, output: Tensor) -> Tensor:
        weight = packs.weight_of_pack(batch) if packs.weight_of_pack else packs.weight
        losses = objective.losses(output, batch)
        for meter in meters:
            meter.add(losses, batch, weight)
        return weighted_sum(losses.total, batch.loss_weights) / weight

    return run_pipeline(model, packs.batches, packs.count, loss, backend, forward_only=forward_only)


def train_step(
    built: BuiltModel,
    packs: Microbatches,
    clip_grad: float,
    backend: Backend,
    *,
    meters: Sequence[Meter] = (),
    skips: Callable[[Tensor, Tensor], bool] | None = None,
) -> StepResult:
    """Update the parameters once.

    Args:
        built: the model of this rank.
        packs: of the step.
        clip_grad: the largest norm of the gradient, as for ``update_weights``.
        backend: where tensors live.
        meters: observe the losses.
        skips: decides from the loss and the gradient norm, before the update, whether there is
            none, alike on all ranks; it may wait for the device. None: every step has an update.
    """
    for ddp_chunk in built.ddp_chunks:
        ddp_chunk.zero_grad_buffer()
    built.optimizer.zero_grad()
    run = run_whole_step if built.chunks[-1].objective.spans_step else run_packs
    loss = run(built.ddp_chunks, packs, backend, meters=meters)
    gradient = prepare_gradient(built.optimizer, built.part_norms.sums, backend.device)
    is_skipped = skips is not None and skips(loss, gradient.norm)
    if not is_skipped:
        update_weights(built.optimizer, gradient, clip_grad)
        built.part_norms.keep(gradient.by_part)
    for chunk in built.chunks:
        chunk.objective.after_step(is_skipped)
    end_step([router for chunk in built.chunks for router in chunk.routers], is_skipped)
    return StepResult(loss=loss, grad_norm=gradient.norm, is_skipped=is_skipped)
