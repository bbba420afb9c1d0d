"""The modules of connectors, by name.

A module takes the hidden states of the vision encoder, [tokens of a tile, I, D of vision], a class
token first if the encoder has one, or [I * tokens of a tile, 1, D of vision] if it reads images of
any size, and gives the features of all tiles [I * F, 1, D of language], tile by tile.
Shape letters: I tiles, F features of a tile, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from megavlm.config.connectors import CONNECTORS, Connector, ConnectorSizes, Ends
from megavlm.config.schema import Config
from megavlm.model.connector.linear import LinearConnector
from megavlm.model.connector.merger import MergerConnector
from megavlm.model.connector.mlp import MlpConnector
from megavlm.model.connector.pool import (
    AttentionPoolConnector,
    MeanQueryPoolConnector,
    PoolConnector,
)
from megavlm.model.connector.qformer import QFormerConnector
from megavlm.model.connector.resampler import ResamplerConnector
from megavlm.model.kernels import Kernels

ConnectorModule = Callable[[Config, Kernels, ProcessGroupCollection], MegatronModule]
"""Makes a connector's module from the run, the kernels of the layers, and the process groups of the
vision encoder.
"""

MODULES: dict[str, ConnectorModule] = {
    "mlp": MlpConnector,
    "linear": LinearConnector,
    "merger": MergerConnector,
    "class_token": PoolConnector,
    "mean": PoolConnector,
    "attention": AttentionPoolConnector,
    "mean_query": MeanQueryPoolConnector,
    "qformer": QFormerConnector,
    "resampler": ResamplerConnector,
}


def register(
    kind: str, sizes: Callable[[Connector, Ends], ConnectorSizes], module: ConnectorModule
) -> None:
    """Add a connector to the tables of sizes and of modules.

    Args:
        kind: its name, for ``--architecture.connector.kind``.
        sizes: makes its sizes; the planner and the checks ask them.
        module: makes its module.

    Raises:
        ValueError: the name is taken.
    """
    if kind in CONNECTORS or kind in MODULES:
        raise ValueError(f"a connector named {kind} exists already; choose another name")
    CONNECTORS[kind] = sizes
    MODULES[kind] = module


def build_connector(
    config: Config, kernels: Kernels, groups: ProcessGroupCollection
) -> MegatronModule:
    """Build the module of the run's connector."""
    return MODULES[config.architecture.connector.kind](config, kernels, groups)
