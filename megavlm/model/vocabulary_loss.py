"""The head over the vocabulary and its cross-entropy together, a block of the vocabulary at a time,
so that no more logits than those of one block exist.

Forward keeps the logarithm of the softmax's denominator for each token; backward computes the
logits of each block again. A row of the head belongs to one block, so its gradient is one matrix
product, as it is without blocks.

Shape letters: P tokens with a loss, D hidden size, V rows of the vocabulary on this rank, B rows of
a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What the loss of a token is made of.

    Args:
        block: rows of the vocabulary at a time.
        rows: of this rank, without padding.
        first_row: number of this rank's first row in the whole vocabulary.
        vocabulary: rows of the whole vocabulary, without padding.
        smoothing: share of the label's probability that goes to all words alike (Szegedy et al.,
            arXiv 1512.00567), as ``torch.nn.functional.cross_entropy`` has it.
        z_loss: weight of the square of the log-denominator (Chowdhery et al., arXiv 2204.02311).
        softcap: bound of the logits, c, which become c tanh(x / c) (Gemma 2, arXiv 2408.00118); 0:
            none.
    """

    block: int
    rows: int
    first_row: int = 0
    vocabulary: int
    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


def vocabulary_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    terms: LossTerms,
    group: ProcessGroup,
    *,
    sums_gradient: bool = True,
) -> Tensor:
    """Return the loss of each token, float32 [P].

    Args:
        hidden: what the head reads [P, D], the same on all ranks of ``group``.
        head: this rank's rows of the head [V, D].
        labels: int64 [P].
        terms: of the loss.
        group: tensor-parallel ranks that share the vocabulary.
        sums_gradient: sum the gradient of ``hidden`` over the ranks.
    """
    if sums_gradient:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    return _VocabularyLoss.apply(hidden, head, labels, terms, group)


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, head: Tensor, labels: Tensor, terms: LossTerms, group: ProcessGroup
    ) -> Tensor:
        labels = labels - terms.first_row
        options = dict(dtype=torch.float32, device=hidden.device)
        largest = torch.full((len(hidden),), float("-inf"), **options)
        denominators = torch.zeros(len(hidden), **options)
        # The logit of the label, and the sum of all.
        sums = torch.zeros(2, len(hidden), **options)
        for start, rows in _blocks(head, terms):
            logits = _logits(hidden, rows, terms)
            _pick(logits, labels - start, sums[0])
            if terms.smoothing:
                sums[1] += logits.sum(dim=1)
            before = largest
            largest = torch.maximum(before, logits.amax(dim=1))
            denominators *= (before - largest).exp()
            denominators += logits.sub_(largest[:, None]).exp_().sum(dim=1)
        if group.size() > 1:
            own = largest
            largest = own.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            denominators *= (own - largest).exp()
            dist.all_reduce(denominators, group=group)
            dist.all_reduce(sums, group=group)
        logs = denominators.log() + largest
        losses = logs - (1 - terms.smoothing) * sums[0]
        if terms.smoothing:
            losses -= terms.smoothing / terms.vocabulary * sums[1]
        if terms.z_loss:
            losses += terms.z_loss * logs.square()
        ctx.save_for_backward(hidden, head, labels, logs)
        ctx.terms = terms
        return losses

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, head, labels, logs = ctx.saved_tensors
        terms = ctx.terms
        needs_hidden, needs_head, *_ = ctx.needs_input_grad
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        of_head = torch.empty_like(head) if needs_head else None
        if of_head is not None:
            of_head[terms.rows :] = 0
        gradient = gradient.float()
        of_softmax = gradient * (1 + 2 * terms.z_loss * logs)
        of_label = (terms.smoothing - 1) * gradient
        for start, rows in _blocks(head, terms):
            found = _logits(hidden, rows, terms)
            # The derivative of the soft cap at each logit.
            slopes = 1 - (found / terms.softcap).square_() if terms.softcap else None
            found.sub_(logs[:, None]).exp_().mul_(of_softmax[:, None])
            if terms.smoothing:
                found -= (terms.smoothing / terms.vocabulary * gradient)[:, None]
            _add(found, labels - start, of_label)
            if slopes is not None:
                found *= slopes
            found = found.to(hidden.dtype)
            if of_head is not None:
                torch.mm(found.T, hidden, out=of_head[start : start + len(rows)])
            if of_hidden is not None:
                of_hidden += found @ rows
        of_hidden = None if of_hidden is None else of_hidden.to(hidden.dtype)
        return of_hidden, of_head, None, None, None


def _logits(hidden: Tensor, rows: Tensor, terms: LossTerms) -> Tensor:
    """Compute the logits of a block, float32 [P, B]."""
    logits = (hidden @ rows.T).float()
    return logits.div_(terms.softcap).tanh_().mul_(terms.softcap) if terms.softcap else logits


def _blocks(head: Tensor, terms: LossTerms) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the rows of each block, without padding."""
    for start in range(0, terms.rows, terms.block):
        yield start, head[start : min(start + terms.block, terms.rows)]


def _columns_inside(values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return which columns are inside [P, B], and columns that all are."""
    is_inside = (columns >= 0) & (columns < values.shape[1])
    return is_inside, columns.clamp(0, values.shape[1] - 1)[:, None]


def _pick(values: Tensor, columns: Tensor, into: Tensor) -> None:
    """Add the value [P, B] in each row's column to ``into`` [P], if the column is inside."""
    is_inside, columns = _columns_inside(values, columns)
    into += torch.where(is_inside, values.gather(1, columns)[:, 0], 0.0)


def _add(values: Tensor, columns: Tensor, what: Tensor) -> None:
    """Add ``what`` [P] to the value [P, B] in each row's column, if the column is inside."""
    is_inside, columns = _columns_inside(values, columns)
    values.scatter_add_(1, columns, torch.where(is_inside, what, 0.0)[:, None])
