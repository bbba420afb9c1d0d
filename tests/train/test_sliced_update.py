"""An update in slices is the update of all parameters at once, with fewer of them in hand."""

from __future__ import annotations

import pytest
import torch

from megavlm.parallel.adamw import Adam
from megavlm.train.sliced_update import slices, step_in_slices


class Counting(Adam):
    """Notes how many elements each ``step`` sees; skips empty groups, as FusedAdam does."""

    def __init__(self, params: list[dict]):
        super().__init__(params, lr=0.1, weight_decay=0.1)
        self.seen: list[int] = []

    def step(self, closure: None = None) -> None:
        held = self.param_groups
        self.seen.append(sum(p.numel() for group in held for p in group["params"]))
        self.param_groups = [group for group in held if group["params"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = held


def groups() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 50, 4, 4), (), (20, 2)]
    return [
        {"params": [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in one]}
        for one in sizes
    ]


def test_slices_keep_order_and_size() -> None:
    parameters = [torch.zeros(n) for n in (3, 50, 4, 4)]
    cut = list(slices(parameters, 8))
    assert [[p.numel() for p in run] for run in cut] == [[3], [50], [4, 4]]


@pytest.mark.parametrize("resumed", [0, 7])
def test_weights_and_counts_equal_those_of_one_step(resumed: int) -> None:
    whole = Counting(groups())
    cut = Counting(groups())
    for optimizer in (whole, cut):
        for group in optimizer.param_groups:
            group |= {"step": resumed} if resumed else {}
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for first, second in zip(whole.param_groups, cut.param_groups, strict=True):
            for p, q in zip(first["params"], second["params"], strict=True):
                p.grad = torch.randn(p.shape, generator=generator)
                q.grad = p.grad.clone()
        whole.step()
        step_in_slices(cut, 8)
    for first, second in zip(whole.param_groups, cut.param_groups, strict=True):
        assert first.get("step") == second.get("step")
        for p, q in zip(first["params"], second["params"], strict=True):
            assert torch.equal(p, q)
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(whole.state[p][name], cut.state[q][name])
    assert max(cut.seen) == 50 and max(whole.seen) == 83


def test_parameters_come_back_after_an_error() -> None:
    optimizer = Counting(groups())
    optimizer.param_groups[2]["params"][1].grad = torch.zeros(2)
    optimizer.param_groups[2]["betas"] = ()
    with pytest.raises(ValueError):
        step_in_slices(optimizer, 8)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 0, 2]
