"""Speed and memory of the whole packer: records and megabytes a second on real-size JPEG files, and
peak memory on a long annotation file.

    python tools/benchmark/pack_dataset.py --work /tmp/pack_benchmark --json pack_dataset.json

The packer runs as users run it, as a command; times include its start. Memory is that of the
command and its workers together (resident, the libraries that they share counted once for each),
and of the command alone. Three rates stand beside each other, each with as many processes as cores:
``cp_mb_per_s`` of a plain copy of the JPEG files, ``pack_mb_per_s`` of the second pass over them (a
whole packing less a dry run, by the clock of their reports), and ``survey_records_per_s`` of the
first pass over records of text alone. The same rates by processor seconds
(``..._per_processor_s``) say what a machine that does other things too cannot say by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from figures import write_figures
from photographs import write_jpegs, write_records

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tests" / "golden" / "tokenizer"
SAMPLE_SECONDS = 0.2


def run(arguments: list[str]) -> dict[str, float]:
    """Run the packer, and measure seconds by the clock and of processors (its workers' too), and
    peak memory in MiB.
    """
    command = [
        sys.executable,
        str(ROOT / "tools" / "pack_dataset.py"),
        "--tokenizer",
        str(TOKENIZER),
        *arguments,
    ]
    start = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    alone = together = 0
    processor: dict[
        int,
        float,
        # by process, when last seen: workers are not children of who would be told of their time
    ] = {}
    while process.poll() is None:
        try:
            resident = []
            for each in (process, *process.children(recursive=True)):
                resident.append(each.memory_info().rss)
                processor[each.pid] = each.cpu_times().user + each.cpu_times().system
            alone = max(alone, resident[0])
            together = max(together, sum(resident))
        except psutil.NoSuchProcess:
            pass
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"the packer ended with status {process.returncode}")
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": sum(processor.values()),
        "peak_mib": together / 2**20,
        "peak_alone_mib": alone / 2**20,
    }


def speed(work: Path, images: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measure records and megabytes a second with one and two processes; keep the best of several
    runs.
    """
    folder = work / "jpegs"
    size = write_jpegs(folder, images)
    write_records(work / "images.jsonl", images)
    print(f"{images:,} JPEG files of {size / images / 1e3:.0f} KB on average")
    found = {}
    for processes in (1, 2):
        runs = []
        for _ in range(repeats):
            shutil.rmtree(work / "packs", ignore_errors=True)
            arguments = [
                "--jsonl",
                str(work / "images.jsonl"),
                "--root",
                str(folder),
                "--out",
                str(work / "packs"),
            ]
            runs.append(run([*arguments, "--workers", str(processes)]))
        best = min(runs, key=lambda each: each["seconds"])
        found[f"processes_{processes}"] = {
            **best,
            "records": images,
            "records_per_s": images / best["seconds"],
            "records_per_processor_s": images / best["processor_seconds"],
            "mb_per_s": size / best["seconds"] / 1e6,
        }
        print(
            f"{processes} processes: {images / best['seconds']:,.0f} records/s,"
            f" {size / best['seconds'] / 1e6:,.1f} MB/s"
        )
    shutil.rmtree(folder)
    return found


def report_seconds(arguments: list[str], work: Path) -> np.ndarray:
    """Return how long the packer says that it took, the start of Python left out, and its seconds
    of processors, the start included.
    """
    path = work / "report.json"
    found = run([*arguments, "--json", str(path), "--workers", str(os.cpu_count())])
    seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    return np.array([seconds, found["processor_seconds"]])


def copy_seconds(source: Path, target: Path) -> np.ndarray:
    """Copy the files of a folder with as many processes as cores, and return seconds by the clock
    and of processors.
    """
    target.mkdir()
    names = "\0".join(map(str, source.iterdir()))
    command = ["xargs", "-0", "-n", "256", "-P", str(os.cpu_count()), "cp", "-t", str(target)]
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, input=names, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return np.array([time.perf_counter() - start, processor])


def beside_copy(work: Path, images: int, lines: int, repeats: int) -> dict[str, float]:
    """Return the rates of a plain copy, of the second pass and of the first; of each the fastest of
    some runs.
    """
    folder = work / "jpegs"
    size = write_jpegs(folder, images)
    write_records(work / "images.jsonl", images)
    write_lines(work / "survey.jsonl", lines)
    data = ["--jsonl", str(work / "images.jsonl"), "--root", str(folder)]
    text = ["--jsonl", str(work / "survey.jsonl"), "--dry_run"]
    copies = []
    passes = []
    surveys = []
    for _ in range(repeats):
        for name in ("copy", "packs"):
            shutil.rmtree(work / name, ignore_errors=True)
        copies.append(copy_seconds(folder, work / "copy"))
        first = report_seconds([*data, "--dry_run"], work)
        passes.append(report_seconds([*data, "--out", str(work / "packs")], work) - first)
        surveys.append(report_seconds(text, work))
    shutil.rmtree(folder)
    (copy, pack, survey) = (np.min(each, axis=0) for each in (copies, passes, surveys))
    if min(pack) <= 0:
        raise SystemExit(
            f"packing took {min(pack):.1f} s longer than a dry run, which says nothing; give more"
            " --images, on a machine that does nothing else"
        )
    found = {}
    for unit, clock in (("s", 0), ("processor_s", 1)):
        found[f"cp_mb_per_{unit}"] = size / copy[clock] / 1e6
        found[f"pack_mb_per_{unit}"] = size / pack[clock] / 1e6
        found[f"survey_records_per_{unit}"] = lines / survey[clock]
    print(", ".join(f"{name} {rate:,.1f}" for name, rate in found.items()))
    return found


def write_lines(path: Path, lines: int) -> None:
    """Write an annotation file of many short lines."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(lines):
            text = "why " * (number % 13)
            file.write(
                '{"conversations": [{"from": "system", "value": "."}, {"from": "human",'
                f' "value": "{text}{number % 97}?"}}, {{"from": "gpt", "value": "as {number % 89}'
                f' is {text}"}}]}}\n'
            )


def memory(work: Path, lines: int) -> dict[str, float]:
    """Peak memory on one annotation file of many short lines."""
    path = work / "lines.jsonl"
    write_lines(path, lines)
    shutil.rmtree(work / "packs", ignore_errors=True)
    found = run(["--jsonl", str(path), "--out", str(work / "packs"), "--workers", "2"])
    alone = f"{found['peak_alone_mib']:,.0f} without workers"
    print(
        f"{lines:,} lines: {found['seconds']:.0f} s, peak memory {found['peak_mib']:,.0f} MiB,"
        f" {alone}"
    )
    return {
        **found,
        "lines": lines,
        "annotation_mb": path.stat().st_size / 1e6,
        "records_per_s": lines / found["seconds"],
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, default=20_000, metavar="N", help="JPEG files (default: %(default)s)"
    )
    parser.add_argument(
        "--survey_lines",
        type=int,
        default=200_000,
        metavar="N",
        help="lines for the first pass alone (default: %(default)s)",
    )
    parser.add_argument(
        "--lines",
        type=int,
        default=5_000_000,
        metavar="N",
        help="lines for memory; 0: not measured (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        metavar="N",
        help="runs, of which the fastest counts (default: %(default)s)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="folder for files, removed at the end (default: a temporary one)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        work = Path(temporary)
        figures = speed(work, options.images, options.repeats) if options.images else {}
        if options.images:
            figures |= beside_copy(work, options.images, options.survey_lines, options.repeats)
        if options.lines:
            figures["memory"] = memory(work, options.lines)
    if options.json:
        write_figures(options.json, figures)


if __name__ == "__main__":
    main()
