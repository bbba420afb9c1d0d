"""Our AdamW and Adam for the CPU against torch's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megavlm.parallel.adamw import Adam


@pytest.mark.parametrize(
    ("is_decoupled", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)]
)
def test_it_steps_like_torchs(is_decoupled: bool, reference: type) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    settings = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    optimizers = Adam(ours, adam_w_mode=is_decoupled, **settings), reference(theirs, **settings)
    for _ in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_a_parameter_without_a_gradient_stays_and_steps_are_counted_in_the_group() -> None:
    idle, busy = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Adam([idle, busy], lr=0.1)
    busy.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(idle, torch.ones(2)) and not torch.equal(busy, torch.ones(2))
    assert optimizer.param_groups[0]["step"] == 1 and idle not in optimizer.state


def test_a_cuda_graph_is_refused() -> None:
    with pytest.raises(ValueError, match="CUDA graph"):
        Adam([torch.nn.Parameter(torch.ones(1))], capturable=True)


ON_A_GPU_WITHOUT_FUSED_OPTIMIZERS = """
import sys
sys.modules["transformer_engine"] = sys.modules["apex"] = None
import torch
torch.cuda.is_available = lambda: True
torch.cuda.set_device = lambda device: None
torch.distributed.init_process_group = lambda *args, **kwargs: None
from megavlm.parallel import adamw, backend
assert backend.start(1).device.type == "cuda"
import megatron.core.optimizer as optimizer
from megatron.core.optimizer import distrib_optimizer
assert optimizer.Adam is adamw.Adam and not optimizer.USING_PYTORCH_OPTIMIZER
assert distrib_optimizer.HAVE_APEX_OR_TE and distrib_optimizer.Adam is adamw.Adam
"""


@pytest.mark.slow
def test_a_gpu_without_fused_optimizers_gets_it_too() -> None:
    """torch's AdamW counts updates per parameter: megatron-core can then neither save a chunk with
    nothing to train nor load a reshardable state.
    """
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_A_GPU_WITHOUT_FUSED_OPTIMIZERS], check=True
    )
