"""What a user runs first on a new node: versions, which kernels are found, steps of a small MLP
in each precision, bandwidth between GPUs, what is missing and how to install it.

  python -m megavlm.health.doctor                                    one process
  torchrun --nproc_per_node 8 -m megavlm.health.doctor               bandwidth too

It works on a CPU and says so. Exit status 1: something that training needs is missing or fails.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.config import torchrun
from megavlm.parallel import backend

# Distributions, what they are for, and whether training needs them.
PACKAGES = (
    ("torch", "everything", True),
    ("megatron-core", "layers and parallelism", True),
    ("jsonargparse", "the command line", True),
    ("safetensors", "Hugging Face checkpoints", True),
    ("transformers", "tokenizers and exports", True),
    ("transformer-engine", "fused layers, fused attention, FP8, bfloat16 moments", False),
    ("triton", "residual branches, compiled pointwise kernels and the fused loss", False),
    ("numba", "packing and fast resizing", False),
    ("simplejpeg", "faster decoding of JPEG", False),
)
# What NVIDIA's images and nightly builds of torch call the one that they bring.
_OTHER_NAMES = {"triton": "pytorch-triton"}
# A chip's first compute capability that has FP8 products, and MXFP8's.
_FP8 = (8, 9)
_MXFP8 = (10, 0)
_BANDWIDTH_BYTES = 2**26
_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A line of the report.

    Args:
        topic: what was looked at.
        text: what was found, with figures.
        remedy: what to do; empty if nothing.
        is_fault: whether training cannot run so.
    """

    topic: str
    text: str
    remedy: str = ""
    is_fault: bool = False

    def __str__(self) -> str:
        mark = "FAULT" if self.is_fault else "lacks" if self.remedy else "ok"
        remedy = f"\n{'':27}{self.remedy}" if self.remedy else ""
        return f"{mark:6}{self.topic:20} {self.text}{remedy}"


def packages() -> Iterator[Finding]:
    """Look for what training imports."""
    yield Finding(topic="python", text=platform.python_version())
    for name, purpose, is_needed in PACKAGES:
        if version := _version(name) or _version(_OTHER_NAMES.get(name, name)):
            yield Finding(topic=name, text=version)
        else:
            extra = "[pytorch]" if name == "transformer-engine" else ""
            isolated = "--no-build-isolation " if extra else ""
            yield Finding(
                topic=name,
                text=f"not installed; it is for {purpose}",
                remedy=f'pip install {isolated}"{name}{extra}"',
                is_fault=is_needed,
            )


def _version(name: str) -> str:
    """Return the version of a distribution; empty: it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return ""


def device() -> Iterator[Finding]:
    """Look at the GPU, and at what its chip can do."""
    if not torch.cuda.is_available():
        lack = "the driver" if torch.version.cuda else "a CUDA build of torch"
        yield Finding(
            topic="device",
            text="no GPU is found: training runs on this CPU over gloo, in local layers",
            remedy=f"on a machine with a GPU, install {lack}",
        )
        return
    capability = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    name = torch.cuda.get_device_name()
    yield Finding(topic="device", text=f"{name}, {memory:.0f} GiB, compute capability {capability}")
    recipes = "delayed, tensorwise, blockwise" if capability >= _FP8 else "none"
    recipes = f"{recipes}, mxfp8" if capability >= _MXFP8 else recipes
    yield Finding(topic="FP8 recipes", text=f"of this chip: {recipes}")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding(topic="libraries", text=f"CUDA {torch.version.cuda}, NCCL {nccl}")


def kernels() -> Iterator[Finding]:
    """Look for Transformer Engine, and for the headers that its FP8 casts are compiled with."""
    if importlib.util.find_spec("transformer_engine") is None or not torch.cuda.is_available():
        yield Finding(
            topic="layers", text="local: --training.kernels auto takes megatron-core's own"
        )
        return
    yield Finding(topic="layers", text="Transformer Engine's, in 16 bits")
    yield _cudnn()
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        yield Finding(
            topic="CUDA headers",
            text="neither nvcc nor CUDA_HOME is found; FP8 casts are compiled with the headers",
            remedy="set CUDA_HOME, or NVTE_DISABLE_NVRTC=1 for casts compiled beforehand",
        )


def _cudnn() -> Finding:
    """Look for the cuDNN of fused attention: Transformer Engine loads the first that it finds,
    CUDA's own before the one that torch brings.
    """
    try:
        found = torch.backends.cudnn.version()
    except RuntimeError as error:
        return Finding(
            topic="attention",
            text=f"another cuDNN than torch's was loaded: {str(error).splitlines()[0]}",
            remedy="training runs, with the other one's attention; to get torch's, remove the"
            " system's package of cuDNN (libcudnn9), or install it at torch's version",
        )
    return Finding(topic="attention", text=f"cuDNN {found}, fused")


def _linear_step(dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Return a step of a small MLP: forward, backward, update."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(_ROWS, _ROWS), torch.nn.GELU(), torch.nn.Linear(_ROWS, _ROWS)
    ).to(device, dtype)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-3)
    inputs = torch.randn(_ROWS, _ROWS, device=device, dtype=dtype)

    def step() -> Tensor:
        loss = layers(inputs).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _fp8_step(device: torch.device) -> Callable[[], Tensor]:
    """Return a step of one Transformer Engine layer in FP8."""
    import transformer_engine.pytorch as engine

    layer = engine.LayerNormLinear(_ROWS, _ROWS, params_dtype=torch.bfloat16, device=device)
    inputs = torch.randn(_ROWS, _ROWS, device=device, dtype=torch.bfloat16)

    def step() -> Tensor:
        with engine.fp8_autocast(enabled=True):
            loss = layer(inputs).float().square().mean()
        loss.backward()
        return loss.detach()

    return step


def steps(device: torch.device) -> Iterator[Finding]:
    """Run three steps of a small MLP in each precision; losses must be finite."""
    runs: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "float32": lambda: _linear_step(torch.float32, device),
        "bfloat16": lambda: _linear_step(torch.bfloat16, device),
    }
    found = importlib.util.find_spec("transformer_engine") is not None
    if found and device.type == "cuda" and torch.cuda.get_device_capability() >= _FP8:
        runs["fp8"] = lambda: _fp8_step(device)
    for name, make in runs.items():
        began = time.perf_counter()
        try:
            step = make()
            losses = [float(step()) for _ in range(3)]
        except (RuntimeError, ValueError, OSError, ImportError, AssertionError) as error:
            message = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding(
                topic=f"step in {name}",
                text=message,
                remedy="the kernels of this precision do not run here: see docs/performance.md",
                is_fault=True,
            )
            continue
        seconds = time.perf_counter() - began
        is_sound = all(loss == loss and loss < 1e3 for loss in losses)
        yield Finding(
            topic=f"step in {name}",
            text=f"losses {', '.join(f'{loss:.4f}' for loss in losses)} in {seconds:.2f} s",
            remedy="" if is_sound else "a loss is not finite: check the GPU's memory for errors",
            is_fault=not is_sound,
        )


def bandwidth(device: torch.device) -> Iterator[Finding]:
    """Sum 64 MB over all ranks. Collective."""
    ranks = dist.get_world_size()
    library = dist.get_backend()
    if ranks == 1:
        yield Finding(
            topic="bandwidth",
            text=f"one rank over {library}: nothing to measure; torchrun starts several",
        )
        return
    sent = torch.ones(_BANDWIDTH_BYTES // 4, device=device)
    times = []
    for _ in range(5):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(sent)
        float(sent[0])  # waits for the device
        times.append(time.perf_counter() - began)
    rate = 2 * (ranks - 1) / ranks * _BANDWIDTH_BYTES / min(times) / 1e9
    yield Finding(
        topic="bandwidth", text=f"{rate:.1f} GB/s of all-reduce over {ranks} ranks, {library}"
    )


def examine() -> list[Finding]:
    """Look at everything. Collective if torchrun started several ranks."""
    found = list(packages())
    if any(one.is_fault for one in found):
        return found
    running = backend.start(5)
    try:
        found += [*device(), *kernels(), *steps(running.device), *bandwidth(running.device)]
    finally:
        backend.stop()
    return found


def main() -> int:
    """Print the report on the first rank; return the exit status."""
    found = examine()
    if torchrun.rank() == 0:
        print("\n".join(map(str, found)))
        faults = sum(one.is_fault for one in found)
        print(f"\n{faults} faults" if faults else "\nready to train")
    return 1 if any(one.is_fault for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
