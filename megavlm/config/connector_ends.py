"""What a connector stands between."""

from __future__ import annotations

from dataclasses import dataclass

PART = "connector"


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What a connector stands between.

    Args:
        grid: patches along a side of a tile.
        input_size: width of the vision encoder, or without one the pixels of a patch.
        output_size: width of the language model, or of embeddings; 0: the connector ends in its own
            hidden states.
        inner_size: width inside the MLP of the vision encoder.
        tokens: of a tile in the layers of the vision encoder, a class token included.
        has_layer_norm: whether norms of the vision encoder are LayerNorm; else RMSNorm.
        deep_levels: layers of the vision encoder whose outputs become features, the last one not
            counted.
        is_memory: whether cross-attention layers of the language model read the features, which
            then stand in no token's place.
    """

    grid: int
    input_size: int
    output_size: int
    inner_size: int = 0
    tokens: int = 0
    has_layer_norm: bool = True
    deep_levels: int = 0
    is_memory: bool = False
