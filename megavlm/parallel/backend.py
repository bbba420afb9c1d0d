"""The backend of a run: CUDA with NCCL, or a CPU with gloo if no CUDA device is found."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megavlm.config import torchrun
from megavlm.io import open_files
from megavlm.parallel import adamw, cpu_backend
from megavlm.parallel.environment import set_environment


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The device of this rank.

    Args:
        device: the device of this rank.
        asynchronous: whether copies and collectives can run beside computation.
    """

    device: torch.device
    asynchronous: bool


def meet(timeout_minutes: int) -> dist.Store:
    """Return the key-value store that torchrun's ranks share. Nothing else is started, and no
    device is touched.

    Args:
        timeout_minutes: how long to wait for the others.
    """
    open_files.allow_many()  # one for each rank, if this one serves the store
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=timeout_minutes)))
    # torchrun keeps its store when it restarts the ranks; what they wrote before must not be read.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"megavlm/{restarts}", store)


def start(
    timeout_minutes: int, *, deterministic: bool = False, store: dist.Store | None = None
) -> Backend:
    """Pick the backend and join the process group of all ranks.

    Args:
        timeout_minutes: how long a collective may wait for a rank.
        deterministic: use only kernels that give the same bits each time.
        store: what ``meet`` returned, if it was called.
    """
    set_environment(deterministic)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        adamw.install_if_none_is_fused()
    else:
        cpu_backend.install()
        device = torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            store=dist.PrefixStore("world", store or meet(timeout_minutes)),
            rank=torchrun.rank(),
            world_size=torchrun.world_size(),
        )
    return Backend(device=device, asynchronous=on_gpu)


def stop() -> None:
    """Destroy the process group of all ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
