"""Where this process is: its Python stacks, and the collectives that it waits in."""

from __future__ import annotations

import json
import sys
import threading
import traceback
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

_MOST_FRAMES = 12


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective that has begun on this rank and has not ended.

    Args:
        name: what it does, such as ``gloo:all_reduce``.
        group: the process group's description, or its number where it has none.
        number: how many came before it in its group.
        shapes: of its inputs.
    """

    name: str
    group: str
    number: int
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        return f"{self.name} number {self.number} of group {self.group}, on {shapes or 'nothing'}"


def pending() -> list[Collective]:
    """List the collectives that this rank waits in, the oldest first, from torch's flight recorder;
    empty if torch has none.
    """
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    recorder = vars(torch._C._distributed_c10d).get(
        "_dump_nccl_trace_json" if on_gpu else "_dump_fr_trace_json"
    )
    if recorder is None:
        return []
    entries = [
        entry
        for entry in json.loads(recorder()).get("entries", [])
        if not entry["retired"] and entry["state"] != "completed"
    ]
    return [_collective(entry) for entry in sorted(entries, key=lambda entry: entry["record_id"])]


def _collective(entry: dict) -> Collective:
    number, description = entry["process_group"]
    return Collective(
        name=entry["profiling_name"],
        group=number if description == "undefined" else description,
        number=entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
        shapes=tuple(tuple(shape) for shape in entry["input_sizes"]),
    )


def stacks() -> str:
    """Return the innermost calls of the main thread, and of the threads of autograd, which run the
    backward pass on a GPU.
    """
    frames = sys._current_frames()
    main = threading.main_thread().ident
    named = {thread.ident for thread in threading.enumerate()}
    found = [("main thread", frames[main])] + [
        ("backward pass", frame) for ident, frame in frames.items() if ident not in named
    ]
    return "\n".join(f"{name}:\n{_calls(frame)}" for name, frame in found)


def _calls(frame: FrameType) -> str:
    """Return the innermost calls, without those by which torch's modules call each other."""
    calls = [
        call
        for call in traceback.extract_stack(frame)
        if not call.filename.endswith("torch/nn/modules/module.py")
    ]
    return "\n".join(
        f"  {call.filename}:{call.lineno} {call.name}: {call.line}"
        for call in calls[-_MOST_FRAMES:]
    )
