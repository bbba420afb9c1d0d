"""Transformer Engine with real numbers on a CPU: torch operations stand in for its compiled
functions, everything in Python runs as it is.

``install`` changes torch and Transformer Engine for the whole process, so tests run it in a process
of its own, with ``python -O``: Transformer Engine asserts that tensors are on a GPU. Not covered:
FP8, Triton kernels, and the kernels themselves.

Shape letters: T tokens, D hidden size, H heads.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.te import torch_attention, torch_permutation

Normed = tuple[Tensor, Tensor | None, Tensor]


def gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    *rest: Any,
    **overlap: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """Multiply as ``tex.generic_gemm`` does: b @ a, with bias or its gradient; the product of
    16-bit matrices is float32 if asked for, as that of a router.
    """
    (_, wanted, bias, _, _, _, is_gradient, _, _, accumulate, *_) = rest
    left = b.reshape(-1, b.shape[-1])
    right = a.reshape(-1, a.shape[-1])
    if left.dtype == right.dtype and wanted is not None and wanted.name == "kFloat32":
        left = left.float()
        right = right.float()
    made = (left.T if transpose_b else left) @ (right.T if transpose_a else right)
    if bias is not None and not is_gradient:
        made = made + bias
    if not transpose_b:
        made = made.view(*b.shape[:-1], made.shape[-1])
    if out is not None:
        made = out.add_(made) if accumulate else out.copy_(made)
    bias_gradient = left.sum(0) if is_gradient and bias is not None else None
    return made, bias_gradient, None, None


def grouped_gemm(
    a: list[Tensor],
    transpose_a: bool,
    b: list[Tensor],
    transpose_b: bool,
    out: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    """Multiply as ``tex.te_general_grouped_gemm`` does: each b @ a, with biases, or with their
    gradients, which it writes where biases would stand; one without rows is empty.
    """
    (_, sizes, biases, _, is_single, _, is_gradient, _, _, accumulate, *_) = rest
    targets = out[0].split(sizes) if is_single else out
    for left, right, target, bias in zip(b, a, targets, biases, strict=True):
        made = (left.T if transpose_b else left) @ (right.T if transpose_a else right)
        if is_gradient and bias.numel():
            bias.copy_(left.sum(0))
        elif bias.numel():
            made = made + bias
        target.add_(made) if accumulate else target.copy_(made)
    return biases


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *rest: Any) -> Normed:
    """Normalise rows [T, D]; mean and reciprocal deviation are kept."""
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(wide.var(-1, keepdim=True, unbiased=False) + eps)
    made = (wide - mean) * scale * weight + bias
    return made.to(x.dtype), mean.squeeze(-1), scale.squeeze(-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *rest: Any) -> Normed:
    """Divide rows [T, D] by their root mean square."""
    weight = weight + 1 if rest[-1] else weight  # zero-centred
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x * scale * weight).to(x.dtype), None, scale.squeeze(-1)


def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias."""
    normed = (x - mean[:, None]) * scale[:, None]
    inner = dy * weight
    along = normed * (inner * normed).mean(-1, keepdim=True)
    dx = scale[:, None] * (inner - inner.mean(-1, keepdim=True) - along)
    return dx.to(x.dtype), (dy * normed).sum(0).to(weight.dtype), dy.sum(0).to(weight.dtype)


def rms_norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradients of input and weight."""
    weight = weight + 1 if rest[-1] else weight
    normed = x * scale[:, None]
    inner = dy * weight
    dx = scale[:, None] * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy * normed).sum(0).to(weight.dtype)


def swiglu(halves: Tensor, quantizer: None) -> Tensor:
    """Gate one half by the other, as ``tex.swiglu``."""
    gate, value = halves.chunk(2, -1)
    return torch.nn.functional.silu(gate) * value


def swiglu_backward(grad: Tensor, halves: Tensor, quantizer: None) -> Tensor:
    """Return the gradient of both halves, as ``tex.dswiglu``."""
    with torch.enable_grad():
        inside = halves.detach().requires_grad_()
        return torch.autograd.grad(swiglu(inside, None), inside, grad)[0]


def clamped_gate(halves: Tensor, quantizer: None, limit: float = 7.0) -> Tensor:
    """Gate one half by the other as in GPT-OSS, as ``tex.clamped_swiglu``, which takes no tensor
    without rows before 2.11.
    """
    if not len(halves):
        raise RuntimeError("Input input is not allocated!")
    gate, value = halves.chunk(2, -1)
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(1.702 * gate) * (value.clamp(-limit, limit) + 1)


def clamped_gate_backward(
    grad: Tensor, halves: Tensor, quantizer: None, limit: float = 7.0
) -> Tensor:
    """Return the gradient of both halves, as ``tex.clamped_dswiglu``."""
    with torch.enable_grad():
        inside = halves.detach().requires_grad_()
        return torch.autograd.grad(clamped_gate(inside, None, limit), inside, grad)[0]


def add_branch_backward(
    grad: Tensor, branch: Tensor | None, bias: Tensor, scale: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of branch, bias and scale, as ``branch_kernels.add_backward``."""
    from megavlm.model.residual_branch import add_branch

    values = torch.zeros_like(grad) if branch is None else branch
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (values, bias, scale) if x is not None]
        made = add_branch(torch.zeros_like(grad), *inputs, *([None] * (3 - len(inputs))), keep)
        found = torch.autograd.grad(made, inputs, grad)
    return (*found, None)[:3] if branch is not None else (*found[:2], None)


def rotary(sign: int) -> Callable[..., Tensor]:
    """Turn heads [T, H, head] by angles that restart with each sample, of which a context-parallel
    rank holds two of 2 * ranks parts; or, without samples, heads [T, 1, H, head] by one of each
    token.
    """

    def turn(t: Tensor, freqs: Tensor, *rest: Any) -> Tensor:
        (_, _, _, ends, ranks, rank) = rest
        angles = freqs
        if ends is not None:
            places = [_own_places(size, ranks, rank) for size in ends.diff().tolist()]
            angles = freqs[torch.cat(places)].view(len(t), 1, -1)
        first, second = t.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return (t * angles.cos() + sign * turned * angles.sin()).to(t.dtype)

    return turn


def _own_places(size: int, ranks: int, rank: int) -> Tensor:
    """Return the positions in a sample that a context-parallel rank holds."""
    places = torch.arange(size)
    if ranks == 1:
        return places
    parts = places.view(2 * ranks, -1)
    return torch.cat([parts[rank], parts[-1 - rank]])


def entropy_forward(
    logits: Tensor, target: Tensor, smoothing: float, reduces: bool, group: Any, ignored: int
) -> tuple[Tensor, Tensor]:
    """Return losses, and the gradient written over the logits; ranks hold parts of the classes."""
    rows = logits.detach().view(-1, logits.shape[-1]).float()
    own = target.reshape(-1, 1) - rows.shape[-1] * (group.rank() if group else 0)
    is_here = (own >= 0) & (own < rows.shape[-1])
    own = own.clamp(0, rows.shape[-1] - 1)
    wanted = rows.gather(1, own) * is_here
    most = rows.amax(-1, keepdim=True)
    if group:
        dist.all_reduce(most, dist.ReduceOp.MAX, group)
    sums = (rows - most).exp().sum(-1, keepdim=True)
    if group:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(wanted, group=group)
    gradient = (rows - most).exp() / sums
    gradient.scatter_add_(1, own, -is_here.float())
    with torch.no_grad():
        logits.copy_(gradient.view_as(logits))
    return (sums.log() + most - wanted).view(logits.shape[:2]), logits


def entropy_backward(logits: Tensor, gradient: Tensor, captured: bool) -> Tensor:
    """Scale the gradient that the forward pass left."""
    return logits.mul_(gradient.reshape(*logits.shape[:2], 1))


def _answer_as_hopper() -> None:
    """Answer what Transformer Engine and megatron-core ask about the device."""
    properties = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="Hopper", total_memory=80 * 2**30
    )
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.get_device_properties = lambda *args: properties
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = lambda *args: None
    cuda.nvtx.range_pop = lambda *args: None


def _dummy_gradient(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    # NaN: nobody may read a gradient that was summed elsewhere.
    return torch.full(shape, 0.0 if zero else float("nan"), dtype=dtype)


_NORMS: dict[str, Callable[..., Any]] = {
    "layernorm_fwd": layer_norm,
    "rmsnorm_fwd": rms_norm,
    "layernorm_bwd": layer_norm_backward,
    "rmsnorm_bwd": rms_norm_backward,
}
_ANSWERS: dict[str, Callable[..., Any]] = {
    "get_cudnn_version": lambda *args: (9, 19, 0),
    "get_device_compute_capability": lambda *args: (9, 0),
}


def install() -> None:
    """Put the stand-ins in place, and the device's answers."""
    # First: megatron-core compiles functions while it is imported.
    torch.compile = lambda function=None, **settings: function or (lambda inner: inner)
    import transformer_engine.pytorch  # noqa: F401  its import looks at the real device
    import transformer_engine.pytorch.attention.dot_product_attention.utils as attention_utils
    import transformer_engine.pytorch.cpp_extensions.gemm as gemms
    import transformer_engine.pytorch.distributed as engine
    import transformer_engine.pytorch.module.grouped_linear as grouped_linear
    import transformer_engine.pytorch.module.layernorm_linear as norm_linear
    import transformer_engine.pytorch.module.linear as linear
    import transformer_engine.pytorch.triton.cross_entropy as entropy
    import transformer_engine_torch as tex

    from megavlm.parallel import backend, cpu_backend

    running = backend.start(5)
    backend.start = lambda *args, **settings: running
    _answer_as_hopper()
    compiled = (
        _NORMS
        | torch_attention.COMPILED
        | {
            "generic_gemm": gemm,
            "te_general_grouped_gemm": grouped_gemm,
            "fused_rope_forward": rotary(1),
            "fused_rope_backward": rotary(-1),
            "swiglu": swiglu,
            "dswiglu": swiglu_backward,
            "clamped_swiglu": clamped_gate,
            "clamped_dswiglu": clamped_gate_backward,
            "get_cublasLt_version": lambda: 130100,
        }
    )
    for name, function in compiled.items():
        setattr(tex, name, function)
    for path, module in list(sys.modules.items()):
        if path.startswith("transformer_engine.pytorch"):
            for name, function in (_NORMS | _ANSWERS).items():
                if name in vars(module):
                    setattr(module, name, function)
    for module in (linear, norm_linear, grouped_linear):
        module.get_dummy_wgrad = _dummy_gradient
    gemms.get_cublas_workspace = lambda *args: torch.empty(1, 1)
    gemms.get_tensor_device = lambda *args: 0
    gemms.torch = cpu_backend.TorchOnCpu(["empty"])
    engine._get_cuda_rng_state = lambda *args, **settings: torch.get_rng_state()
    engine._set_cuda_rng_state = lambda *args, **settings: None
    fused = tex.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    chosen = (False, None, True, fused, False, [False, True, True])
    attention_utils.get_attention_backend = lambda params: chosen
    entropy.cross_entropy_forward = entropy_forward
    entropy.cross_entropy_backward = entropy_backward
    torch_attention.install_requests()
    torch_permutation.install()
    _install_branches()
    _leave_memory_unlocked()


def _install_branches() -> None:
    from megavlm.model import residual_branch
    from megavlm.model.triton_kernels import branch_kernels

    branch_kernels.add = residual_branch.add_branch
    branch_kernels.add_backward = add_branch_backward


def _leave_memory_unlocked() -> None:
    """Hand batches on as they are: memory cannot be page-locked without a driver."""
    from megavlm.data.loading.batch import Batch

    Batch.pin_memory = lambda batch, device=None: batch
