"""Runs the cases one after the other, each in a process of its own with a limit of its own;
whatever happens to one is a row.

While a case runs, the process of the next one already imports what it needs, where the machine has
cores to spare; it touches the device only when it is told to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tools.benchmark.cases import OURS, Case, predicted_gib, shortage

ONE_CASE = Path(__file__).with_name("one_case.py")
# Importing beside a case that is measured needs cores that nobody misses.
CORES_TO_PRELOAD = 8
# The first case compiles what later ones find in the caches, and finds CUDA's libraries on a disk.
FIRST_CASE_LIMIT_S = 180
# One machine: gloo and NCCL need no network. Segments that grow do not break up into pieces.
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformer-engine-torch",
    "flash-attn",
    "transformers",
)
EMPTY = (
    "tokens_per_s",
    "tiles_per_s",
    "step_ms",
    "tflops",
    "mfu",
    "peak_memory_gib",
    "data_wait_ms",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How every case is measured.

    Args:
        packs: packs that a case steps on, in turn.
        workers: loader processes.
        steps_s: seconds for warm-up, and again for the timed steps.
        peak_tflops: what utilisation is a share of.
        memory_gib: of the device; cases that need more are not run. None: not known.
    """

    packs: int
    workers: int
    steps_s: float
    peak_tflops: float
    memory_gib: float | None = None


class CaseProcess:
    """The process of a case.

    Args:
        case: what it measures.
        packs: folder of the packs.
        logs: folder that gets its output and its figures.
        settings: how it measures.
    """

    def __init__(self, case: Case, packs: Path, logs: Path, settings: Settings):
        self.case = case
        self._out = logs / f"{case.name}.json"
        self._log = logs / f"{case.name}.log"
        self._out.unlink(missing_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    str(ONE_CASE),
                    case.name,
                    str(packs),
                    str(self._out),
                    json.dumps(dataclasses.asdict(settings)),
                ],
                env=ENVIRONMENT | os.environ,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that the loader's processes can be ended with it
                text=True,
            )

    def run(self, limit_s: float) -> dict:
        """Let it begin, and return its figures, or an error where there are none after
        ``limit_s``.
        """
        with contextlib.suppress(BrokenPipeError, OSError):
            self._process.stdin.write("go\n")
            self._process.stdin.close()
        try:
            status = self._process.wait(timeout=max(limit_s, 1.0))
            why = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            why = f"not done after {limit_s:.0f} s"
        self.end()
        if self._out.is_file():  # measured, even if the end went wrong
            return json.loads(self._out.read_text()) | {"error": ""}
        lines = [
            line
            for line in self._log.read_text(errors="replace").splitlines()
            if line.strip() and line != "ready"
        ]
        return {"error": f"{why}: {_reason(lines)}", "log": lines[-30:]}

    def end(self) -> None:
        """End it, and all processes that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _reason(lines: list[str]) -> str:
    """Find the message of the last exception in a log, whose lines may begin with a rank's name."""
    lines = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in lines]
    kinds = [line.split(":")[0] if line[:1].strip() else "" for line in lines]
    raised = [number for number, kind in enumerate(kinds) if "Error" in kind or "Exception" in kind]
    if not raised:
        return (lines or ["no output"])[-1].strip()[:400]
    message = lines[raised[-1] : raised[-1] + 1] + list(
        takewhile(lambda line: line.startswith("  "), lines[raised[-1] + 1 :])
    )
    return " ".join(line.strip() for line in message)[:400]


def device_name() -> str:
    """Name, driver and memory of the first GPU, as the driver tells it; the processor where there
    is none. No device is touched.
    """
    question = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader",
    ]
    try:
        answer = subprocess.run(
            question, capture_output=True, text=True, timeout=30, check=True
        ).stdout
        return answer.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return f"no GPU; {platform.machine()} processor"


def device_memory_gib() -> float | None:
    """Return the memory of the first GPU, as the driver tells it; none without a GPU."""
    found = re.search(r"(\d+) MiB", device_name())
    return int(found.group(1)) / 1024 if found else None


def facts() -> dict[str, object]:
    """When and where the results were made."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.isoformat(timespec="seconds"),
        "device": device_name(),
        "cores": os.cpu_count(),
        "versions": versions,
        "commit": _commit(),
        "command": shlex.join(["python", *sys.argv]),
    }


def _commit() -> str:
    """Return the commit of the code, and whether files differ from it; empty outside a clone."""
    command = ["git", "-C", str(ONE_CASE.parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return asked.stdout.strip()


def run_all(
    cases: list[Case],
    packs: Mapping[str, Path],
    logs: Path,
    settings: Settings,
    deadline: float,
) -> Iterator[dict]:
    """Measure each case, in order; yield a row for each, as soon as it is there.

    Args:
        cases: what is measured.
        packs: folders of packs, by ``Case.packs``.
        logs: folder that gets output and figures.
        settings: how it is measured.
        deadline: time of ``time.monotonic`` after which no case begins.
    """
    preload = (os.cpu_count() or 1) >= CORES_TO_PRELOAD
    is_first = True
    fitting = []
    for case in cases:
        lacking = shortage(case, settings.memory_gib)
        if lacking:
            yield _row(case, {"error": lacking}, 0.0)
        else:
            fitting.append(case)
    cases = fitting
    waiting: CaseProcess | None = None
    try:
        for number, case in enumerate(cases):
            left = deadline - time.monotonic()
            began = time.monotonic()
            if left < 10:
                yield _row(
                    case,
                    {"error": "not run: the time limit of the whole benchmark was reached"},
                    0.0,
                )
                continue
            process = waiting or CaseProcess(case, packs[case.packs], logs, settings)
            waiting = None
            try:
                if preload and number + 1 < len(cases):
                    following = cases[number + 1]
                    waiting = CaseProcess(following, packs[following.packs], logs, settings)
                limit_s = max(case.limit_s, FIRST_CASE_LIMIT_S) if is_first else case.limit_s
                is_first = False
                figures = process.run(min(limit_s, left))
            finally:
                process.end()
            yield _row(case, figures, time.monotonic() - began)
    finally:
        if waiting is not None:
            waiting.end()


def _row(case: Case, figures: dict, seconds: float) -> dict:
    """Make a row of the results, with null for what was not measured."""
    named = {
        "name": case.name,
        "model": case.model,
        "stage": case.stage,
        "precision": case.precision,
        "implementation": case.implementation,
        "recompute": case.recompute,
    }
    if case.implementation == OURS:
        named["predicted_gib"] = round(predicted_gib(case), 1)
    return named | dict.fromkeys(EMPTY) | figures | {"case_s": round(seconds, 1)}
