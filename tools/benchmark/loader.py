"""The loader's speed on one core, and how soon it starts in a very large dataset.

Three ways from a JPEG file to normalised float tensors of tiles, over the same images, one after
the other on one core:

- ours: a pack is read and checked, its images become uint8 tiles, which are normalised as the model
  does;
- InternVL's: Pillow opens and converts, resizes to the grid, crops each tile, and each tile goes
  through a transform of its own as in
  torchvision (resize, to float, normalise), to be stacked;
- the limit: JPEG decoding alone, by the fastest decoder that is installed.

Tiles a second are of processor time. Then a dataset of 100 million packs (an index of 8 GB; the
packs themselves are links to a few real ones) is used as a training run does, with worker
processes, each time by a fresh process that has imported megavlm.data and nothing more:

- ``first_batch_s``: seconds by the clock from before the dataset is opened and its workers are
  started, until the first batch is in hand;
- ``seek_s``: the same for a run that resumes at step one million;
- ``index_memory_mib``: what the memory of the process that trains grows by meanwhile, and while a
  thousand steps look up their packs.

The fastest of some runs counts.

    python tools/benchmark/loader.py --work /tmp/loader_benchmark --json loader.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from figures import write_figures
from photographs import write_jpegs, write_records
from PIL import Image

from megavlm.data.images import decode
from megavlm.data.images.jpeg import decode_jpeg
from megavlm.data.images.tiling import Tiling
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.loader import batches
from megavlm.data.loading.order import Plan
from megavlm.data.packing.job import Job, pack_dataset
from megavlm.data.records.meta_file import single_source
from megavlm.data.store.index_format import FORM, INDEX_NAME, RECORD
from megavlm.data.store.manifest import read_manifest

ROOT = Path(__file__).parents[2]
SIZE = 448
MEAN, STD = (
    torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
GLOBAL_BATCH = 512
LOOKED_UP_STEPS = 1000


def ours(dataset: PackedDataset) -> int:
    """All packs as normalised tensors; returns the number of tiles."""
    tiles = 0
    room = torch.empty(
        dataset.manifest.tile_cap + 1, 3, SIZE, SIZE
    )  # memory that is used again, as on a GPU
    for pack_id in range(len(dataset)):
        batch = dataset.batch(pack_id, pack_id)
        normalised = room[: len(batch.tiles)]
        torch.mul(batch.tiles, 1 / (255 * STD), out=normalised).sub_(MEAN / STD)
        tiles += len(normalised)
    return tiles


def internvl_way(dataset: PackedDataset, folder: Path) -> int:
    """Decode the same images from their files, tile by tile."""
    tiles = 0
    for pack_id in range(len(dataset)):
        pack = dataset.reader.read(pack_id, with_images=False)
        samples = []
        for row, origin in zip(pack.images, pack.provenance["line"], strict=True):
            with Image.open(folder / f"{origin - 1}.jpg") as file:
                image = file.convert("RGB")
            columns = int(row["columns"])
            rows = int(row["rows"])
            grid = image.resize((columns * SIZE, rows * SIZE), Image.Resampling.BICUBIC)
            corners = [
                (index % columns * SIZE, index // columns * SIZE) for index in range(columns * rows)
            ]
            pieces = [grid.crop((left, top, left + SIZE, top + SIZE)) for left, top in corners]
            if len(pieces) > 1:
                pieces.append(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            samples.append(torch.stack([_transform(piece) for piece in pieces]))
        tiles += len(torch.cat(samples))
    return tiles


def _transform(tile: Image.Image) -> torch.Tensor:
    """Do what torchvision's Resize, ToTensor and Normalize do to a tile."""
    tile = tile.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(tile, copy=True)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub_(MEAN).div_(STD)


def bare_decode(encoded: list[bytes]) -> None:
    """JPEG decoding alone."""
    for data in encoded:
        if decode_jpeg(data, decode.MAX_PIXELS) is None:
            decode._decode(data)


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Processor seconds of the fastest run; unlike the clock's, they do not count other
    programs.
    """
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def speed(work: Path, images: int, repeats: int) -> dict[str, float]:
    """Tiles a second of the three ways."""
    torch.set_num_threads(1)
    write_jpegs(work / "jpegs", images, processes=1)
    write_records(work / "images.jsonl", images)
    tokenizer = str(ROOT / "tests" / "golden" / "tokenizer")
    source = single_source(work / "images.jsonl", work / "jpegs")
    pack_dataset(
        Job(
            sources=source,
            tokenizer=tokenizer,
            out=str(work / "packs"),
            capacity=16384,
            features_per_tile=256,
            tiling=Tiling(tile_size=SIZE),
        )
    )
    dataset = PackedDataset(work / "packs")
    decode.load_decoders()
    tiles = ours(
        dataset
    )  # also reads all files once, so that every way finds them in the page cache
    assert tiles == internvl_way(dataset, work / "jpegs"), "both ways see the same tiles"
    encoded = [(work / "jpegs" / f"{number}.jpg").read_bytes() for number in range(images)]
    best = {"tiles_per_s": 0.0, "internvl_way_tiles_per_s": 0.0, "decode_limit_tiles_per_s": 0.0}
    for _ in range(repeats):  # by turns, so that what else the machine does hits all alike
        for name, way in zip(
            best,
            (
                lambda: ours(dataset),
                lambda: internvl_way(dataset, work / "jpegs"),
                lambda: bare_decode(encoded),
            ),
            strict=True,
        ):
            best[name] = max(best[name], tiles / fastest(way, 1))
    return {
        **best,
        "over_internvl_way": best["tiles_per_s"] / best["internvl_way_tiles_per_s"],
        "tiles": tiles,
        "images": images,
    }


def make_large(small: Path, large: Path, packs: int) -> None:
    """Make a dataset of ``packs`` packs, each a link to one in the first shard of a small
    dataset.
    """
    manifest = read_manifest(small)
    first = manifest.shards[0]
    real = np.fromfile(small / INDEX_NAME, RECORD, first.packs, offset=FORM.header_bytes)
    shards = 16384
    each = -(-packs // 16384)
    large.mkdir()
    sizes = [min(each, packs - number * each) for number in range(shards) if packs > number * each]
    with open(large / INDEX_NAME, "wb") as index:
        index.write(FORM.header(packs))
        for size in sizes:
            index.write(np.resize(real, size).tobytes())
    for number in range(len(sizes)):
        (large / f"packs-{number:05d}.bin").symlink_to(small.absolute() / f"{first.name}.bin")
    names = [
        dataclasses.replace(first, name=f"packs-{number:05d}", packs=size)
        for number, size in enumerate(sizes)
    ]
    dataclasses.replace(manifest, shards=tuple(names)).write(large)


def start_in(folder: Path, step: int, workers: int) -> None:
    """Start at a step of a large dataset in this process, and print how long it takes and what it
    costs, as JSON.
    """
    process = psutil.Process()
    position = step * GLOBAL_BATCH
    before = process.memory_info().rss
    start = time.perf_counter()
    dataset = PackedDataset(folder)
    plan = Plan(num_packs=len(dataset), seed=1, group=GLOBAL_BATCH)
    stream = batches(dataset, plan, range(position, 10**15, GLOBAL_BATCH), workers=workers)
    next(stream)
    seconds = time.perf_counter() - start
    for later in range(LOOKED_UP_STEPS):
        dataset.weight_sum(plan.pack_ids(position + later * GLOBAL_BATCH, GLOBAL_BATCH), "square")
    grown = process.memory_info().rss - before
    stream.close()
    print(json.dumps({"seconds": seconds, "memory_mib": grown / 2**20}))


def starts(folder: Path, repeats: int, workers: int) -> dict[str, float]:
    """Measure the fastest starts at the beginning of a large dataset and far into it, each in a new
    process.
    """
    found = {}
    for name, step in (("first_batch_s", 0), ("seek_s", 10**6)):
        command = [
            sys.executable,
            __file__,
            "--start_in",
            str(folder),
            "--step",
            str(step),
            "--workers",
            str(workers),
        ]
        runs = [
            json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            for _ in range(repeats)
        ]
        found[name] = min(run["seconds"] for run in runs)
        found["index_memory_mib"] = max(
            found.get("index_memory_mib", 0.0), *(run["memory_mib"] for run in runs)
        )
    return found


def parse() -> argparse.Namespace:
    """Read the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, default=300, metavar="N", help="JPEG files (default: %(default)s)"
    )
    parser.add_argument(
        "--packs",
        type=int,
        default=100_000_000,
        metavar="N",
        help="packs of the large dataset (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="runs, of which the fastest counts (default: %(default)s)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="where files may lie meanwhile (default: the system's temporary folder)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    cores = min(4, os.cpu_count() or 1)
    parser.add_argument(
        "--workers",
        type=int,
        default=cores,
        metavar="N",
        help="loader processes at the start (default: %(default)s)",
    )
    parser.add_argument("--start_in", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    options = parse()
    if options.start_in:
        start_in(options.start_in, options.step, options.workers)
        return
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        work = Path(temporary)
        figures = speed(work, options.images, options.repeats)
        print(
            f"ours {figures['tiles_per_s']:,.0f} tiles/s, InternVL's way"
            f" {figures['internvl_way_tiles_per_s']:,.0f}, ",
            end="",
        )
        print(
            f"JPEG decoding alone {figures['decode_limit_tiles_per_s']:,.0f};"
            f" {figures['over_internvl_way']:.2f} x InternVL's way"
        )
        make_large(work / "packs", work / "large", options.packs)
        figures |= {
            "packs": options.packs,
            "workers": options.workers,
            **starts(work / "large", options.repeats, options.workers),
        }
    print(f"{options.packs:,} packs: first batch after {figures['first_batch_s']:.2f} s, ", end="")
    print(
        f"that of step 1,000,000 after {figures['seek_s']:.2f} s, {figures['index_memory_mib']:.0f}"
        " MiB more memory"
    )
    if options.json:
        write_figures(options.json, figures, torch=torch.__version__)


if __name__ == "__main__":
    main()
