"""What an objective gives for a microbatch: its losses by name, and readings beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

Reading = tuple[Tensor, Tensor]
"""A sum and a count, scalars on the device: over microbatches and ranks both are added up, and the
figure that is logged is their quotient.
"""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of a microbatch on a rank.

    Args:
        total: what is trained, for each token [T].
        named: the losses that the total is made of, for each token [T], without their weights; none
            if the objective has one loss.
        readings: figures that are logged beside them, such as an accuracy.
    """

    total: Tensor
    named: Mapping[str, Tensor] = field(default_factory=dict)
    readings: Mapping[str, Reading] = field(default_factory=dict)

    @classmethod
    def weighted(
        cls,
        named: Mapping[str, Tensor],
        weights: Mapping[str, float],
        readings: Mapping[str, Reading] | None = None,
    ) -> Losses:
        """Make the total of several losses: their sum, each times its weight.

        Args:
            named: the losses of each token [T], one or more.
            weights: of the same names, see ``ObjectiveNeeds.losses``.
            readings: by name.
        """
        first, *others = (loss * weights[name] for name, loss in named.items())
        return cls(total=sum(others, first), named=named, readings=readings or {})
