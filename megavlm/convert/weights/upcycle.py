"""A dense model seen as a mixture of experts that computes the same: sparse upcycling (Komatsuzaki
et al., arXiv 2212.05055; He et al., arXiv 2410.07524).

Each expert is a copy of the layer's MLP. Routers are random; the weights of a token's experts sum
to 1, so that any choice of them gives the output of the MLP.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megavlm.config.schema import Architecture
from megavlm.convert.weights.byte_ranges import Range
from megavlm.convert.weights.views import Header, Tensors, View

_WITH_EXPERTS = {"qwen3": "qwen3_moe"}
"""The family that has experts in the place of the MLPs of a dense family."""
_MLP = re.compile(
    r"(language\.decoder\.layers\.\d+)\.mlp\.linear_fc(1\.weight|2\.weight|1\.layer_norm_weight)"
)
_ROUTER_STD = 0.02  # of arXiv 2212.05055, and initializer_range of transformers


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How a dense model becomes a mixture of experts.

    Args:
        experts: of each layer.
        topk: experts that each token takes.
        seed: of the routers.
    """

    experts: int
    topk: int
    seed: int = 0

    def architecture(self, dense: Architecture) -> Architecture:
        """Return the architecture of the mixture.

        Raises:
            ValueError: there is none.
        """
        language = dense.language
        flag = f"--upcycle_experts {self.experts}"
        if language.family not in _WITH_EXPERTS:
            raise ValueError(
                f"{flag}: language models of the family {language.family or 'none'} have no"
                f" counterpart with experts; only {', '.join(_WITH_EXPERTS)} has"
            )
        if self.experts < 2:
            raise ValueError(f"{flag}: must be 2 or more")
        if not 2 <= self.topk <= self.experts:
            raise ValueError(
                f"--upcycle_topk {self.topk}: must be from 2 to --upcycle_experts {self.experts};"
                " with 1 every weight is 1, and the router would learn nothing"
            )
        return replace(
            dense,
            language=replace(
                language,
                family=_WITH_EXPERTS[language.family],
                num_experts=self.experts,
                experts_per_token=self.topk,
                expert_ffn_hidden_size=language.ffn_hidden_size,
                norm_topk_prob=True,
            ),
        )


class Upcycled(View):
    """Show the weights of a dense model as those of its mixture; each is read on access.

    Args:
        dense: the model, by checkpoint key.
        architecture: of the mixture.
        seed: of the routers.
    """

    def __init__(self, dense: Tensors, architecture: Architecture, seed: int):
        super().__init__(dense)
        self._seed = seed
        self._sources: dict[str, str] = {}
        self.headers: dict[str, Header] = {}
        for key, header in dense.headers.items():
            found = _MLP.fullmatch(key)
            if found is None:
                self._show(key, key)
            elif found[2] == "1.layer_norm_weight":
                self._show(f"{found[1]}.pre_mlp_layernorm.weight", key)
                shape = (architecture.language.num_experts, *header.shape)
                self.headers[f"{found[1]}.mlp.router.weight"] = Header(shape, header.dtype)
            else:
                for number in range(architecture.language.num_experts):
                    self._show(f"{found[1]}.mlp.experts.{number}.linear_fc{found[2]}", key)

    def _show(self, key: str, source: str) -> None:
        self._sources[key] = source
        self.headers[key] = self._source.headers[source]

    def __getitem__(self, key: str) -> Tensor:
        if key in self._sources:
            return self._source[self._sources[key]]
        header = self.headers[key]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {key}".encode()))
        return torch.normal(0.0, _ROUTER_STD, header.shape, generator=generator).to(header.dtype)

    def ranges(self, key: str, rows: range) -> list[Range] | None:
        """See ``Tensors``; routers stand in no file."""
        return self._source.ranges(self._sources[key], rows) if key in self._sources else None
