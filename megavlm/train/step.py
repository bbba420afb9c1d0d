"""One step: microbatches forward and backward through the pipeline, then the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megavlm.data.loading.batch import Batch
from megavlm.model.loss import weighted_sum
from megavlm.model.objective.objective import Objective
from megavlm.model.router import end_step
from megavlm.model.tied import sum_tied_gradients
from megavlm.parallel.backend import Backend
from megavlm.train.meters import Meter
from megavlm.train.microbatches import Microbatches
from megavlm.train.optimizer import prepare_gradient, update_weights
from megavlm.train.part_norms import PartNorms
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
    is_skipped: bool = False


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


def _loss(
    objective: Objective,
    batch: Batch,
    weight_of_step: float,
    meters: Sequence[Meter],
    output: Tensor,
) -> Tensor:
    """Return the part of the loss that a pack has, from what its last chunk ended in."""
    losses = objective.losses(output, batch)
    for meter in meters:
        meter.add(losses, batch, weight_of_step)
    return weighted_sum(losses.total, batch.loss_weights) / weight_of_step


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
        return _loss(objective, batch, weight, meters, output)

    return run_pipeline(model, packs.batches, packs.count, loss, backend, forward_only=forward_only)


def train_step(
    model: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    packs: Microbatches,
    clip_grad: float,
    backend: Backend,
    *,
    meters: Sequence[Meter] = (),
    skips: Callable[[Tensor, Tensor], bool] | None = None,
    part_norms: PartNorms | None = None,
) -> StepResult:
    """Update the parameters once.

    Args:
        model: this rank's chunks.
        optimizer: of their trained parameters.
        packs: of the step.
        clip_grad: the largest norm of the gradient, as for ``update_weights``.
        backend: where tensors live.
        meters: observe the losses.
        skips: decides from the loss and the gradient norm, before the update, whether there is
            none, alike on all ranks; it may wait for the device. None: every step has an update.
        part_norms: gets the norms of the gradient by part.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    run = run_whole_step if model[-1].module.objective.spans_step else run_packs
    loss = run(model, packs, backend, meters=meters)
    gradient = prepare_gradient(optimizer, backend.device, part_norms.sums if part_norms else None)
    is_skipped = skips is not None and skips(loss, gradient.norm)
    if not is_skipped:
        update_weights(optimizer, gradient, clip_grad)
        if part_norms is not None:
            part_norms.keep(gradient.by_part)
        for chunk in model:
            chunk.module.objective.after_step()
    end_step([router for chunk in model for router in chunk.module.routers], is_skipped)
    return StepResult(loss=loss, grad_norm=gradient.norm, is_skipped=is_skipped)
