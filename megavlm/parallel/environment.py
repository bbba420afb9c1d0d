"""The variables that CUDA and its libraries read, set without importing any of them."""

from __future__ import annotations

import os


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
