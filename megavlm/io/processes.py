"""What tells processes apart: their numbers mean something in one namespace of one boot alone, and
are given again.
"""

from __future__ import annotations

import os
from pathlib import Path


def boot_id() -> str:
    """Return what identifies the boot of this machine; empty if it has nothing of the kind."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def namespace_id() -> str:
    """Return what identifies the namespace of process numbers, which a container may have for
    itself; empty if it is unknown.
    """
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_ticks(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks since boot; none if there is none, or
    only what its parent has not yet taken note of.
    """
    try:
        # The name in brackets may hold anything, so count from behind it: state, then 18 more.
        state, *more = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else more[18]
