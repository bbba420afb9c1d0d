"""The modules of objectives, by name; ``config/objectives`` has what they need."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.transformer import TransformerConfig

from megavlm.config.objectives import OBJECTIVES, ObjectiveNeeds
from megavlm.config.schema import Config
from megavlm.model.kernels import Kernels
from megavlm.model.objective.contrastive import Contrastive
from megavlm.model.objective.next_token import NextToken
from megavlm.model.objective.objective import Objective
from megavlm.model.objective.preference import Preference
from megavlm.model.objective.qformer import QFormerObjective
from megavlm.parallel.process_groups import Groups
from megavlm.planner.layout import Chunk

ObjectiveModule = Callable[[TransformerConfig, Config, Chunk, Kernels, Groups], Objective]
"""Makes an objective's module for a chunk: megatron-core's configuration of the language model, the
run, the chunk, the kernels of the layers, the process groups.
"""

MODULES: dict[str, ObjectiveModule] = {
    "next_token": lambda settings, config, chunk, kernels, groups: NextToken(
        settings, places_features=not config.architecture.cross_attention.every
    ),
    "preference": lambda settings, config, chunk, kernels, groups: Preference(
        settings, config.architecture, chunk, groups
    ),
    "contrastive": lambda settings, config, chunk, kernels, groups: Contrastive(
        settings, config.architecture, chunk, groups
    ),
    "qformer": lambda settings, config, chunk, kernels, groups: QFormerObjective(
        settings, config, chunk, groups
    ),
}


def register(name: str, needs: ObjectiveNeeds, module: ObjectiveModule) -> None:
    """Add an objective to the tables of needs and of modules.

    Args:
        name: for ``--architecture.objective``.
        needs: what it needs; the planner and the checks read it.
        module: makes its module.

    Raises:
        ValueError: the name is taken.
    """
    if name in OBJECTIVES or name in MODULES:
        raise ValueError(f"an objective named {name} exists already; choose another name")
    OBJECTIVES[name] = needs
    MODULES[name] = module


def build_objective(
    settings: TransformerConfig, config: Config, chunk: Chunk, kernels: Kernels, groups: Groups
) -> Objective:
    """Build the part of the run's objective that stands in a chunk."""
    name = config.architecture.objective
    built = MODULES[name](settings, config, chunk, kernels, groups)
    if built.spans_step != OBJECTIVES[name].spans_step:
        raise TypeError(
            f"objective {name}: its needs say spans_step {OBJECTIVES[name].spans_step}, and its"
            f" module {built.spans_step}"
        )
    return built
