"""What tells processes apart: their numbers mean something in one namespace of one boot alone, and
are given again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """What tells a process from all others.

    Args:
        boot: identifies the machine's boot; empty if it has none.
        namespace: identifies what process numbers are relative to; empty if unknown.
        pid: number of the process.
        started: start of the process, in the kernel's ticks since boot; empty if unknown.
    """

    boot: str
    namespace: str
    pid: int
    started: str

    @property
    def is_here(self) -> bool:
        """Whether the number means something to this process, and can be looked up."""
        return bool(self.boot and self.namespace and self.started) and (
            (self.boot, self.namespace) == (boot_id(), namespace_id())
        )

    @property
    def has_ended(self) -> bool:
        """Whether the process, which ``is_here``, has ended."""
        return start_ticks(self.pid) != self.started


def this_process() -> ProcessId:
    """Return what tells this process from all others."""
    pid = os.getpid()
    started = start_ticks(pid) or ""
    return ProcessId(boot=boot_id(), namespace=namespace_id(), pid=pid, started=started)


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
