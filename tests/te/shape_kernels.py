"""Stand-ins for Transformer Engine's compiled functions that only make results of the right shapes.

They work on fake tensors (``tests/te/fake_cuda.py``), which have a device and no values, and refuse
what the compiled functions refuse: tensors of another device, sizes that do not fit, strides that a
kernel does not take.

Shape letters: T tokens, D hidden size, H heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)
# cuBLAS multiplies 8-bit matrices whose sides divide by these (Transformer Engine's
# ``assert_dim_for_fp8_exec``).
FP8_ROWS = 8
FP8_COLUMNS = 16


def require_cuda(*tensors: Any) -> None:
    """Raise what a compiled function would answer to a tensor of the host with a crash."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device.type != "cuda":
            raise RuntimeError(
                f"mismatch: a compiled function of Transformer Engine got a tensor on "
                f"{tensor.device}, of shape {tuple(tensor.shape)}"
            )


def _alike(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    *rest: Any,
    **overlap: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """Return what ``tex.generic_gemm`` returns for b @ a."""
    (_, out_dtype, bias, _, _, _, is_gradient, *_) = rest
    require_cuda(a, b, out, bias)
    left = _sides(b)
    right = _sides(a)
    (rows, inner_left) = reversed(left) if transpose_b else left
    (inner_right, columns) = reversed(right) if transpose_a else right
    if inner_left != inner_right:
        raise RuntimeError(f"mismatch: a product of {left} and {right}")
    shape = (rows, columns) if transpose_b else (*b.size()[:-1], columns)
    if out is None:
        out = _numbers(*shape, dtype=_dtype(out_dtype) or torch.bfloat16)
    if tuple(out.shape) != tuple(shape):
        raise RuntimeError(f"mismatch: {tuple(shape)} is written into {tuple(out.shape)}")
    made = None
    if is_gradient and bias is not None:
        made = _numbers(left[-1], dtype=bias.dtype)
    return out, made, None, None


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def _sides(operand: Any) -> tuple[int, int]:
    """Return rows and columns of a matrix, in 16 bits or in 8."""
    transposed = getattr(operand, "_transpose", None)
    if transposed is None or operand._data is not None:
        return _flat(operand.size())
    (columns, *rows) = transposed.shape
    return math.prod(rows), columns


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, noop: Tensor | None = None) -> Any:
    """Return ``tensor`` [..., D] in 8 bits, for whose kernels rows and columns must fit."""
    require_cuda(tensor, noop)
    (rows, columns) = _flat(tensor.shape)
    if rows % FP8_ROWS or columns % FP8_COLUMNS:
        raise RuntimeError(f"mismatch: {tuple(tensor.shape)} is not a shape for products in FP8")
    if out is not None:
        return out
    return quantizer.make_empty(tuple(tensor.shape), dtype=tensor.dtype, device=CUDA)


def bias_gradient_and_quantize(tensor: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """Return the sum over rows of ``tensor`` [T, D], and ``tensor`` in 8 bits."""
    return tensor.new_empty(tensor.shape[-1]), quantize(tensor, quantizer)


def gate(halves: Tensor, quantizer: None, limit: float = 7.0) -> Tensor:
    """Return rows of half the width, as the gates of an MLP do."""
    return halves[..., halves.shape[-1] // 2 :].contiguous()


def gate_backward(grad: Tensor, halves: Tensor, quantizer: None, limit: float = 7.0) -> Tensor:
    """Return rows of both halves, as the gradients of ``gate``."""
    return torch.cat([grad, grad], -1)


def _dtype(kind: Any) -> torch.dtype | None:
    """Translate Transformer Engine's word for a dtype."""
    import transformer_engine_torch as tex

    return {
        tex.DType.kBFloat16: torch.bfloat16,
        tex.DType.kFloat16: torch.float16,
        tex.DType.kFloat32: torch.float32,
    }.get(kind)


def _normed(x: Tensor, quantizer: Any) -> tuple[Any, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    out = torch.empty_like(x) if quantizer is None else quantize(x, quantizer)
    return out, _numbers(rows), _numbers(rows)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Any, quantizer: Any, *rest: Any
) -> tuple[Any, Tensor, Tensor]:
    """Return rows [T, D], in 8 bits if there is a quantizer, and two numbers a row."""
    require_cuda(x, weight, bias)
    return _normed(x, quantizer)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, *rest: Any
) -> tuple[Any, Tensor, Tensor]:
    """Return what ``layer_norm`` does."""
    require_cuda(x, weight)
    return _normed(x, quantizer)


def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias."""
    require_cuda(dy, x, mean, scale, weight)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def rms_norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradients of input and weight."""
    require_cuda(dy, x, scale, weight)
    return torch.empty_like(x), torch.empty_like(weight)


def attention(*given: Any, **more: Any) -> list[Tensor]:
    """Return what ``tex.fused_attn_fwd`` returns: output, softmax sums, random state."""
    (queries, keys) = given[:2]
    (cu_queries, cu_keys, query, key, value) = given[11:16]
    require_cuda(cu_queries, cu_keys, query, key, value)
    if not (isinstance(queries, int) and isinstance(keys, int)):
        raise RuntimeError("mismatch: the longest sample must be known on the host")
    if cu_queries.dtype != torch.int32:
        raise RuntimeError(f"mismatch: cu_seqlens are {cu_queries.dtype}")
    rows = query.numel() // (query.shape[-1] * query.shape[-2])
    sums = _numbers(rows, query.shape[-2], 1)
    return [_alike(query), sums, _numbers(2, dtype=torch.int64)]


def attention_backward(*given: Any, **more: Any) -> list[Tensor | None]:
    """Return the gradients of query, key and value."""
    (cu_queries, cu_keys, query, key, value, out, d_out) = given[11:18]
    require_cuda(cu_queries, cu_keys, query, key, value, out, d_out)
    return [_alike(query), _alike(key), _alike(value), None, None]


def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any
) -> Tensor:
    """Return what torch's ``scaled_dot_product_attention`` does, with gradients of all three:
    [..., R, d] of queries [..., R, d] and of keys and values [..., N, d].
    """
    require_cuda(query, key, value, attn_mask)
    if attn_mask is not None:
        torch.broadcast_shapes(attn_mask.shape, (*query.shape[:-1], key.shape[-2]))
    return query + (key.sum() + value.sum()) * 0


def read_half(x: Tensor, ends: Tensor, half: int) -> Tensor:
    """Return what ``tex.thd_read_half_tensor`` does: half of the rows of each sample."""
    require_cuda(x, ends)
    return x.new_empty(len(x) // 2, *x.shape[1:])


def read_second_half_sums(sums: Tensor, ends: Tensor, is_packed: bool, length: int) -> Tensor:
    """Return what ``tex.thd_read_second_half_lse`` does, of sums [H, T]."""
    require_cuda(sums, ends)
    if not is_packed or 2 * length != sums.shape[1]:
        raise RuntimeError(f"mismatch: half of {tuple(sums.shape)} has {length} tokens")
    return sums.new_empty(sums.shape[0], length)


def join_steps(*given: Any) -> None:
    """Stand for what adds one step of context parallelism to the others."""
    require_cuda(*given)


def transpose(data: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    """Return what ``tex.fp8_transpose`` does, of bytes [..., D]."""
    require_cuda(data, out)
    return data.new_empty(data.shape[-1], *data.shape[:-1]) if out is None else out


def add_branch(
    hidden: Tensor, branch: Tensor, bias: Tensor, scale: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Return what ``branch_kernels.add`` does."""
    require_cuda(hidden, branch, bias, scale, keep)
    return _alike(hidden)


def add_branch_backward(
    grad: Tensor, branch: Tensor | None, bias: Tensor, scale: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what ``branch_kernels.add_backward`` does."""
    require_cuda(grad, branch, bias, scale, keep)
    return _alike(grad), _alike(bias), None if branch is None else _alike(scale)


def drop(values: Tensor, *rest: Any) -> Tensor:
    """Return what ``dropout_kernel.multiply`` does."""
    require_cuda(values)
    return _alike(values)


def dequantise(
    codes: Tensor, pairs: Tensor, scales: Tensor, left: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return what ``nf4_kernel.dequantise`` does."""
    require_cuda(codes, pairs, scales)
    return codes.new_empty(len(codes), columns, dtype=dtype)


def rotary(t: Tensor, freqs: Tensor, start: Any, form: Any, inter: Any, cu: Any, *rest: Any):
    """Turn heads [T, H, head]."""
    require_cuda(t, freqs, cu)
    return _alike(t)


def adam(chunk: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], *rest: Any) -> None:
    """Check what ``tex.multi_tensor_adam`` gets: lists of equal lengths, of equal sizes."""
    require_cuda(flag, *(tensor for tensors in lists for tensor in tensors))
    for row in zip(*lists, strict=True):
        if len({tensor.numel() for tensor in row}) != 1:
            raise RuntimeError(f"mismatch: Adam over {[tuple(tensor.shape) for tensor in row]}")


def entropy_forward(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return losses; the gradient replaces the logits [T, 1, V]."""
    require_cuda(logits, target)
    if logits.stride(-1) != 1 or logits.stride(-2) != logits.shape[-1]:
        raise RuntimeError(f"mismatch: logits with strides {logits.stride()}")
    if target.stride(-1) != 1 or target.numel() != logits.numel() // logits.shape[-1]:
        raise RuntimeError(f"mismatch: labels {tuple(target.shape)}, strides {target.stride()}")
    return _numbers(*logits.shape[:2]), logits


def entropy_backward(logits: Tensor, gradient: Tensor, captured: bool) -> Tensor:
    """Scale the gradient; it is compared with 1 first, as the original does."""
    require_cuda(logits, gradient)
    if not captured:
        torch.equal(gradient, torch.ones((), device=gradient.device))
    return logits


NORMS = {
    "layernorm_fwd": layer_norm,
    "rmsnorm_fwd": rms_norm,
    "layernorm_bwd": layer_norm_backward,
    "rmsnorm_bwd": rms_norm_backward,
}
ANSWERS = {
    "get_cudnn_version": lambda *args: (9, 19, 0),
    "get_device_compute_capability": lambda *args: (9, 0),
}


def install_sorting(waits: Any) -> None:
    """Replace the kernels that sort tokens by expert for the whole process.

    Args:
        waits: knows how many tokens go to experts, which is a value of the device.
    """
    import transformer_engine.pytorch.triton.permutation as kernels

    def permute(
        tokens: Tensor, places: Tensor, probs: Tensor | None, scale: Any, count: int, *rest: Any
    ) -> tuple[Tensor, None, Tensor | None]:
        require_cuda(tokens, places, probs)
        rows = waits.routed(count)
        own = None if probs is None else probs.new_empty(rows)
        return tokens.new_empty(rows, tokens.shape[1]), None, own

    def unpermute(
        copies: Tensor, places: Tensor, merging: None, own: Tensor | None, *sizes: int
    ) -> tuple[Tensor, Tensor | None]:
        require_cuda(copies, places, own)
        (tokens, experts, width) = sizes
        probs = None if own is None else own.new_empty(tokens, experts)
        return copies.new_empty(tokens, width), probs

    def sort(
        rows: Tensor, places: Tensor, own: Tensor | None, *sizes: int, is_forward: bool
    ) -> tuple[Tensor, Tensor | None]:
        require_cuda(rows, places, own)
        return torch.empty_like(rows), None if own is None else torch.empty_like(own)

    def chunk_map(sizes: Tensor, order: Tensor, tokens: int, chunks: int) -> Tensor:
        require_cuda(sizes, order)
        return sizes.new_empty(tokens, dtype=torch.int32)

    kernels.make_row_id_map = lambda routed, tokens, experts: routed.new_empty(
        tokens, 2 * experts + 1, dtype=torch.int32
    )
    kernels.permute_with_mask_map = permute
    kernels.unpermute_with_mask_map = unpermute
    kernels.make_chunk_sort_map = chunk_map
    kernels.sort_chunks_by_map = sort


def install() -> None:
    """Replace the compiled functions for the whole process."""
    import transformer_engine.pytorch.attention.dot_product_attention.utils as attention_utils
    import transformer_engine.pytorch.triton.cross_entropy as entropy
    import transformer_engine_torch as tex

    from megavlm.model.triton_kernels import branch_kernels, dropout_kernel, nf4_kernel

    branch_kernels.add = add_branch
    branch_kernels.add_backward = add_branch_backward
    dropout_kernel.multiply = drop
    nf4_kernel.dequantise = dequantise
    backend = tex.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    compiled = NORMS | {
        "generic_gemm": gemm,
        "quantize": quantize,
        "bgrad_quantize": bias_gradient_and_quantize,
        "fused_amax_and_scale_update_after_reduction": lambda *args: None,
        "fused_attn_fwd": attention,
        "fused_attn_bwd": attention_backward,
        "get_fused_attn_backend": lambda *args: backend,
        "thd_read_half_tensor": read_half,
        "thd_read_second_half_lse": read_second_half_sums,
        "thd_second_half_lse_correction": join_steps,
        "thd_out_correction": join_steps,
        "thd_grad_correction": join_steps,
        "fp8_transpose": transpose,
        "fused_rope_forward": rotary,
        "fused_rope_backward": rotary,
        "swiglu": gate,
        "dswiglu": gate_backward,
        "clamped_swiglu": gate,
        "clamped_dswiglu": gate_backward,
        "multi_tensor_adam": adam,
        "multi_tensor_adam_param_remainder": adam,
        "get_cublasLt_version": lambda: 130100,
    }
    for name, function in compiled.items():
        setattr(tex, name, function)
    for path, module in list(sys.modules.items()):
        if path.startswith("transformer_engine.pytorch"):
            for name, function in (NORMS | ANSWERS).items():
                if name in vars(module):
                    setattr(module, name, function)
    choose = attention_utils.get_attention_backend
    attention_utils.get_attention_backend = lambda params: choose(
        # It asks for the exact class of its tensors, and fake ones are of another.
        dataclasses.replace(params, qkv_type=Tensor)
    )
    entropy.cross_entropy_forward = entropy_forward
    entropy.cross_entropy_backward = entropy_backward
