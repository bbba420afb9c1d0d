"""Objectives whose loss depends on all samples of a step, by gradient caching (Gao et al., arXiv
2101.06983): batches larger than memory with exact gradients.

All microbatches run forward without gradients, and only what the last chunk ends in is kept. The
loss of the whole step gives the gradient of each of these outputs; then all microbatches run again,
forward and backward, each with its own gradient. Both passes compute the same, since all that is
random (drop path) is part of the batch. A step of one microbatch needs one pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megavlm.data.loading.batch import Batch
from megavlm.model.loss import weighted_sum
from megavlm.model.objective.losses import Losses
from megavlm.model.objective.objective import Objective
from megavlm.parallel.backend import Backend
from megavlm.train.meters import Meter
from megavlm.train.pipeline import run_pipeline


def run_whole_step(
    model: Sequence[DistributedDataParallel],
    batches: Iterator[Batch],
    count: int,
    weight_of_step: float,
    samples: Sequence[int],
    backend: Backend,
    *,
    forward_only: bool = False,
    meters: Sequence[Meter] = (),
) -> Tensor:
    """Run a step of ``count`` packs, backward too unless ``forward_only``. Collective.

    Args:
        model: this rank's chunks.
        batches: packs of this data-parallel rank, in order.
        count: packs to take.
        weight_of_step: sum of the loss weights of all packs of the step, over all ranks.
        samples: of each data-parallel rank in this step.
        backend: where tensors live.
        forward_only: no gradients.
        meters: observe the losses.

    Returns:
        This rank's part of the loss; 0 but in the last chunk.
    """
    packs = [batch.to(backend.device) for batch in islice(batches, count)]
    objective = model[-1].module.objective
    has_last = model[-1].module.post_process

    def step_loss(outputs: Sequence[Tensor]) -> Tensor:
        losses = objective.step_losses(outputs, packs, samples)
        return _weighed(losses, packs, weight_of_step, meters)

    if count == 1 and not forward_only:
        return run_pipeline(
            model, iter(packs), count, lambda batch, output: step_loss([output]), backend
        )
    outputs = _forward(model, packs, backend)
    if forward_only:
        with torch.no_grad():
            return step_loss(outputs) if has_last else torch.zeros((), device=backend.device)
    loss = torch.zeros((), device=backend.device)
    gradients: deque[Tensor] = deque()
    of_parameters: tuple[Tensor, ...] = ()
    if has_last:
        leaves = [output.requires_grad_() for output in outputs]
        whole = step_loss(leaves)
        found = torch.autograd.grad(whole, [*leaves, *objective.loss_parameters])
        loss = whole.detach()
        gradients.extend(found[: len(leaves)])
        of_parameters = found[len(leaves) :]

    def with_gradient(batch: Batch, output: Tensor) -> Tensor:
        is_first = len(gradients) == count
        return _linear_in(output, gradients.popleft(), objective, of_parameters, is_first)

    run_pipeline(model, iter(packs), count, with_gradient, backend)
    return loss


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
def _forward(
    model: Sequence[DistributedDataParallel], packs: Sequence[Batch], backend: Backend
) -> list[Tensor]:
    """Run packs forward; return what each ends in, on ranks with the last chunk."""
    outputs: list[Tensor] = []

    def keep(batch: Batch, output: Tensor) -> Tensor:
        outputs.append(output.detach())
        return output.sum()

    run_pipeline(model, iter(packs), len(packs), keep, backend, forward_only=True)
    return outputs


def _linear_in(
    output: Tensor,
    gradient: Tensor,
    objective: Objective,
    of_parameters: Sequence[Tensor],
    is_first: bool,
) -> Tensor:
    """Return a number whose gradient is the given one: of the output, and of the objective's own
    parameters with the first microbatch; DDP waits for them with the last.
    """
    total = (output * gradient).sum()
    for parameter, given in zip(objective.loss_parameters, of_parameters, strict=True):
        total = total + (parameter * (given if is_first else torch.zeros_like(given))).sum()
    return total
