"""How fast weights are converted, and in how much memory: import and export of a random model,
beside a plain copy of its files.

Each is done several times, in turn and in a process of its own, and ends when the bytes are on the
disk. The median counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megavlm.config.models import architecture
from megavlm.config.schema import Architecture
from megavlm.convert.hf import convert, native_config
from megavlm.convert.hf.json_files import FILE_NAME, write_json
from megavlm.convert.hf.safetensors_files import SafetensorsFolder, write_safetensors
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.convert.weights.tables import rows
from megavlm.convert.weights.views import Header
from megavlm.data.text.tokenizer import SPECIAL_TOKENS

GIB = 1 << 30


class RandomTensors:
    """Random BF16 tensors of every name that a model has, made when they are asked for."""

    def __init__(self, model: Architecture):
        named = [
            pair for row in rows(model) for pair in zip(row.names, row.part_shapes, strict=True)
        ]
        self.headers = {name: Header(shape, torch.bfloat16) for name, shape in named}

    def __getitem__(self, name: str) -> Tensor:
        return torch.randint(-30000, 30000, self.headers[name].shape, dtype=torch.int16).view(
            torch.bfloat16
        )

    def ranges(self, name: str, rows: range) -> None:
        return None

    def __str__(self) -> str:
        return "random"


def make_model(folder: Path, name: str, layers: int) -> int:
    """Write a random Hugging Face folder with a small tokenizer, and return the bytes of its
    weights.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = architecture(name)
    model = dataclasses.replace(
        model,
        language=dataclasses.replace(
            model.language, num_layers=layers or model.language.num_layers
        ),
    )
    folder.mkdir(parents=True)
    known = [*SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>", "?"]
    words = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="?")
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="?", additional_special_tokens=list(SPECIAL_TOKENS)
    ).save_pretrained(folder)
    tensors = RandomTensors(model)
    write_safetensors(tensors, folder)
    write_json(
        folder / FILE_NAME,
        native_config.write(model, TokenIds(image=2, begin=0, end=9, pad=9), torch.bfloat16),
    )
    return sum(header.nbytes for header in tensors.headers.values())


def copy(source: Path, target: Path) -> None:
    """Copy the weights as they are."""
    target.mkdir()
    for path in source.glob("*.safetensors*"):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb+") as file:
            os.fsync(file.fileno())


def measure(work: Callable[[Path, Path], object], source: Path, target: Path) -> tuple[float, int]:
    """Seconds, and the most memory that the process had, its program included, in bytes; the target
    is removed before.
    """
    shutil.rmtree(target, ignore_errors=True)
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        return alone.apply(_measure, (work, source, target))


def _measure(work: Callable[[Path, Path], object], source: Path, target: Path) -> tuple[float, int]:
    start = time.perf_counter()
    work(source, target)
    seconds = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return seconds, int(status["VmHWM"].split()[0]) * 1024


def run(folder: Path, model: str, layers: int, repeat: int) -> dict[str, float | int | str]:
    """Make the model, and measure."""
    total = make_model(folder / "hf", model, layers)
    jobs = {
        "copy": (copy, "hf", "copied"),
        "import": (convert.import_, "hf", "imported"),
        "export": (convert.export, "imported", "exported"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    peak = 0
    for _ in range(repeat):
        for name, (work, source, target) in jobs.items():
            took, used = measure(work, folder / source, folder / target)
            seconds[name].append(took)
            peak = max(peak, used if name != "copy" else 0)
            print(f"{name}: {total / 1e9 / took:.2f} GB/s, {used / GIB:.2f} GiB", file=sys.stderr)
    speeds = {
        f"{name}_gb_per_s": total / 1e9 / statistics.median(found)
        for name, found in seconds.items()
    }
    before = SafetensorsFolder(folder / "hf")
    after = SafetensorsFolder(folder / "exported")
    if before.headers != after.headers or not all(
        _equal(before[name], after[name]) for name in before.headers
    ):
        raise ValueError("what was exported is not what was imported")
    every = {f"{name}_seconds": found for name, found in seconds.items()}
    return {"model": model, "bytes": total, **speeds, "peak_memory_gib": peak / GIB, **every}


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are the same; among random ones there are NaNs."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="internvl2_5-4b",
        help="row of the table of models (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=14,
        help="layers of its language model; 0: all (default: %(default)s: about 4 GB)",
    )
    parser.add_argument(
        "--repeat", type=int, default=3, help="times that each is done (default: %(default)s)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to write, four times the model's bytes (default: a temporary folder)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="convert-", dir=options.folder) as folder:
        found = run(Path(folder), options.model, options.layers, options.repeat)
    print(f"{'':8} {'GB/s':>8} {'of a copy':>10}")
    for name in ("copy", "import", "export"):
        speed = found[f"{name}_gb_per_s"]
        print(f"{name:8} {speed:8.2f} {speed / found['copy_gb_per_s']:10.0%}")
    print(f"{found['bytes'] / 1e9:.2f} GB; most memory {found['peak_memory_gib']:.2f} GiB")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
