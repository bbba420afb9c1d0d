"""A transformer layer with norms behind its branches as well as in front of them (Gemma 2, arXiv
2408.00118).
"""

from __future__ import annotations

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import Module


class SandwichLayer(TransformerLayer):
    """``x + norm(attention(norm(x)))``, then the same with the MLP.

    megatron-core's layer has no place behind a branch. The two norms here are called by torch
    behind ``self_attention`` and ``mlp``, whoever calls these: also when the MLP is computed again
    in the backward pass. Both end in whole sums over the tensor-parallel ranks, of all tokens or,
    with sequence parallelism, of this rank's, for which the norms mark their weights.

    Args:
        config: megatron-core's configuration of the language model.
        submodules: what fills the slots of the layer.
        norm: makes a norm, of the configuration, the width and the epsilon.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        norm: type,
        **kwargs,
    ):
        super().__init__(config=config, submodules=submodules, **kwargs)
        sizes = dict(hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.post_attention_norm = norm(config, **sizes)
        self.post_mlp_norm = norm(config, **sizes)
        self.self_attention.register_forward_hook(self._behind_attention)
        self.mlp.register_forward_hook(self._behind_mlp)

    def _behind_attention(self, module: Module, inputs: tuple, output: tuple) -> tuple:
        return _normed(self.post_attention_norm, output)

    def _behind_mlp(self, module: Module, inputs: tuple, output: tuple) -> tuple:
        return _normed(self.post_mlp_norm, output)


def _normed(norm: Module, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
    """Normalise what a branch ended in, with its bias: there is none to add behind the norm."""
    branch, bias = output
    return norm(branch if bias is None else branch + bias), None
