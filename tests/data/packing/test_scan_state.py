"""How far a scan is, is added up, kept and read back; what was repaired goes to its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megavlm.data.packing import scan_state
from megavlm.data.packing.job_state import DamagedStateError, reject_lines, save_state
from megavlm.data.packing.scan_state import (
    ROW,
    STATE_NAME,
    ScanState,
    SourceCounts,
    count_measured,
    merge_repaired,
    read_state,
    repairable_rejects,
)
from megavlm.data.records.reject import Reject

ROWS = [(0, 0, 0), (0, 10, 0), (0, 10, 1), (1, 0, 0), (1, 20, 0)]  # source, offset, window


def reject(source: int, offset: int, reason: str = "missing_image") -> Reject:
    return Reject(
        file="é.jsonl",
        source=source,
        line=offset + 1,
        location=f"line {offset + 1}",
        offset=offset,
        bytes=9,
        reason=reason,
        detail="gone",
    )


def rows(places: list[tuple[int, int, int]]) -> np.ndarray:
    found = np.zeros(len(places), ROW)
    for name, values in zip(("source", "offset", "window"), zip(*places, strict=True), strict=True):
        found[name] = values
    return found


def scanned(folder: Path, rejects: list[Reject]) -> ScanState:
    """Write the files of a scan of two sources, with bytes behind those that are good."""
    counts = [SourceCounts(records=20, rejects={one.reason: 1 for one in rejects}), SourceCounts()]
    lines = reject_lines(rejects)
    state = ScanState(sources=counts, rows=len(ROWS), rejects_bytes=len(lines))
    state.first_rejects = rejects[:5]
    (folder / state.rows_name).write_bytes(rows([*ROWS, (9, 9, 9)]).tobytes())
    (folder / state.rejects_name).write_bytes(lines + b"{half")
    save_state(folder / STATE_NAME, state)
    return state


def test_counts_of_tasks_add_up_and_the_first_rejects_stay() -> None:
    state = ScanState(sources=[SourceCounts(), SourceCounts()])
    task = SourceCounts(
        records=9, images=4, deep_images=2, rejects={"changed": 2, "video": 1}, unread={"id": 6}
    )
    rejects = [reject(1, offset) for offset in range(9)]
    count_measured(state, 1, task, rejects[:3])
    count_measured(state, 1, task, rejects[3:6])
    count_measured(state, 0, SourceCounts(records=1), rejects[6:])
    assert state.first_rejects == rejects[:5]
    assert state.sources == [
        SourceCounts(records=1, tasks=1),
        SourceCounts(
            tasks=2,
            records=18,
            images=8,
            deep_images=4,
            rejects={"changed": 4, "video": 2},
            unread={"id": 12},
        ),
    ]
    assert state.packable == 13


def test_a_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    assert read_state(tmp_path, 2) == ScanState(sources=[SourceCounts(), SourceCounts()])
    state = scanned(tmp_path, [reject(0, 5), reject(0, 6, "video")])
    assert read_state(tmp_path, 2) == state
    for sources in (1, 3):
        with pytest.raises(DamagedStateError, match=f"tells of 2 sources, not of {sources}"):
            read_state(tmp_path, sources)
    assert repairable_rejects(tmp_path, state) == [reject(0, 5)]
    only = dataclasses.replace(state, sources=[SourceCounts(rejects={"video": 1}), SourceCounts()])
    (tmp_path / state.rejects_name).unlink()  # nothing can be repaired, so it is not read
    assert repairable_rejects(tmp_path, only) == []


@pytest.mark.parametrize("name", ["rows.0.bin", "rejects.0.jsonl"])
@pytest.mark.parametrize("is_there", [True, False])
def test_files_that_lack_good_bytes_are_named(tmp_path: Path, name: str, is_there: bool) -> None:
    scanned(tmp_path, [reject(0, 5)])
    path = tmp_path / name
    found = 7 if is_there else 0
    path.write_bytes(path.read_bytes()[:found])
    if not is_there:
        path.unlink()
    with pytest.raises(DamagedStateError, match=rf"{name}: has {found} of \d+ bytes"):
        read_state(tmp_path, 2)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_repaired_records_go_to_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(scan_state, "ROWS_PER_CHUNK", chunk)
    rejects = [reject(*place) for place in [(0, 5), (0, 7), (1, 5), (1, 10), (1, 30), (1, 40)]]
    state = scanned(tmp_path, rejects)
    repaired = [(0, 5, 0), (0, 5, 1), (1, 10, 0), (1, 30, 0)]
    other = dataclasses.replace(rejects[2], reason="unreadable_image")
    now = {(0, 5): [], (1, 5): [other], (1, 10): [], (1, 30): []}
    merge_repaired(tmp_path, state, rows(repaired), now)
    left = [rejects[1], other, rejects[5]]
    assert (state.generation, state.rows, state.first_rejects) == (1, 9, left)
    assert (tmp_path / "rejects.1.jsonl").read_bytes() == reject_lines(left)
    assert "é.jsonl".encode() in reject_lines(left), "names are to be read by people"
    assert state.rejects_bytes == len(reject_lines(left))
    found = np.fromfile(tmp_path / "rows.1.bin", ROW)
    assert found[["source", "offset", "window"]].tolist() == sorted([*ROWS, *repaired])
    # Until the state is saved, that of before is good.
    assert read_state(tmp_path, 2).generation == 0
    save_state(tmp_path / STATE_NAME, state)
    assert read_state(tmp_path, 2) == state


def test_records_are_repaired_of_which_none_passed_before(tmp_path: Path) -> None:
    state = scanned(tmp_path, [reject(0, 5), reject(1, 7)])
    state.rows = 0
    merge_repaired(tmp_path, state, rows([(0, 5, 0), (1, 7, 0)]), {(0, 5): [], (1, 7): []})
    assert (state.rows, state.first_rejects, state.rejects_bytes) == (2, [], 0)
    assert np.fromfile(tmp_path / "rows.1.bin", ROW)["offset"].tolist() == [5, 7]
