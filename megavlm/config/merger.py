"""The connector of Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL: it merges the patches of a tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.config.connector_ends import PART, Ends
from megavlm.config.pieces import Piece, linear, norm


@dataclass(frozen=True)
class MergerSizes:
    """A norm of each patch, the patches of a tile side by side, linear, GELU, linear; see
    ``ConnectorSizes`` in ``megavlm/config/connectors.py``.
    """

    ends: Ends

    features = 1
    placeholders = 1

    @property
    def feature_size(self) -> int:
        """See ``ConnectorSizes``."""
        return self.ends.input_size * self.ends.grid**2

    def problems(self) -> Iterator[str]:
        """See ``ConnectorSizes``."""
        return iter(())

    def pieces(self) -> Iterator[Piece]:
        """See ``ConnectorSizes``."""
        inner = self.feature_size
        once = dict(rows=1, unit="tile", has_bias=True)
        yield from norm(
            "connector.norm", PART, self.ends.input_size, has_bias=self.ends.has_layer_norm
        )
        yield from linear("connector.mlp.linear_fc1", PART, inner, inner, **once)
        yield from linear("connector.mlp.linear_fc2", PART, inner, self.ends.output_size, **once)

    def kept(self, tensor_size: int) -> float:
        """Count inputs and results of the norm, and what goes into GELU and comes out of it."""
        return 2 * self.feature_size * (1 + 1 / tensor_size)

    @property
    def all_reduced_elements(self) -> int:
        """See ``ConnectorSizes``."""
        return self.ends.output_size
