"""Settings of the loss over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.config.differences import changed


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Cross-entropy over the vocabulary.

    Args:
        vocabulary_block: compute head and loss for this many words of the vocabulary at a time, on
            each rank, such as 8192, so that the logits are never whole; the backward pass computes
            them again. 0: all at once.
        label_smoothing: share of a label's probability that goes to all words alike, in training.
        z_loss: weight of the squared logarithm of the softmax's denominator, such as 1e-4, in
            training.
    """

    vocabulary_block: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def is_by_block(self) -> bool:
        """Whether head and loss are computed together, block by block."""
        return self != Loss()


def loss_problems(loss: Loss, objective: str, *, has_vocabulary: bool) -> Iterator[str]:
    """Name the settings of the loss that cannot be used.

    Args:
        loss: the settings.
        objective: name of the objective.
        has_vocabulary: whether the objective ends in logits over the vocabulary.
    """
    if loss.vocabulary_block < 0:
        yield f"--loss.vocabulary_block {loss.vocabulary_block}: must be 0 or more"
    if not 0 <= loss.label_smoothing < 1:
        yield f"--loss.label_smoothing {loss.label_smoothing}: must be 0 or more, and less than 1"
    if not 0 <= loss.z_loss < float("inf"):
        yield f"--loss.z_loss {loss.z_loss}: must be 0 or more"
    if loss.is_by_block and not has_vocabulary:
        yield (
            f"--loss.{next(iter(changed(loss)))} has no effect: --architecture.objective"
            f" {objective} has no head over the vocabulary; leave it out"
        )
