"""One job at a time works in a folder, and only the same one resumes in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavlm.data.packing.job_state import DamagedStateError
from megavlm.data.packing.work_folder import partial_folder, publish, refuse_filled

SOURCE = {"path": "a.jsonl", "bytes": 3, "modified": 5, "root": "images"}
IDENTITY = {"capacity": 8, "grids": ((1, 2), (2, 1)), "filters": [], "sources": [SOURCE]}


def enter(folder: Path, change: dict[str, Any] | None = None) -> None:
    """Begin a job, or resume one, and leave a file that says so."""
    with partial_folder(folder, IDENTITY | (change or {}), flag="--out x") as entered:
        assert entered == folder
        (folder / "work").touch()


def test_the_same_job_resumes_and_no_two_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "x.partial"
    enter(folder)
    with partial_folder(folder, IDENTITY, flag="--out x"):
        assert (folder / "work").exists()
        with pytest.raises(FileExistsError, match="^--out x: another process is at work in"):
            enter(folder)
    enter(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"capacity": 9}, r"(capacity: 8 there, 9 requested);"),
        ({"filters": ["b"]}, r"(filters: [] there, ['b'] requested);"),
        ({"new": 1}, r"(new: None there, 1 requested);"),
        ({"sources": []}, "(sources: None there, [] requested; sources[0].bytes: 3 there, None"),
        (
            {"sources": [SOURCE | {"root": "b"}]},
            "(sources[0].root: 'images' there, 'b' requested);",
        ),
        ({"sources": [SOURCE | {"path": "b", "bytes": 4}]}, "(sources[0].bytes: 3 there, 4 requ"),
        ({f"n{number}": number for number in range(8)}, "n7: None there, 7 requested);"),
        ({f"n{number}": number for number in range(10)}, "; and 2 more);"),
    ],
)
def test_another_job_is_told_by_what_differs(tmp_path: Path, change: dict, told: str) -> None:
    enter(tmp_path)
    with pytest.raises(FileExistsError) as caught:
        enter(tmp_path, change)
    assert f"--out x: {tmp_path} was left by another job " in str(caught.value)
    assert told in str(caught.value)
    enter(tmp_path)


def test_another_job_takes_over_where_nothing_was_done(tmp_path: Path) -> None:
    for change in ({}, {"capacity": 9}):  # refused before its work, as for an unfit tokenizer
        with (
            pytest.raises(ZeroDivisionError),
            partial_folder(
                tmp_path, IDENTITY | change, flag="--out x", prepared=("tokenizer",)
            ) as folder,
        ):
            assert not (folder / "tokenizer").exists()
            (folder / "tokenizer").mkdir()
            raise ZeroDivisionError
    enter(tmp_path, {"capacity": 9})  # the same job keeps what is there
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "job.json",
        "lock",
        "tokenizer",
        "work",
    ]
    with pytest.raises(FileExistsError, match="left by another job"):
        enter(tmp_path)


@pytest.mark.parametrize("change", [{"bytes": 4}, {"modified": 6}])
def test_an_annotation_file_that_has_changed_is_named(tmp_path: Path, change: dict) -> None:
    enter(tmp_path)
    with pytest.raises(FileExistsError, match=f"a.jsonl has changed since .*; remove {tmp_path}"):
        enter(tmp_path, {"sources": [SOURCE | change]})


def test_what_a_power_cut_left_without_a_name_is_cleared(tmp_path: Path) -> None:
    enter(tmp_path)
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan" / "rows").touch()
    (tmp_path / "job.json").write_bytes(b"")
    with partial_folder(tmp_path, IDENTITY, flag="--out x"):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["job.json", "lock"]


def test_what_is_no_job_s_is_left_alone(tmp_path: Path) -> None:
    for name in "dacb":
        (tmp_path / name).touch()
    with pytest.raises(FileExistsError, match=r"holds something else \(a, b, c\); remove it"):
        enter(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d", "lock"]


def test_a_job_that_was_stopped_while_it_wrote_its_name_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", stop)
        enter(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    enter(tmp_path)


def test_a_folder_that_cannot_be_made_is_told_by_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="^--out x: nothing can be written there"):
        enter(tmp_path / "file" / "x.partial")


def test_a_damaged_state_says_what_to_remove(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=f"^--out x: scan.json: cut; remove {tmp_path} to begin"),
        partial_folder(tmp_path, IDENTITY, flag="--out x"),
    ):
        raise DamagedStateError("scan.json: cut")


@pytest.mark.parametrize("can_remove", [True, False])
def test_a_result_has_nothing_that_only_a_job_needs_if_it_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_remove: bool
) -> None:
    folder = tmp_path / "x.partial"
    enter(folder)
    (folder / "scan").mkdir()
    (folder / "packs-0.json").touch()

    def fail(*_: object, **__: object) -> None:
        raise OSError("busy")

    if not can_remove:
        monkeypatch.setattr(Path, "unlink", fail)
    publish(folder, tmp_path / "x", ("scan", "packs-*.json"))
    assert not folder.exists()
    left = {path.name for path in (tmp_path / "x").iterdir()}
    assert left == {"work"} | (set() if can_remove else {"job.json", "lock", "packs-0.json"})


def test_a_result_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    refuse_filled(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    refuse_filled(tmp_path / "empty")
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match=f"^--out {out}: already holds something"):
            refuse_filled(out)
