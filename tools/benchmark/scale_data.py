"""What depends on the amount of data: opening packs and looking them up, packing; and the search
for a layout by the number of GPUs.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megavlm.config.schema import Config, Data, Training
from megavlm.data.loading.blend import open_blend
from megavlm.data.loading.order import permute
from megavlm.data.loading.step_packs import PACKS_A_LOOK, StepPacks
from megavlm.data.packing.plan import Samples, plan_packs
from megavlm.data.packing.repeats import take
from megavlm.data.packing.source_list import write_sources
from megavlm.data.records.meta_file import Annotations
from megavlm.data.store.index_format import FORM, INDEX_NAME, RECORD
from megavlm.data.store.manifest import Manifest, Shard, Source, parse_manifest, read_manifest
from megavlm.data.store.reader import Reader, check_shards
from megavlm.planner import search
from tools.benchmark.packing import CAPACITY, mix
from tools.planning.options import make_parser, read_config, read_hardware, read_packs

STEPS = 64
SAMPLES = 10**9
MODELS = ("internvl2_5-8b", "internvl2_5-78b", "internvl3_5-30b-a3b")


def make_packs(folder: Path, packs: int, shards: int, *, is_empty: bool = False) -> None:
    """Write a manifest, an index, and names of shards, without packs.

    Args:
        folder: for them.
        packs: in the dataset; a multiple of the shards.
        shards: of as many packs each.
        is_empty: let the index be a hole in the file, which takes no room on the disk.
    """
    folder.mkdir()
    with open(folder / INDEX_NAME, "wb") as index:
        index.write(FORM.header(packs))
        if is_empty:
            index.truncate(FORM.header_bytes + packs * RECORD.itemsize)
        else:
            records = np.zeros(packs, RECORD)
            records["tokens"] = CAPACITY
            records["weight_square"] = 1.0
            index.write(records.tobytes())
    named = [f"packs-{number:05d}" for number in range(shards)]
    for name in named:
        (folder / f"{name}.bin").touch()
    _manifest([Shard(name=name, packs=packs // shards, bin_bytes=0) for name in named], 10).write(
        folder
    )


def _manifest(shards: Sequence[Shard], sources: int) -> Manifest:
    named = [Source(name=f"s{i}", annotations=f"/data/{i}.jsonl") for i in range(sources)]
    facts = dict(vocab_size=1, context_token_id=1, image_size=448, features_per_tile=256)
    return Manifest(
        **facts,
        tokenizer_fingerprint="",
        template="internvl2_5",
        capacity=CAPACITY,
        tile_cap=64,
        sources=tuple(named),
        shards=tuple(shards),
    )


def run_over(folders: Sequence[str], batch: int, group: int) -> Config:
    """Return a run over folders of packs, of which ``group`` that cost alike are drawn together."""
    return Config(
        stage="2",
        model="",
        data=Data(train=",".join(folders), group=group, strata=1),
        training=Training(seed=1, global_batch_size=batch),
    )


def blend(datasets: int, batch: int, work: Path) -> dict[str, float]:
    """Open datasets of 10 shards each as one, and look up the packs of ``STEPS`` steps."""
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        folders = [f"{temporary}/{number}" for number in range(datasets)]
        for folder in folders:
            make_packs(Path(folder), 1000, 10)
        before = psutil.Process().memory_info().rss
        opening = _seconds(lambda: [read_manifest(folder) for folder in folders])
        looking = _seconds(lambda: check_shards(folders))
        opened: list[Any] = []
        run = run_over(folders, batch, group=batch)
        opening += _seconds(lambda: opened.extend(open_blend(run)))
        dataset, plan = opened
        first = _seconds(lambda: plan.pack_ids(0, batch))  # a blend makes its pattern
        steps = StepPacks(dataset, plan, batch)
        count = max(STEPS, datasets * PACKS_A_LOOK // batch)
        at = range(0, count * batch, batch)
        together = _seconds(lambda: [steps.after(consumed) for consumed in at])
        alone = _seconds(lambda: [dataset.records(plan.pack_ids(10**6, batch)) for _ in range(4)])
        grown = psutil.Process().memory_info().rss - before
    return {
        "packs_a_step": batch,
        "opening_s": opening,
        "looking_at_shards_s": looking,
        "pattern_s": first,
        "step_s": together / count,
        "step_looked_up_alone_s": alone / 4,
        "memory_mib": grown / 2**20,
    }


def large_index(packs: int, batch: int, work: Path) -> dict[str, float]:
    """Look up packs in an index of ``packs`` packs, which is a hole in a file: the first step,
    steps in the middle of the fourth epoch, of packs that cost alike and of any, and a column.
    """
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        folder = Path(temporary) / "packs"
        make_packs(folder, packs, 1000, is_empty=True)
        before = psutil.Process().memory_info().rss
        found: dict[str, float] = {"packs_a_step": batch}
        opened: list[Any] = []
        for name, group in (("alike", batch), ("any", 1)):
            run = run_over([str(folder)], batch, group=group)
            opened.clear()
            found["opening_s"] = _seconds(lambda run=run: opened.extend(open_blend(run)))
            steps = StepPacks(*opened, batch)
            found[f"first_step_s_{name}"] = _seconds(lambda steps=steps: steps.after(0))
            later = [packs * 3 + packs // 2 + number * batch for number in range(STEPS)]
            seconds = _seconds(lambda steps=steps, later=later: [steps.after(at) for at in later])
            found[f"step_in_epoch_4_s_{name}"] = seconds / STEPS
        found["memory_mib"] = (psutil.Process().memory_info().rss - before) / 2**20
        found["index_gb"] = packs * RECORD.itemsize / 1e9
        index = Reader(folder, with_shards=False).index
        found["reading_a_column_s"] = _seconds(lambda: index.largest("longest"))
    return found


def shuffling(batch: int) -> dict[str, float]:
    """Place a step's worth of numbers in a permutation of ``SAMPLES``, which nobody holds."""
    numbers = np.arange(batch, dtype=np.int64) + 10**8
    epochs = np.zeros(batch, np.int64)
    seconds = _seconds(lambda: permute(numbers, SAMPLES, 1, epochs))
    return {"samples": SAMPLES, "numbers": batch, "seconds": seconds}


def manifests(shards: int) -> dict[str, float]:
    """Parse the manifest of a dataset of ``shards`` shards."""
    named = [Shard(name=f"packs-{i:05d}", packs=6000, bin_bytes=10**9) for i in range(shards)]
    text = _manifest(named, 10).to_json()
    seconds = _seconds(lambda: parse_manifest(text, "manifest.json"))
    tracemalloc.start()
    kept = parse_manifest(text, "manifest.json")
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "bytes": len(text),
        "parsing_s": seconds,
        "memory_bytes_a_shard": memory / len(kept.shards),
    }


def sources(count: int, work: Path) -> dict[str, float]:
    """Draw samples by the weights of ``count`` annotation files of a million rows in all, and hand
    the list of these to workers.
    """
    named = [
        Annotations(name=f"s{i}", path=f"/data/annotations/{i}.jsonl", root="/data", weight=1.0)
        for i in range(count)
    ]
    rows = np.repeat(np.arange(count, dtype=np.int32), 10**6 // count)
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        listing = _seconds(lambda: write_sources(Path(temporary), named))
    return {"drawing_s": _seconds(lambda: take(rows, named, 0)), "listing_s": listing}


def plan_here(samples: int) -> None:
    """Plan packs of ``samples`` samples in this process, and print time and memory as JSON."""
    tokens, tiles = mix(1000)
    rows = np.arange(samples, dtype=np.int32)
    plan = {"capacity": CAPACITY, "tile_cap": None, "seed": 0}
    plan_packs(Samples(rows=rows[:1000], tokens=tokens, tiles=tiles), **plan)  # compiles
    tokens, tiles = (np.resize(values, samples) for values in mix(min(samples, 10**6)))
    given = Samples(rows=rows, tokens=tokens, tiles=tiles)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin = time.process_time()
    packs = plan_packs(given, **plan).packs
    seconds = time.process_time() - begin
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "packs": packs,
                "seconds": seconds,
                "samples_per_s": samples / seconds,
                "given_bytes_a_sample": 12,
                "more_bytes_a_sample": (most - before) / samples,
            }
        )
    )


def packing(samples: int) -> dict[str, float]:
    """Plan packs in a process of its own, whose memory is taken."""
    script = str(Path(__file__).with_name("scale.py"))
    command = [sys.executable, script, "--plan_here", str(samples)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def layouts(model: str, gpus: int) -> dict[str, Any]:
    """Search for the layouts of stage 2 of a model."""
    words = ["--model", model, "--stage", "2", "--gpus", str(gpus)]
    options, others = make_parser("").parse_known_args(words)
    config = read_config(options, others)
    packs = read_packs(options, config)
    fitting: list[Any] = []

    def find() -> None:
        try:
            fitting.extend(search.find_layouts(config, gpus, packs, read_hardware(options)))
        except ValueError:  # nothing fits
            return

    seconds = _seconds(find)
    return {"model": model, "gpus": gpus, "fitting": len(fitting), "seconds": seconds}


def measure(
    ranks: Sequence[int], sizes: Sequence[int], work: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of all tables, each with the name of its table.

    Args:
        ranks: numbers of ranks; a step has four packs for each.
        sizes: numbers of samples to pack.
        work: where files may lie meanwhile.
    """
    batch = 4 * max(ranks)
    for datasets in (1, 8, 64, 256, 1000):
        yield "blend", {"datasets": datasets} | blend(datasets, batch, work)
    for packs in (10**6, 10**7, 10**8):
        yield "index", {"packs": packs} | large_index(packs, batch, work)
    yield "shuffling", shuffling(batch)
    for shards in (1000, 16384, 100_000):
        yield "manifest", {"shards": shards} | manifests(shards)
    for count in (10, 1000, 10_000, 100_000):
        yield "annotation_files", {"files": count} | sources(count, work)
    for samples in sizes:
        yield "packing", {"samples": samples} | packing(samples)
    for model in MODELS:
        for gpus in ranks:
            yield "planner", layouts(model, gpus)


def _seconds(action: Callable[[], object]) -> float:
    """Return the processor seconds of an action."""
    begin = time.process_time()
    action()
    return time.process_time() - begin
