"""The connector of Qwen2-VL (arXiv 2409.12191) and its successors: it merges the patches of a
tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.config.connector_ends import PART, Ends
from megavlm.config.pieces import Piece, linear, norm


@dataclass(frozen=True)
class MergerSizes:
    """A norm of each patch, the patches of a tile side by side, linear, GELU, linear; the same of
    each layer for DeepStack (arXiv 2406.04334), with the norm behind the patches' joining. See
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
        yield from self._merger("connector", self.ends.input_size)
        for level in range(self.ends.deep_levels):
            yield from self._merger(f"connector.deep.{level}", self.feature_size)

    def _merger(self, stem: str, normed: int) -> Iterator[Piece]:
        """Yield the weights of one merger, whose norm is ``normed`` wide."""
        inner = self.feature_size
        once = dict(rows=1, unit="tile", has_bias=True)
        yield from norm(f"{stem}.norm", PART, normed, has_bias=self.ends.has_layer_norm)
        yield from linear(f"{stem}.mlp.linear_fc1", PART, inner, inner, **once)
        yield from linear(f"{stem}.mlp.linear_fc2", PART, inner, self.ends.output_size, **once)

    def kept(self, tensor_size: int) -> float:
        """Count inputs and results of the norm, and what goes into GELU and comes out of it."""
        return (1 + self.ends.deep_levels) * 2 * self.feature_size * (1 + 1 / tensor_size)

    @property
    def all_reduced_elements(self) -> int:
        """See ``ConnectorSizes``."""
        return (1 + self.ends.deep_levels) * self.ends.output_size
