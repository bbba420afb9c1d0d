"""Where the time of a step goes, kernel by kernel, from torch's profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

# The first group that a kernel's name fits. Names are those of CUDA kernels, and of torch's
# operators on a CPU.
GROUPS = (
    ("communication", r"nccl|all_reduce|all_gather|reduce_scatter|gloo|c10d"),
    ("attention", r"fmha|flash|attention|sdpa|_mha_|flex|cudnn::fusion|fused_attn"),
    (
        "8-bit conversion",
        r"cast_transpose|quantize|fp8|amax|transpose_dbias|rowwise.*scal|scaling_factor",
    ),
    (
        "matrix products",
        r"gemm|cutlass|cublas|nvjet|wgmma|xmma|matmul|conv|::(mm|addmm|bmm|baddbmm)\b",
    ),
    ("optimizer", r"adam|multi_tensor|foreach|l2norm"),
    ("norm", r"norm|ln_(fwd|bwd)"),
    ("loss", r"cross_entropy|softmax|nll|loss"),
    ("copies", r"memcpy|memset|copy|catarray|::(cat|fill_|zero_|clone)\b|scatter|gather|index"),
    (
        "elementwise",
        r"elementwise|triton|gelu|silu|swiglu|rope|rotary|reduce|::(add|mul|sub|div|where|sum)",
    ),
)
LISTED = 60
GAPS_LISTED = 12


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One run of a kernel.

    Args:
        name: as the profiler knows it.
        start, end: when it ran, in microseconds.
        own: microseconds of its own, without those of operators that it called (on a CPU).
    """

    name: str
    start: float
    end: float
    own: float


def record(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """Record the kernels that a step runs; on a CPU, torch's operators."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return [
        Kernel(
            name=event.name,
            start=event.time_range.start,
            end=event.time_range.end,
            own=event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total,
        )
        for event in found.events()
        if event.device_type == wanted and not event.is_user_annotation
    ]


def group_of(name: str) -> str:
    """Return the group of a kernel."""
    return next(
        (group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), "other"
    )


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A time in which nothing ran.

    Args:
        us: how long, in microseconds.
        behind, before: names of the kernels around it.
    """

    us: float
    behind: str
    before: str


def gaps(kernels: list[Kernel]) -> list[Gap]:
    """List the times in which nothing ran, in their order."""
    found = []
    last = None
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if last is not None and kernel.start > last.end:
            us = kernel.start - last.end
            found.append(Gap(us=us, behind=last.name[:90], before=kernel.name[:90]))
        if last is None or kernel.end > last.end:
            last = kernel
    return found


def _span_us(kernels: list[Kernel]) -> float:
    return max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)


def table(kernels: list[Kernel]) -> dict[str, object]:
    """Milliseconds of each group, of nothing at all (idle), and of the kernels that take longest.

    Kernels of several streams can run at once, so the groups may add up to more than the span.
    """
    if not kernels:
        return {"span_ms": 0.0, "groups_ms": {}, "longest": []}
    span = _span_us(kernels)
    idle = gaps(kernels)
    groups: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        groups[group_of(kernel.name)] += kernel.own / 1e3
        names[kernel.name].append(kernel.own / 1e3)
    groups["idle"] = sum(gap.us for gap in idle) / 1e3
    longest = sorted(names.items(), key=lambda entry: -sum(entry[1]))[:LISTED]
    return {
        "span_ms": round(span / 1e3, 3),
        "groups_ms": {
            name: round(ms, 3) for name, ms in sorted(groups.items(), key=lambda entry: -entry[1])
        },
        "gaps": [
            {"us": round(gap.us, 1), "behind": gap.behind, "before": gap.before}
            for gap in sorted(idle, key=lambda gap: -gap.us)[:GAPS_LISTED]
        ],
        "longest": [
            {
                "name": name[:120],
                "group": group_of(name),
                "ms": round(sum(each), 3),
                "calls": len(each),
            }
            for name, each in longest
        ],
    }
