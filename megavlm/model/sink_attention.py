"""Attention with learned sinks (GPT-OSS).

A sink (Xiao et al., arXiv 2309.17453) is a learned number of each head, which the softmax of every
query has beside the products with the keys: a query need not attend to anything.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from megavlm.model.block_attention import BlockAttention


class SinkAttention(BlockAttention):
    """Attention in blocks, with sinks; arguments as of ``BlockAttention``.

    Attributes:
        softmax_offset: the sinks of this rank's heads [heads of this rank], under the name that
            megatron-core's own attention gives them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ):
        super().__init__(config, layer_number, pg_collection, **kwargs)
        self.tensor_group = pg_collection.tp
        heads = config.num_attention_heads // self.tensor_group.size()
        self.softmax_offset = nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)

    def _sinks(self) -> Tensor:
        return self.softmax_offset

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> dict[str, Any]:
        """Describe the sinks as sharded over the tensor-parallel ranks, as the heads are;
        megatron-core calls this when it saves or loads a checkpoint.
        """
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
