"""Sums of the loss weights of packs, which their index has for each reduction."""

from __future__ import annotations

import math

import numpy as np

from megavlm.data.store.pack_format import REDUCTIONS


def weight_field(reduction: str) -> str:
    """Return the index's field with the sum of loss weights."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"--data.loss_reduction {reduction}: must be one of {', '.join(REDUCTIONS)}"
        )
    return f"weight_{reduction}"


def weight_of(records: np.ndarray, reduction: str) -> float:
    """Sum the loss weights of packs, whose order does not change the result's last bit.

    Args:
        records: of the packs in the index.
        reduction: token, sample or square.
    """
    return math.fsum(records[weight_field(reduction)])
