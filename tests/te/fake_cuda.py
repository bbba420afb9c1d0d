"""A CUDA device that is not there, for one process: tensors of torch's ``FakeTensorMode`` say that
they are on it, and have shapes and dtypes but no values. The process may stand for any rank of a
world, whose other ranks are not there either.

``libraries`` compiles two small libraries, which the process must be started with: a stand-in for
the driver, and for torch's count of devices. ``pretend`` then gives a Hopper GPU's answers.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

from tests.te.exchanges import Exchanges

exchanges = Exchanges()
"""What this process was asked to exchange since it has joined."""
DEVICES = """
extern "C" { int fake_devices = 0; }
namespace c10::cuda {
signed char device_count() noexcept { return fake_devices; }
signed char device_count_ensure_non_zero() { return fake_devices; }
}
"""
CONTEXT = "int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { *f = 0; *a = 0; return 0; }"


def libraries(folder: Path) -> dict[str, str]:
    """Compile the libraries into ``folder`` and return the environment that loads them."""
    origin = Path(importlib.util.find_spec("torch").origin)
    needs = ["nm", "-D", "-u", str(origin.parent / "lib" / "libcaffe2_nvrtc.so")]
    symbols = subprocess.run(needs, capture_output=True, text=True, check=True).stdout.split()
    names = {name.split("@")[0] for name in symbols if name.startswith("cu")}
    functions = [f"int {name}(void) {{ return 0; }}" for name in sorted(names)]
    own = [line for line in functions if "cuDevicePrimaryCtxGetState" not in line]
    driver = folder / "libcuda.so.1"
    count = folder / "count.so"
    (folder / "driver.c").write_text("\n".join([*own, CONTEXT]))
    (folder / "count.cpp").write_text(DEVICES)
    shared = ["-shared", "-fPIC", "-o"]
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run(["gcc", soname, *shared, driver, folder / "driver.c"], check=True)
    subprocess.run(["g++", *shared, count, folder / "count.cpp"], check=True)
    return {
        "LD_PRELOAD": str(count),
        "LD_LIBRARY_PATH": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
    }


class Nothing:
    """A stream, an event, a handle: whatever is asked of it does nothing."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **settings: None

    def record_event(self, *args: Any) -> Nothing:
        """Return an event."""
        return Nothing()

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *error: Any) -> None:
        return None


def _ignore(*args: Any, **settings: Any) -> None:
    return None


def pretend() -> None:
    """Make torch answer as on one Hopper GPU, with one rank, for the rest of the process; ``join``
    makes it another rank of more.
    """
    import torch
    import torch._dynamo  # before functions that it wraps are replaced
    import transformer_engine.pytorch  # noqa: F401  its import looks at the real device
    from torch._subclasses import fake_tensor

    torch._C._ensureCUDADeviceGuardSet()
    # Only now: the guard that was just chosen is one that does nothing. 64, because autograd asks
    # for every device that torch could have.
    ctypes.c_int.in_dll(ctypes.CDLL(None), "fake_devices").value = 64
    torch.autograd.set_multithreading_enabled(False)
    fake_tensor.init_gpu_context = _ignore
    fake_tensor.FakeTensorMode.avoid_device_init = True
    torch.compile = lambda function=None, **settings: function or (lambda inner: inner)
    torch.nn.Module.to = _move
    _answer(torch.cuda)
    _answer_for_others(torch.distributed)
    join(0, 1)


def _answer(cuda: Any) -> None:
    import torch

    properties = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="Hopper", total_memory=80 * 2**30
    )
    for name in ("synchronize", "set_device", "manual_seed", "manual_seed_all", "empty_cache"):
        setattr(cuda, name, _ignore)
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.get_device_properties = lambda *args: properties
    cuda.Stream = Nothing
    cuda.Event = Nothing
    cuda.current_stream = Nothing
    cuda.default_stream = Nothing
    cuda.stream = Nothing
    cuda.is_current_stream_capturing = lambda: False
    cuda.memory_allocated = lambda *args: 0
    cuda.max_memory_allocated = lambda *args: 0
    cuda.nvtx.range_push = _ignore
    cuda.nvtx.range_pop = _ignore

    def state(*args: Any, **settings: Any) -> Any:
        return torch.zeros(16, dtype=torch.uint8)

    for module in (cuda, cuda.random):
        module.get_rng_state = state
        module.set_rng_state = _ignore
        module._lazy_init = _ignore
        module._lazy_call = _ignore
    engine = sys.modules["transformer_engine.pytorch.distributed"]
    engine._get_cuda_rng_state = state
    engine._set_cuda_rng_state = _ignore


def join(rank: int, ranks: int) -> None:
    """Start torch's ``fake`` process group anew, as this rank of so many."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    exchanges.lines.clear()


def _answer_for_others(dist: Any) -> None:
    """Let exchanges do nothing but be noted: what they fill is there already, and has no values."""
    exchanges.install(dist)

    def all_gather_object(found: list[Any], one: Any, group: Any = None) -> None:
        found[:] = [one] * len(found)

    dist.all_gather_object = all_gather_object
    new_group = dist.new_group

    def fake_group(ranks: Any = None, *args: Any, **settings: Any) -> Any:
        return new_group(ranks, backend="fake")

    dist.new_group = fake_group


def _move(module: Any, *given: Any) -> Any:
    """Stand for ``Module.to``, which cannot exchange fake parameters."""
    import torch

    (device, dtype, *_) = torch._C._nn._parse_to(*given)

    def moved_to(tensor: Any) -> Any:
        kind = dtype if tensor.is_floating_point() else None
        return torch.empty_like(tensor, device=device, dtype=kind)

    for inner in module.modules():
        for name, weight in list(inner._parameters.items()):
            if weight is None:
                continue
            fresh = moved_to(weight)
            if (fresh.device, fresh.dtype) != (weight.device, weight.dtype):
                moved = torch.nn.Parameter(fresh, requires_grad=weight.requires_grad)
                marks = vars(weight).items()
                kept = {key: value for key, value in marks if not key.startswith(("fake", "const"))}
                moved.__dict__.update({key: kept[key] for key in kept if key != "_constant"})
                inner._parameters[name] = moved
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                inner._buffers[name] = moved_to(buffer)
    return module
