"""What a recipe is: training stages, and the format that its models are exported in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megavlm.config.schema import Optimizer, Training


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage sets; whatever it leaves alone keeps the schema's value.

    Args:
        description: one line, for people.
        loss_reduction: how supervised tokens weigh, as ``--data.loss_reduction``.
        optimizer: learning rate, weight decay and so on.
        training: trained parts, batch size, steps.
    """

    description: str
    loss_reduction: Literal["token", "sample", "square"] = "square"
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How models of a kind are trained.

    Args:
        name: value of ``--recipe``.
        description: one line, for people.
        stages: by the value of ``--stage``, in the order of training.
        export_dialect: format that a trained model is exported in, unless another one is asked for.
    """

    name: str
    description: str
    stages: Mapping[str, Stage]
    export_dialect: Literal["native", "chat"] = "native"

    def stage(self, name: str) -> Stage:
        """Return the stage ``name``.

        Raises:
            ValueError: the recipe has no such stage; the message lists the names.
        """
        if name not in self.stages:
            raise ValueError(
                f"--stage {name}: no such stage of recipe {self.name}; known are"
                f" {', '.join(self.stages)}"
            )
        return self.stages[name]
