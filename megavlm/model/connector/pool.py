"""Connectors that make one embedding of a tile: for the objective contrastive.

They are small, and whole on every tensor-parallel rank.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn

from megavlm.config.schema import Config
from megavlm.model.connector.heads import attend, split_heads
from megavlm.model.kernels import Kernels
from megavlm.model.transformer import ACTIVATIONS, connector_config

_MEAN_EPSILON = 1e-5  # of the norms of InternVL-C's pool, whatever the encoder's is


class PoolConnector(MegatronModule):
    """Norm of the class token (CLIP's ``post_layernorm``), or mean of the normalised patches, and a
    projection without bias.

    Args:
        config: the run.
        kernels: of the layers.
        groups: process groups of the vision encoder.
    """

    def __init__(self, config: Config, kernels: Kernels, groups: ProcessGroupCollection):
        super().__init__(connector_config(config, kernels))
        architecture = config.architecture
        vision = architecture.vision
        self.takes_class_token = architecture.connector.kind == "class_token"
        self.class_tokens = int(vision.has_class_token)
        width = vision.hidden_size
        dtype = self.config.params_dtype
        self.norm = nn.LayerNorm(width, eps=vision.layernorm_epsilon, dtype=dtype)
        self.projection = nn.Linear(width, architecture.contrastive.size, bias=False, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn hidden states of the tiles [tokens, I, D] into embeddings [I, 1, size]."""
        if self.takes_class_token:
            pooled = self.norm(hidden[0])
        else:
            pooled = self.norm(hidden[self.class_tokens :]).mean(dim=0)
        return self.projection(pooled)[:, None]


class AttentionPoolConnector(MegatronModule):
    """A learned query attends to the normalised tokens, and an MLP adds to what it sees: the head
    of SigLIP (arXiv 2303.15343; Zhai et al., arXiv 2106.04560, appendix).

    Args:
        config: the run.
        kernels: of the layers.
        groups: process groups of the vision encoder.
    """

    def __init__(self, config: Config, kernels: Kernels, groups: ProcessGroupCollection):
        super().__init__(connector_config(config, kernels))
        vision = config.architecture.vision
        width = vision.hidden_size
        inner = vision.ffn_hidden_size
        dtype = self.config.params_dtype
        self.heads = vision.num_attention_heads
        self.activation = ACTIVATIONS[vision.activation]
        self.norm = nn.LayerNorm(width, eps=vision.layernorm_epsilon, dtype=dtype)
        self.query = nn.Parameter(torch.zeros(1, 1, width, dtype=dtype))
        # Of this module itself, since DDP gathers what a module has before it is called, and a
        # linear layer is not called for a part of its weight.
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width, dtype=dtype))
        self.out_proj = nn.Linear(width, width, dtype=dtype)
        self.mlp_norm = nn.LayerNorm(width, eps=vision.layernorm_epsilon, dtype=dtype)
        self.up = nn.Linear(width, inner, dtype=dtype)
        self.down = nn.Linear(inner, width, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn hidden states of the tiles [tokens, I, D] into embeddings [I, 1, D]."""
        tokens = self.norm(hidden).transpose(0, 1)
        width = tokens.shape[-1]
        weight = self.in_proj_weight
        bias = self.in_proj_bias
        asked = nn.functional.linear(self.query, weight[:width], bias[:width])
        query = asked.expand(len(tokens), 1, width)
        seen = nn.functional.linear(tokens, weight[width:], bias[width:])
        parts = (query, *seen.split(width, dim=-1))
        pooled = self.out_proj(attend(*(split_heads(part, self.heads) for part in parts)))
        return pooled + self.down(self.activation(self.up(self.mlp_norm(pooled))))


class MeanQueryPoolConnector(MegatronModule):
    """The mean of all tokens of a tile, the class token included, attends to them: the
    ``clip_projector`` of InternVL-C (arXiv 2312.14238).

    Args:
        config: the run.
        kernels: of the layers.
        groups: process groups of the vision encoder.
    """

    def __init__(self, config: Config, kernels: Kernels, groups: ProcessGroupCollection):
        super().__init__(connector_config(config, kernels))
        architecture = config.architecture
        width = architecture.vision.hidden_size
        dtype = self.config.params_dtype
        self.heads = architecture.connector.heads
        for name in ("query", "key", "value"):
            self.add_module(f"{name}_norm", nn.LayerNorm(width, eps=_MEAN_EPSILON, dtype=dtype))
            self.add_module(f"{name}_proj", nn.Linear(width, width, dtype=dtype))
        self.projection = nn.Linear(width, architecture.contrastive.size, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn hidden states of the tiles [tokens, I, D] into embeddings [I, 1, size]."""
        tokens = hidden.transpose(0, 1)
        parts = (
            self.query_proj(self.query_norm(tokens.mean(dim=1, keepdim=True))),
            self.key_proj(self.key_norm(tokens)),
            self.value_proj(self.value_norm(tokens)),
        )
        return self.projection(attend(*(split_heads(part, self.heads) for part in parts)))
