"""Speed and memory of the whole packer: records and megabytes a second on real-size JPEG files, and
peak memory on a long annotation file.

    python tools/benchmark/pack_dataset.py --work /tmp/pack_benchmark --json pack_dataset.json

The packer runs as users run it, as a command; times include its start. Memory is that of the
command and its workers together (resident, the libraries that they share counted once for each),
and of the command alone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def memory(work: Path, lines: int) -> dict[str, float]:
    """Peak memory on one annotation file of many short lines."""
    path = work / "lines.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(lines):
            text = "why " * (number % 13)
            file.write(
                '{"conversations": [{"from": "system", "value": "."}, {"from": "human",'
                f' "value": "{text}{number % 97}?"}}, {{"from": "gpt", "value": "as {number % 89}'
                f' is {text}"}}]}}\n'
            )
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
        if options.lines:
            figures["memory"] = memory(work, options.lines)
    if options.json:
        write_figures(options.json, figures)


if __name__ == "__main__":
    main()
