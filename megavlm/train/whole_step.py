"""Objectives whose loss depends on many samples of a step, by gradient caching (Gao et al., arXiv
2101.06983): batches larger than memory with exact gradients.

All microbatches run forward without gradients, and only what the last chunk ends in is kept. The
losses of as many microbatches as the objective wants at once give the gradient of each of these
outputs; then all microbatches run again, forward and backward, each with its own gradient. Both
passes compute the same, since all that is random (drop path) is part of the batch. If the objective
wants one microbatch at a time (a step may have no more), one pass is enough.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megavlm.data.loading.batch import Batch
from megavlm.model.loss import weighted_sum
from megavlm.model.objective.losses import Losses
from megavlm.model.objective.objective import Objective, Output
from megavlm.model.objective.stand_ins import stand_in_for
from megavlm.parallel.backend import Backend
from megavlm.train.meters import Meter
from megavlm.train.microbatches import Microbatches
from megavlm.train.pipeline import on_device, run_pipeline

_LossFrom = Callable[[int, Sequence[Output]], Tensor]
"""Makes the part of the loss that some packs have, of the number of the first and of what they
ended in.
"""
_Gradients = tuple[Tensor | None, ...]


def run_whole_step(
    model: Sequence[DistributedDataParallel],
    step: Microbatches,
    backend: Backend,
    *,
    forward_only: bool = False,
    meters: Sequence[Meter] = (),
) -> Tensor:
    """Run a step, backward too unless ``forward_only``. Collective.

    Args:
        model: this rank's chunks.
        step: its packs.
        backend: where tensors live.
        forward_only: no gradients.
        meters: observe the losses.

    Returns:
        This rank's part of the loss; 0 but in the last chunk.
    """
    packs = list(on_device(islice(step.batches, step.count), backend))
    objective = model[-1].module.objective
    at_once = objective.packs_at_once(len(packs))

    def loss_from(first: int, outputs: Sequence[Output]) -> Tensor:
        here = slice(first, first + len(outputs))
        of_ranks = [of_rank[here] for of_rank in step.samples]
        losses = objective.step_losses(outputs, packs[here], of_ranks)
        return _weighed(losses, packs[here], step.weight, meters)

    if at_once == 1:
        numbers = itertools.count()
        return run_pipeline(
            model,
            iter(packs),
            len(packs),
            lambda batch, output: loss_from(next(numbers), [output]),
            backend,
            forward_only=forward_only,
        )
    outputs = outputs_of(model, iter(packs), len(packs), backend)
    starts = range(0, len(outputs), at_once)
    loss = torch.zeros((), device=backend.device)
    if forward_only:
        with torch.no_grad():
            found = [loss_from(first, outputs[first : first + at_once]) for first in starts]
        return torch.stack([loss, *found]).sum()
    gradients: deque[_Gradients] = deque()
    of_parameters = _zeros(_gathered_parameters(model[-1]))
    for first in starts:
        some = outputs[first : first + at_once]
        loss += _keep_gradients(first, some, loss_from, objective, gradients, of_parameters)
    _run_again(model, packs, gradients, of_parameters, backend)
    return loss


def _gathered_parameters(chunk: DistributedDataParallel) -> list[torch.nn.Parameter]:
    """Return the objective's ``loss_parameters`` when this rank holds their updated values;
    collective. Otherwise the hook waits that ``DistributedDataParallel.enable_forward_pre_hook`` of
    megatron-core puts before each module, but it does not know the stand-ins that
    ``Objective.call`` gives a module.
    """
    parameters = chunk.module.objective.loss_parameters
    if chunk.ddp_config.overlap_param_gather:
        for parameter in parameters:
            chunk.param_to_bucket_group[parameter].finish_param_sync()
    return parameters


def _zeros(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return zeros of the shapes of parameters, float32: a sum then does not depend on how many
    packs and pools it is made of.
    """
    return [torch.zeros_like(one, dtype=torch.float32) for one in parameters]


def _parts(output: Output) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _weighed(
    losses: Sequence[Losses],
    packs: Sequence[Batch],
    weight_of_step: float,
    meters: Sequence[Meter],
) -> Tensor:
    """Return the part of the loss that the packs of a rank have, after the meters have seen it."""
    parts = []
    for found, batch in zip(losses, packs, strict=True):
        for meter in meters:
            meter.add(found, batch, weight_of_step)
        parts.append(weighted_sum(found.total, batch.loss_weights))
    return torch.stack(parts).sum() / weight_of_step


@torch.no_grad()
def outputs_of(
    model: Sequence[DistributedDataParallel],
    batches: Iterator[Batch],
    count: int,
    backend: Backend,
) -> list[Output]:
    """Run packs forward; return what each ends in, on ranks with the last chunk. Arguments as of
    ``run_pipeline``.
    """
    outputs: list[Output] = []

    def keep(batch: Batch, output: Output) -> Tensor:
        kept = tuple(part.detach() for part in _parts(output))
        outputs.append(kept if isinstance(output, tuple) else kept[0])
        return kept[0].sum()

    run_pipeline(model, batches, count, keep, backend, forward_only=True)
    return outputs


def _keep_gradients(
    first: int,
    outputs: Sequence[Output],
    loss_from: _LossFrom,
    objective: Objective,
    gradients: deque[_Gradients],
    of_parameters: Sequence[Tensor],
) -> Tensor:
    """Compute the loss of some packs, append the gradients of what they ended in, and add those of
    the objective's own parameters.

    Args:
        first: number of the first pack.
        outputs: of the packs.
        loss_from: makes the loss.
        objective: whose ``loss_parameters`` the loss reads.
        gradients: of each pack's outputs, appended to.
        of_parameters: of ``loss_parameters``, added to.

    Returns:
        the loss, without a gradient.
    """
    for output in outputs:
        for part in _parts(output):
            part.requires_grad_()
    leaves = [part for output in outputs for part in _parts(output)]
    stand_ins = [stand_in_for(parameter) for parameter in objective.loss_parameters]
    with objective.gradients_to(stand_ins):
        loss = loss_from(first, outputs)
        found = torch.autograd.grad(loss, [*leaves, *stand_ins], allow_unused=True)
    each = iter(found)
    gradients.extend(tuple(islice(each, len(_parts(output)))) for output in outputs)
    for total, gradient in zip(of_parameters, each, strict=True):
        if gradient is not None:
            total += gradient
    return loss.detach()


def _run_again(
    model: Sequence[DistributedDataParallel],
    packs: Sequence[Batch],
    gradients: deque[_Gradients],
    of_parameters: Sequence[Tensor],
    backend: Backend,
) -> None:
    """Run packs forward and backward, each with the gradients of what it ends in."""
    objective = model[-1].module.objective

    def loss(batch: Batch, output: Output) -> Tensor:
        is_first = len(gradients) == len(packs)
        return _linear_in(_parts(output), gradients.popleft(), objective, of_parameters, is_first)

    run_pipeline(model, iter(packs), len(packs), loss, backend)


def _linear_in(
    output: Sequence[Tensor],
    gradients: _Gradients,
    objective: Objective,
    of_parameters: Sequence[Tensor],
    is_first: bool,
) -> Tensor:
    """Return a number whose gradient is the given one: of the output, and of the objective's own
    parameters with the first microbatch; DDP waits for them with the last.
    """
    total = torch.zeros((), device=output[0].device)
    for part, gradient in zip(output, gradients, strict=True):
        if gradient is not None:
            total = total + (part * gradient).sum()
    for parameter, given in zip(objective.loss_parameters, of_parameters, strict=True):
        wide = parameter.float()  # the gradient is rounded once, behind the sum
        total = total + (wide * (given if is_first else torch.zeros_like(given))).sum()
    return total
