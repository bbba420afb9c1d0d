"""How near two models are, and whether that is near enough."""

from __future__ import annotations

from dataclasses import dataclass

# Largest difference of two logits that is accepted, as a share of the largest logit (at least 1).
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near two models are.

    Args:
        samples: samples compared.
        tokens: positions compared.
        max_abs_difference: largest difference between two finite logits.
        largest_logit: largest absolute value of a finite logit of the checkpoint.
        equal_choices: positions at which both rank the same token first.
        not_finite: positions at which a logit of either model is NaN or infinite.
        dtype: both models computed in.
        checkpoint: folder of the step that was compared.
        choices: choices of experts, of one token in one layer each; 0: there are no experts.
        other_choices: those that differ. The checkpoint's model then takes those of transformers.
        largest_shortfall: most that the score of such an expert is below that of an own choice, as
            a share of the highest score.
    """

    samples: int
    tokens: int
    max_abs_difference: float
    largest_logit: float
    equal_choices: int
    not_finite: int
    dtype: str
    checkpoint: str
    choices: int = 0
    other_choices: int = 0
    largest_shortfall: float = 0.0

    def failures(self, limit: float | None = None) -> list[str]:
        """Return what is wrong, one sentence each; an empty list: the models are the same.

        Args:
            limit: largest accepted difference of two logits; None: that of ``LIMITS``.
        """
        if limit is None:
            limit = LIMITS[self.dtype] * max(1.0, self.largest_logit)
        if self.tokens == 0:
            return ["no position was compared"]
        wrong = []
        if self.not_finite:
            wrong.append(
                f"{self.not_finite} of {self.tokens} positions have NaN or infinite logits"
            )
        if not self.largest_shortfall <= LIMITS[self.dtype]:
            wrong.append(
                f"a router chose an expert whose score is lower by {self.largest_shortfall:.2e} of"
                f" the highest, limit {LIMITS[self.dtype]:.2e}"
            )
        if not self.max_abs_difference <= limit:
            text = f"logits differ by up to {self.max_abs_difference:.2e}, limit {limit:.2e}"
            if self.dtype != "float32":
                text += f"; rounding to {self.dtype} may do that: compare in float32 (--dtype)"
            wrong.append(text)
        return wrong
