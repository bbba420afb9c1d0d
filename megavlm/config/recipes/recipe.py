"""What a recipe is: the parts of its models, training stages, what its packs look like, and the
format that its models are exported in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from megavlm.config.preference import Preference
from megavlm.config.sampling import Sampling
from megavlm.config.schema import ANY, Architecture, Data, Optimizer, Training
from megavlm.config.tiling import Tiling


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage sets; whatever it leaves alone keeps the schema's value.

    Args:
        description: one line, for people.
        loss_reduction: how supervised tokens weigh, as ``--data.loss_reduction``.
        template: conversation templates that its packs may have, as ``--data.template``; empty:
            those of the recipe.
        tiling: how images became tiles, as ``--data.tiling``; none: that of the recipe.
        sampling: how several folders of packs are mixed, as ``--data.sampling``.
        objective: what is trained, as ``--architecture.objective``.
        image_size: side of a tile, as ``--architecture.vision.image_size``; none: that of the
            model.
        capacity: tokens of a pack, see ``--capacity`` of ``tools/pack_dataset.py``; none: its
            default.
        patch_drop: as ``--architecture.vision.patch_drop``.
        positives: as ``--architecture.contrastive.positives``; none: those of the model.
        preference: losses of the objective preference, as ``--architecture.preference``; none:
            those of the model.
        optimizer: learning rate, weight decay and so on.
        training: trained parts, batch size, steps.
    """

    description: str
    loss_reduction: Literal["token", "sample", "square"] = "square"
    template: tuple[str, ...] = ()
    tiling: Tiling | None = None
    sampling: Sampling = "packs"
    objective: str = "next_token"
    image_size: int | None = None
    capacity: int | None = None
    patch_drop: float = 0.0
    positives: Literal["own", "image", "text", "either"] | None = None
    preference: Preference | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What models of a kind are made of, and how they are trained.

    Args:
        name: value of ``--recipe``.
        description: one line, for people.
        stages: by the value of ``--stage``, in the order of training.
        architecture: the model that the recipe is known for, for a run without ``--model``. Parts
            that ``--init`` names replace its own, and keep its connector. None: a run must name its
            model, and the vision encoder decides the connector.
        template: conversation templates that packs may have, see ``--template`` of
            ``tools/pack_dataset.py``; a stage may name others.
        tiling: how images become tiles, see ``--tiling`` of ``tools/pack_dataset.py``; a stage may
            name another.
        hub_format: row of ``HUB_FORMATS`` (``megavlm/convert/hf/hub_formats.py``) that a trained
            model is exported in, unless another one is asked for.
        other_formats: rows for models of other objectives than the last stage's, by objective, and
            with language models of other families than the architecture's, by family.
    """

    name: str
    description: str
    stages: Mapping[str, Stage]
    architecture: Architecture | None = None
    template: tuple[str, ...] = (ANY,)
    tiling: Tiling = ANY
    hub_format: str = "native"
    other_formats: Mapping[str, str] = field(default_factory=dict)

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

    def resized(self, stage: str, found: Architecture) -> Architecture:
        """Return a model with the image size, the dropped patches, the positives and the losses of
        preferences of the stage ``stage``; raises as ``stage``.
        """
        row = self.stage(stage)
        size = row.image_size or found.vision.image_size
        vision = replace(found.vision, image_size=size, patch_drop=row.patch_drop)
        positives = row.positives or found.contrastive.positives
        contrastive = replace(found.contrastive, positives=positives)
        preference = row.preference or found.preference
        return replace(found, vision=vision, contrastive=contrastive, preference=preference)

    def format_for(self, model: Architecture) -> str:
        """Return the format that a model is exported in."""
        kinds = (model.objective, model.language.family)
        return next(
            (self.other_formats[one] for one in kinds if one in self.other_formats), self.hub_format
        )

    def data(self, stage: str) -> Data:
        """Return what the stage ``stage`` sets of the data; raises as ``stage``."""
        row = self.stage(stage)
        return Data(
            loss_reduction=row.loss_reduction,
            sampling=row.sampling,
            template=row.template or self.template,
            tiling=row.tiling or self.tiling,
        )
