"""Whether all ranks are about to run the same: they meet in a key-value store, before any process
group exists.

A rank that reads another configuration, another version of the code or a stale folder makes a run
hang, or worse, train on. Every rank posts what it sees, the first one compares, and all get its
verdict.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import platform
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megavlm
from megavlm.config.cli import to_settings
from megavlm.config.schema import Config
from megavlm.config.yaml_file import flat
from megavlm.data.store.manifest import FILE_NAME as MANIFEST_NAME
from megavlm.data.store.manifest import read_manifest
from megavlm.health.rank_names import named
from megavlm.io.storage import open_folder

# What computes; a difference in any of these can change results or the order of collectives.
_PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "numpy",
    "transformers",
    "safetensors",
)
_MOST_LINES = 20
_FAREWELL_SECONDS = 5.0


class DisagreementError(RuntimeError):
    """The ranks cannot start together; the message names every rank that is wrong, and in what."""


@dataclass(frozen=True, kw_only=True)
class RankView:
    """What one rank sees of the run.

    Args:
        problem: why it cannot start; empty if it can.
        facts: what must be the same on every rank, by name.
        host: name of its node.
    """

    problem: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    host: str = field(default_factory=socket.gethostname)


def snapshot(config: Config, start: object) -> dict[str, str]:
    """Collect the facts of this rank.

    Args:
        config: the run.
        start: what it would start from, a folder or parts; none for fresh weights. Only its text is
            looked at.
    """
    facts = {f"--{key}": _shown(value) for key, value in flat(to_settings(config))}
    facts |= {
        "it starts from": str(start),
        "python": platform.python_version(),
        "CUDA": str(torch.cuda.is_available()).lower(),
    }
    if torch.cuda.is_available():
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    facts |= {package: _version(package) for package in _PACKAGES}
    for flag, folder in (
        *(("--data.train", folder) for folder in config.data.train_folders),
        ("--data.valid", config.data.valid),
    ):
        if folder:
            facts[f"packs in {flag} {folder}"] = str(read_manifest(folder).totals.packs)
            files = open_folder(folder)
            facts[f"{MANIFEST_NAME} of {flag} {folder}"] = _digest(
                files.read(MANIFEST_NAME, 0, files.size(MANIFEST_NAME))
            )
    package = Path(megavlm.__file__).parent
    facts |= {
        f"code of {path.relative_to(package.parent)}": _digest(path.read_bytes())
        for path in sorted(package.rglob("*.py"))
    }
    return facts


def check_consistency(
    store: dist.Store,
    rank: int,
    size: int,
    view: RankView,
    timeout: timedelta,
    tell: Callable[[str], None],
) -> None:
    """Compare the views of all ranks. Collective: every rank calls it.

    Args:
        store: shared by the ranks.
        rank, size: of the world.
        view: what this rank sees.
        timeout: how long to wait for the others.
        tell: prints the problem; called on the first rank before any rank exits, because torchrun
            kills the job as soon as one rank exits.

    Raises:
        DisagreementError: on every rank, with the same message.
        RuntimeError: the first rank has not come.
    """
    store = dist.PrefixStore("preflight", store)
    _post(store, rank, view)
    if rank == 0:
        verdict = _verdict(store, size, timeout)
        if verdict:
            tell(verdict)
        store.set("verdict", verdict)
    try:
        store.wait(["verdict"], 2 * timeout)
    except RuntimeError:
        raise RuntimeError(f"rank 0 has not come within {_minutes(2 * timeout)}") from None
    verdict = store.get("verdict").decode()
    if not verdict:
        return
    # Where the first rank serves the store, it must not leave before the others have read.
    store.add("read", 1)
    patience = time.monotonic() + _FAREWELL_SECONDS
    while rank == 0 and store.add("read", 0) < size and time.monotonic() < patience:
        time.sleep(0.01)
    raise DisagreementError(verdict)


def _post(store: dist.Store, rank: int, view: RankView) -> None:
    """Post the view of a rank. Facts are long, and those of a thousand ranks are nearly always the
    same: one of the ranks that see the same posts them, the others only name them.
    """
    facts = json.dumps(dict(view.facts))
    name = hashlib.sha256(facts.encode()).hexdigest()
    if store.add(f"ranks/{name}", 1) == 1:
        store.set(f"facts/{name}", facts)
    store.set(f"view/{rank}", json.dumps([view.problem, view.host, name]))


def _verdict(store: dist.Store, size: int, timeout: timedelta) -> str:
    keys = [f"view/{rank}" for rank in range(size)]
    try:
        store.wait(keys, timeout)
    except RuntimeError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        return f"{named(missing)} of {size} have not come within {_minutes(timeout)}"
    views = _read(store, keys)
    return problems(views) or "\n  ".join(_headed(differences(views)))


def _read(store: dist.Store, keys: Sequence[str]) -> list[RankView]:
    """Read the views of all ranks; those that see the same share one table of facts."""
    posted = [json.loads(store.get(key)) for key in keys]
    facts = {
        name: json.loads(store.get(f"facts/{name}"))
        for name in dict.fromkeys(name for _, _, name in posted)
    }
    return [
        RankView(problem=problem, facts=facts[name], host=host) for problem, host, name in posted
    ]


def problems(views: Sequence[RankView]) -> str:
    """Why the run cannot start; said once where all ranks say the same, else with the ranks that
    say it. Empty if it can.
    """
    by_text = _ranks_by([view.problem for view in views])
    texts = [text for text in by_text if text]
    if len(by_text) == 1:
        return "".join(texts)
    return "\n".join(f"{_where(by_text[text], views)}: {text}" for text in texts)


def differences(views: Sequence[RankView]) -> list[str]:
    """In what the ranks differ, a line each; what most of them see, or the first of them if there
    is no most, counts as right.
    """
    lines = []
    tables = {id(view.facts): view.facts for view in views}
    if len(tables) == 1:
        return []
    for name in dict.fromkeys(itertools.chain.from_iterable(tables.values())):
        by_value = _ranks_by([view.facts.get(name, "missing") for view in views])
        usual = max(
            by_value, key=lambda value: len(by_value[value])
        )  # the first of equals, which the lowest rank has
        others = f"{named(by_value[usual])}: {usual or 'empty'}"
        lines += [
            f"{_where(ranks, views)}: {name} is {value or 'empty'} ({others})"
            for value, ranks in by_value.items()
            if value != usual
        ]
    return lines


def _headed(lines: list[str]) -> list[str]:
    if not lines:
        return []
    shown = ["the ranks would not run the same; make these equal:", *lines[:_MOST_LINES]]
    if len(lines) > _MOST_LINES:
        shown.append(f"and {len(lines) - _MOST_LINES} differences more")
    return shown


def _ranks_by(values: Sequence[str]) -> dict[str, list[int]]:
    """Group the ranks by value, in the order of the first rank of each."""
    found: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return found


def _where(ranks: Sequence[int], views: Sequence[RankView]) -> str:
    """Name the ranks, and their hosts: ``ranks 8-15 (node1)``."""
    hosts = list(dict.fromkeys(views[rank].host for rank in ranks))
    more = f" and {len(hosts) - 3} others" if len(hosts) > 3 else ""
    return f"{named(ranks)} ({', '.join(hosts[:3])}{more})"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _minutes(time: timedelta) -> str:
    return f"{time.total_seconds() / 60:g} minutes (--parallel.timeout_minutes)"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
