"""The variables that CUDA, NCCL and gloo read, set and checked without importing any of them."""

from __future__ import annotations

import os
import socket


def set_environment(deterministic: bool) -> None:
    """Set the variables that CUDA and its libraries read when they are first used. Call it before.

    Args:
        deterministic: use only kernels that give the same bits each time.
    """
    # megatron-core relies on it to start a collective before the matrix product that is to hide it,
    # up to Hopper.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if deterministic:
        os.environ.update(
            CUBLAS_WORKSPACE_CONFIG=":4096:8",
            NCCL_ALGO="Ring",
            NVTE_ALLOW_NONDETERMINISTIC_ALGO="0",
        )


def check_interfaces(uses_nccl: bool) -> None:
    """Check that this machine has the network interfaces that gloo and NCCL are told to use: their
    own errors name neither the variable nor what there is.

    Gloo takes whole names. NCCL takes names that begin so, after ``=`` whole ones, each with a port
    behind a colon or not; after ``^`` those that it leaves out, which need not be there.

    Args:
        uses_nccl: whether NCCL will read what is for it.

    Raises:
        ValueError: there is none; names the variable.
    """
    there = sorted(name for _, name in socket.if_nameindex())
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in there:
            raise ValueError(_absent("GLOO_SOCKET_IFNAME", name, there))
    given = os.environ.get("NCCL_SOCKET_IFNAME", "") if uses_nccl else ""
    names = [name.partition(":")[0] for name in given.removeprefix("=").split(",") if name]
    is_exact = given.startswith("=")
    found = [
        name for name in there if (name in names if is_exact else name.startswith(tuple(names)))
    ]
    if names and not given.startswith("^") and not found:
        raise ValueError(_absent("NCCL_SOCKET_IFNAME", given, there))


def _absent(variable: str, given: str, there: list[str]) -> str:
    return (
        f"{variable}={os.environ[variable]} in the environment: {socket.gethostname()} has no"
        f" network interface {given}; it has {', '.join(there)}. Name one of these, or unset it"
    )
