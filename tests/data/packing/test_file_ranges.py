"""Annotation files are cut alike by any number of processes, and a packing that resumes looks into
those that it lacks alone.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megavlm.data.packing import executors, file_ranges, scan
from megavlm.data.packing.file_ranges import FileToCut, cut_files, list_ranges
from megavlm.data.packing.job import pack_dataset
from megavlm.data.packing.scan_state import ScanState, SourceCounts, first_unfinished
from megavlm.data.records.meta_file import read_meta
from megavlm.data.records.readers import open_reader
from tests.data.packing.test_repair import bytes_of, chat, job
from tests.data.records.test_readers import tar


def files_of(folder: Path) -> list[FileToCut]:
    """Write archives, and lines between them."""
    named = []
    for number in range(4):
        name = "a.jsonl" if number == 1 else f"{number}.tar"
        records = {f"{one}.json": chat().encode() for one in range(5 + number)}
        if number == 1:
            (folder / name).write_bytes(b"\n".join(records.values()))
        else:
            tar(folder / name, records)
        share = 0.5 if number == 2 else 1.0
        named.append(FileToCut(path=str(folder / name), records=2, share=share))
    return named


@pytest.mark.parametrize("workers", [0, 5])
def test_ranges_do_not_depend_on_who_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    files = files_of(tmp_path)
    asked = []
    run = executors.ordered_map

    def seen(function, tasks, workers, executor):
        asked.append((function, [task.path for task in tasks], workers))
        return run(function, tasks, workers, executor)

    monkeypatch.setattr(file_ranges, "ordered_map", seen)
    found = [list(ranges) for ranges in cut_files(files, workers, "processes")]
    archives = [file.path for file in files if file.path.endswith(".tar")]
    assert asked == [(list_ranges, archives, 2 if workers else 0)]
    whole = [list(open_reader(file.path).ranges(2)) for file in files]
    assert [found[number] for number in (0, 1, 3)] == [whole[number] for number in (0, 1, 3)]
    # Half of seven records, rounded down.
    assert found[2] == [whole[2][0], dataclasses.replace(whole[2][1], records=1)]


def test_a_damaged_archive_is_told_as_if_nobody_helped(tmp_path: Path) -> None:
    files = files_of(tmp_path)
    path = Path(files[-1].path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=rf"^{path}: the archive has no end"):
        for _ in cut_files(files, 2, "processes"):
            pass


class Stop(BaseException):
    """What ends a run in the middle."""


@pytest.mark.parametrize("is_old", [False, True])
def test_a_resumed_packing_does_not_look_into_files_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    files_of(tmp_path)
    names = ("0.tar", "a.jsonl", "2.tar", "3.tar")
    facts = {name: {"annotation": str(tmp_path / name)} for name in names}
    (tmp_path / "meta.json").write_text(json.dumps(facts))
    sources = read_meta(tmp_path / "meta.json")

    def stopping(function, tasks, workers, executor="processes"):
        for number, task in enumerate(tasks):
            if number == 8:  # 3 of the first file, 3 of the second, 2 of the third
                raise Stop
            yield function(task)

    monkeypatch.setattr(scan, "RECORDS_PER_TASK", 2)
    monkeypatch.setattr(scan, "SAVE_INTERVAL_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(scan, "ordered_map", stopping)
        pack_dataset(job(tmp_path, sources=sources))
    path = tmp_path / "out.partial" / "scan" / "scan.json"
    state = json.loads(path.read_text())
    assert [source["tasks"] for source in state["sources"]] == [3, 3, 2, 0]
    if is_old:
        for source in state["sources"]:
            del source["tasks"]
        path.write_text(json.dumps(state))
    opened = []

    def looked_into(name: str):
        opened.append(Path(name).name)
        return open_reader(name)

    monkeypatch.setattr(file_ranges, "open_reader", looked_into)
    pack_dataset(job(tmp_path, sources=sources))
    assert opened == list(names if is_old else names[2:])
    pack_dataset(job(tmp_path, "whole", sources=sources))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_files_without_records_are_done_with_those_before_them() -> None:
    counts = [SourceCounts(tasks=number) for number in (2, 0, 5, 0)]
    assert first_unfinished(ScanState(sources=counts, tasks=7)) == (2, 5)
    assert first_unfinished(ScanState(sources=[SourceCounts()])) == (0, 0)
