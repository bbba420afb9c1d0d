"""Let two models send each token to the same experts.

A router takes the experts with the highest scores. In 16 bits the scores of two models differ by
rounding, so experts with nearly equal scores change places, and the token goes to another expert,
whose output is another one: its logits then differ by what an expert adds, however exactly both
models compute. So the checkpoint's model takes the choices of ``transformers``, and each of them
must be one that rounding explains: of a score that is hardly less than that of an own choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megavlm.model.router import PackRouter, routers_of


class Choices:
    """The choices of all routers of a model for one pack, and how they differ from another's.

    Args:
        tokens: of the pack.

    Attributes:
        made: choices that were compared, of one token in one layer each.
        other: those of them that are not the experts of the highest scores.
        shortfall: most that a chosen expert's score is below that of an own choice, as a share of
            the token's highest score.
    """

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._of_layers: dict[str, Tensor] = {}
        self.made = 0
        self.other = 0
        self.shortfall = 0.0

    @contextlib.contextmanager
    def recorded(self, model: nn.Module, start: int) -> Iterator[None]:
        """Take the choices of a model of ``transformers`` for a sample that starts at a token of
        the pack.
        """
        routers = {
            name: module
            for name, module in model.named_modules()
            if type(module).__name__.lower().endswith("topkrouter")
        }
        hooks = [
            module.register_forward_hook(partial(self._take, name, start))
            for name, module in routers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take(
        self, name: str, start: int, module: nn.Module, inputs: object, outputs: Sequence[Tensor]
    ) -> None:
        """Keep the experts of a sample; called by a router, which returns them last [T, K], except
        in old versions of some, whose choices nobody is told.
        """
        experts = outputs[-1]
        if experts.is_floating_point():
            return
        if name not in self._of_layers:
            nobody = experts.new_full((self._tokens, experts.shape[1]), -1)
            self._of_layers[name] = nobody
        self._of_layers[name][start : start + len(experts)] = experts

    @contextlib.contextmanager
    def replayed(self, model: nn.Module) -> Iterator[None]:
        """Let the routers of the checkpoint's model take what was recorded, and compare it with
        their own choices.
        """
        routers = list(routers_of(model)) if self._of_layers else []
        for router, experts in zip(routers, self._of_layers.values(), strict=True):
            router.choose = partial(self._choose, router, experts)
        try:
            yield
        finally:
            for router in routers:
                del router.choose  # the class's own again

    def _choose(self, router: PackRouter, experts: Tensor, ranking: Tensor) -> Tensor:
        """Return the recorded experts of each token [T, K], and for padding its own."""
        highest = ranking.topk(router.topk)
        is_real = experts[:, :1] >= 0
        chosen = torch.where(is_real, experts, highest.indices)
        lowest = ranking.gather(1, chosen).amin(1)
        below = (highest.values[:, -1] - lowest) / highest.values[:, 0].abs()
        self.made += int(is_real.sum())
        self.other += int((below > 0).sum())
        self.shortfall = max(self.shortfall, float(below.max()))
        return chosen
