"""Gradient norms that are still on the device: a step does not wait for its own."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from megavlm.train.bad_steps import StepError


class UncheckedNorms:
    """Keeps the norms of the steps since the last check, which a logged or saved step makes."""

    def __init__(self) -> None:
        self._norms: dict[int, tuple[list[int], Tensor]] = {}

    def add(self, step: int, packs: np.ndarray, norm: Tensor) -> None:
        """Keep the norm of an update.

        Args:
            step: its number on the console.
            packs: those that it was trained on.
            norm: of the whole gradient, a scalar on the device.
        """
        self._norms[step] = (packs.tolist(), norm)

    def check(self, newest: Tensor) -> float:
        """Wait for the norms, and forget them.

        Args:
            newest: of the last step, which may have had no update.

        Returns:
            The norm of the last update since the last check; ``newest`` if there was none.

        Raises:
            StepError: one is not finite.
        """
        if not self._norms:
            return float(newest)
        values = torch.stack([norm for _, norm in self._norms.values()]).tolist()
        for (step, (packs, _)), norm in zip(self._norms.items(), values, strict=True):
            if not math.isfinite(norm):
                raise StepError(
                    f"step {step}: the gradient's norm is {norm} on packs {packs}, and the weights"
                    " are lost since then; resume from the last checkpoint, which is from before"
                    " it, with --bad_steps.skip true, with a lower --optimizer.lr, or without these"
                    " packs"
                )
        self._norms = {}
        return values[-1]
