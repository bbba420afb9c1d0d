"""What depends on the number of ranks: their start, their checkpoints. One process measures for all
of them: what one rank holds, and what the first rank has to do for the others.
"""

from __future__ import annotations

import json
import pickle
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megavlm.checkpoint import checksums, directory, shared_loading, step_folder, train_state
from megavlm.checkpoint.train_state import State
from megavlm.config.cli import parse, to_yaml
from megavlm.config.schema import Config, Health, Parallel
from megavlm.health import speed_check, watchdog
from megavlm.health.preflight import RankView, check_consistency, snapshot
from megavlm.planner.flops import pieces

# The numbers of layers of internvl2_5-8b, which descriptions depend on, and no real widths.
LAYERS = ("--architecture.vision.num_layers", "24", "--architecture.language.num_layers", "32")
_TIMEOUT = timedelta(seconds=300)


def start(ranks: int) -> dict[str, Any]:
    """Let threads that stand for ranks compare the facts of a run through a real TCPStore, each by
    a connection of its own.
    """
    facts = snapshot(parse(["--stage", "2", "--model", "tiny"]), None)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=_TIMEOUT)

    def connected(rank: int) -> dist.Store:
        return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=_TIMEOUT)

    def agree(rank: int) -> None:
        view = RankView(facts=dict(facts), host=f"node{rank // 8}")
        check_consistency(stores[rank], rank, ranks, view, _TIMEOUT, print)

    with ThreadPoolExecutor(ranks) as pool:
        stores = list(pool.map(connected, range(ranks)))
        begin = time.perf_counter()
        list(pool.map(agree, range(ranks)))
    seconds = time.perf_counter() - begin
    views = sum(len(stores[0].get(f"preflight/view/{rank}")) for rank in range(ranks))
    table = len(json.dumps(facts))
    return {
        "comparing_s": seconds,
        "posted_mb": (views + table) / 1e6,
        "posted_mb_if_each_posted_all": (views + ranks * table) / 1e6,
    }


def reports(ranks: int) -> dict[str, float]:
    """Measure what one rank does with what all of them say: processor seconds of the speed check's
    findings and of the hang report.
    """
    values = tuple(100.0 + rank % 7 for rank in range(ranks))
    speeds = speed_check.Speeds(
        hosts=tuple(f"node{rank // 8}" for rank in range(ranks)),
        compute=values,
        clock=values,
        pairs={1: values, 8: values},
        groups={"tensor": values, "data": values},
        members={
            "tensor": tuple(rank // 8 * 8 for rank in range(ranks)),
            "data": tuple(rank % 8 for rank in range(ranks)),
        },
        seconds=1.0,
    )
    stack = "\n".join(f"  file.py:{line} call: work()" for line in range(24))
    answers = {
        rank: watchdog.Answer(
            host="node", doing="step 4", progress=(4, 1), waits_in=(f"{rank % 8}",), stacks=stack
        )
        for rank in range(ranks)
    }
    return {
        "speed_findings_s": _seconds(lambda: speed_check.findings(speeds, Health(), on_gpu=True)),
        "hang_report_s": _seconds(lambda: watchdog.report(answers, ranks, 60.0)),
    }


def process_groups(ranks: int) -> dict[str, float]:
    """Count the process groups that megatron-core makes on each rank, and the processor seconds
    that one rank takes for it without a network.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megavlm.parallel import cpu_backend
    from megavlm.parallel import process_groups as groups

    cpu_backend.install()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    made = []
    new_group = dist.new_group

    def counted(*rest: Any, backend: str | None = None, **options: Any) -> dist.ProcessGroup:
        made.append(backend)  # that of a group of its own kind, which a network would be needed for
        return new_group(*rest, **options)

    with mock.patch.object(dist, "new_group", counted):
        seconds = _seconds(lambda: groups.create(Parallel(), 0))
    groups.destroy()
    dist.destroy_process_group()
    return {"new_groups": len(made), "seconds": seconds}


def descriptions() -> dict[str, Any]:
    """Return the bytes in which a rank describes the shards of an 8B model: all, as megatron-core
    tells every rank, and as the first rank is told of those that are written; and the bytes of the
    names and sizes of all weights, which the freeze mask exchanges.
    """
    import zlib

    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase, apply_factories
    from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

    from megavlm.model.weights import weight_sizes
    from megavlm.parallel import backend
    from megavlm.parallel import process_groups as groups
    from megavlm.planner.layout import make_layout
    from megavlm.train import checkpoint
    from megavlm.train.build_model import build_model

    config = parse(["--stage", "2", "--model", "tiny", *LAYERS])
    with tempfile.TemporaryDirectory() as folder:
        device = backend.start(5, store=dist.FileStore(f"{folder}/store", 1))
        layout = make_layout(config)
        made = groups.create(config.parallel, 0, layout.embedding_chunk)
        built = build_model(config, layout, made, device, lambda chunks: None)
        state = checkpoint.sharded(built.chunks, built.optimizer, config.fp8, is_loading=True)
        apply_factories(state)
        shards = [one for one in nested_values(state) if isinstance(one, ShardedBase)]
        told = pickle.dumps([one.without_data() for one in shards])
        sizes = {key: (size, True) for key, size in weight_sizes(built.chunks[0]).items()}
        found = {
            "shards": len(shards),
            "described_bytes": len(told),
            "told_bytes": len(zlib.compress(told, 1)),
            "weight_names_bytes": len(pickle.dumps(sizes)),
            "unpickling_s": _seconds(lambda: pickle.loads(told)),
            "checking_s": _seconds(lambda: validate_sharding_integrity([pickle.loads(told)])),
        }
        groups.destroy()
        backend.stop()
    return found


def saving(ranks: int, of_rank: dict[str, Any]) -> dict[str, float]:
    """Return what a rank holds of others' descriptions at a save, with data parallelism alone:
    computed from the bytes of one rank.
    """
    return {
        "described_mb_on_each_rank_by_megatron_core": ranks * of_rank["described_bytes"] / 1e6,
        "unpickling_s_on_each_rank_by_megatron_core": ranks * of_rank["unpickling_s"],
        "described_mb_on_first_rank": of_rank["told_bytes"] / 1e6,
        "described_mb_on_others": 0.0,
    }


def loading(ranks: int) -> dict[str, float]:
    """Return what data-parallel ranks read of a checkpoint of internvl2_5-8b: weights of 16 bits,
    master weights and two moments of 32. Nothing is read.
    """
    config = parse(["--stage", "2", "--model", "internvl2_5-8b"])
    weights = [piece.elements for piece in pieces(config.architecture) if piece.elements]
    sizes = [count * width for count in weights for width in (2, 4, 4, 4)]
    begin = time.process_time()
    owners = shared_loading.spread(sizes, ranks)
    seconds = time.process_time() - begin
    shares = [0] * ranks
    for owner, size in zip(owners, sizes, strict=True):
        shares[owner] += size
    return {
        "read_gb_if_each_read_all": ranks * sum(sizes) / 1e9,
        "read_gb": sum(shares) / 1e9,
        "largest_share_gb": max(shares) / 1e9,
        "dividing_s": seconds,
    }


def folder(ranks: int, work: Path) -> dict[str, float]:
    """Measure what the first rank does with a checkpoint of ``2 * ranks`` files of shards, as many
    as there are if no rank has a replica: noting checksums, finding the step, removing it.
    """
    config: Config = parse(["--stage", "2", "--model", "tiny"])
    root = Path(tempfile.mkdtemp(dir=work))
    steps = [root / directory.step_name(number) for number in (1, 2)]
    sums = {f"shards/__{rank}_{part}.distcp": (0, 0) for rank in range(ranks) for part in (0, 1)}
    noting = []
    for number, step in enumerate(steps, start=1):
        (step / "shards").mkdir(parents=True)
        for name in sums:
            (step / name).touch()
        (step / step_folder.CONFIG_NAME).write_text(to_yaml(config))
        train_state.write(State(step=number), step)
        noting.append(_seconds(lambda step=step: checksums.write(step, sums)))
    return {
        "files": len(sums),
        "noting_s": min(noting),
        "checksums_kb": (steps[0] / checksums.FILE_NAME).stat().st_size / 1e3,
        "finding_s": _seconds(lambda: step_folder.find(root)),
        "removing_s": _seconds(lambda: directory.drop_old(root, steps[1], 1, 0)),
    }


def measure(ranks: list[int], work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of all tables, each with the name of its table."""
    for count in ranks:
        yield "start", {"ranks": count} | start(count)
    for count in ranks:
        yield "reports", {"ranks": count} | reports(count)
    for count in ranks:
        yield "process_groups", {"ranks": count} | process_groups(count)
    of_rank = descriptions()
    yield "descriptions", of_rank
    for count in ranks:
        yield "saving", {"ranks": count} | saving(count, of_rank)
    for count in ranks:
        yield "loading", {"ranks": count} | loading(count)
    for count in ranks:
        yield "checkpoint_folder", {"ranks": count} | folder(count, work)


def _seconds(action: Any) -> float:
    """Return the processor seconds of an action."""
    begin = time.process_time()
    action()
    return time.process_time() - begin
