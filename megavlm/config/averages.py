"""Settings of the moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Ema:
    """An exponential moving average of the trained parameters, kept beside them in float32.

    Args:
        decay: share of the average that stays at each update, such as 0.999; 0: no average.
        warmup: in early updates, let no more stay than (1 + n) / (10 + n) after n updates, so that
            the first parameters do not weigh for long.
        evaluate: measure validation loss and tasks with the average.
        export: write the average to ``checkpoint.export_hf``.
    """

    decay: float = 0.0
    warmup: bool = False
    evaluate: bool = False
    export: bool = False

    def decay_at(self, updates: int) -> float:
        """Return the share that stays at an update.

        Args:
            updates: that were done before it.
        """
        most = (1 + updates) / (10 + updates)
        return min(self.decay, most) if self.warmup else self.decay


def ema_problems(config: Any) -> Iterator[str]:
    """Name the settings of the average that cannot be used, or would have no effect.

    Args:
        config: ``schema.Config``.
    """
    ema = config.ema
    if not 0 <= ema.decay < 1:
        yield f"--ema.decay {ema.decay}: must be 0 or more, and less than 1, such as 0.999"
    if ema.export and not config.checkpoint.export_hf:
        yield "--ema.export true needs --checkpoint.export_hf, the folder for the model"
    if ema.evaluate and not (config.data.valid or config.eval.tasks):
        yield "--ema.evaluate true needs --data.valid or --eval.tasks: there is nothing to measure"
    if ema.decay and config.optimizer.moments == "bfloat16":
        yield (
            f"--ema.decay {ema.decay}: with --optimizer.moments bfloat16 Transformer Engine keeps"
            " the master weights to itself; use float32"
        )
