"""What a checkpoint of trained parameters notes of its base weights, and what is told of others."""

from __future__ import annotations

import contextlib
import shutil
import zlib
from pathlib import Path

import pytest

from megavlm.checkpoint import base_files, checksums
from megavlm.checkpoint.base_files import Base


class Ranks:
    """Stands in for the ranks of a process group, one of which is at work."""

    def __init__(self, rank: int, size: int):
        self._rank = rank
        self._size = size
        self.others: list = []

    def get_rank(self) -> int:
        return self._rank

    def get_world_size(self) -> int:
        return self._size

    def all_gather_object(self, shares: list, own: object) -> None:
        shares[:] = [own, *self.others] + [type(own)()] * (self._size - 1 - len(self.others))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one rank do all."""
    monkeypatch.setattr(base_files, "dist", Ranks(0, 1))
    monkeypatch.setattr(base_files, "raised_on_all", contextlib.nullcontext)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Make a folder of Hugging Face, and the step of a checkpoint, which has checksums."""
    part = tmp_path / "part"
    step = tmp_path / "step"
    (step / "shards").mkdir(parents=True)
    part.mkdir()
    for path in (part / "b.bin", part / "a.safetensors", part / "x.json", step / "shards/0.distcp"):
        path.write_text(path.name)
    checksums.write(step, {"shards/0.distcp": (8, 77)})  # as it was written, by itself
    return [part, step]


def _crc(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


@pytest.mark.parametrize("by_size_only", [True, False])
def test_files_of_weights_are_noted_by_their_content_or_size(
    tmp_path: Path, folders: list[Path], alone: None, by_size_only: bool
) -> None:
    part, _ = folders
    base = base_files.note(folders, tmp_path / "runs" / "new", by_size_only=by_size_only)
    a, b = (-1 if by_size_only else _crc(part / name) for name in ("a.safetensors", "b.bin"))
    assert base == Base(
        folders=tuple(map(str, folders)),
        beside=("../../part", "../../step"),
        files=(("0/a.safetensors", 13, a), ("0/b.bin", 5, b), ("1/shards/0.distcp", 8, 77)),
    )
    assert base_files.difference(base, folders) == ""
    assert base_files.damage(base, [folders[0]] * 2, by_size_only=True) == [
        f"{part / 'shards/0.distcp'}: missing"
    ]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path, target_is_directory=True)
    for save in (tmp_path, tmp_path / "runs" / "link"):
        assert base_files.moved(base, folders[::-1], save).beside == ("step", "part")


def test_all_ranks_list_files_in_one_order(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(folders[0].iterdir())
    for seen in (found, found[::-1]):
        monkeypatch.setattr(Path, "rglob", lambda self, pattern, seen=seen: iter(seen))
        assert base_files.weight_files(folders[0]) == ["a.safetensors", "b.bin"]


def test_what_differs_is_told(tmp_path: Path, folders: list[Path], alone: None) -> None:
    part, step = folders
    base = base_files.note(folders, tmp_path, by_size_only=False)
    assert base_files.difference(base, [part]) == "1 folders, and the run began with 2"
    other = tmp_path / "other"
    shutil.copytree(step, other)
    checksums.write(other, {"shards/0.distcp": (8, 78)})
    told = base_files.difference(base, [part, other])
    assert told == f"{other / 'shards/0.distcp'}: of another content (by its checksums.json)"
    by_size = Base(
        folders=base.folders, files=tuple((name, size, -1) for name, size, _ in base.files)
    )
    assert base_files.difference(by_size, [part, other]) == ""
    (other / checksums.FILE_NAME).write_text("{")  # damaged
    assert base_files.difference(base, [part, other]) == ""
    (part / "b.bin").write_text("B.BIN")
    assert base_files.difference(base, folders) == ""  # nothing is read
    wrong = base_files.damage(base, folders, by_size_only=False)
    assert [line.partition(":")[0] for line in wrong] == [
        str(part / "b.bin"),
        str(step / "shards/0.distcp"),
    ]
    assert base_files.damage(by_size, folders, by_size_only=False) == []
    assert base_files.damage(base, folders, by_size_only=True) == []
    (part / "b.bin").write_text("longer")
    assert base_files.difference(base, folders) == f"{part / 'b.bin'}: 6 bytes, it had 5"
    (part / "b.bin").unlink()
    assert base_files.difference(base, folders) == f"{part / 'b.bin'}: missing"


def test_each_rank_looks_at_a_share(
    tmp_path: Path, folders: list[Path], alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_files.note(folders, tmp_path, by_size_only=False)
    for folder in folders:
        shutil.rmtree(folder)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(base_files, "dist", Ranks(rank, 2))
        found.append(base_files.damage(base, folders, by_size_only=False))
    assert [len(lines) for lines in found] == [2, 1]
    ranks = Ranks(0, 2)
    ranks.others = [found[1]]
    monkeypatch.setattr(base_files, "dist", ranks)
    assert len(set(base_files.damage(base, folders, by_size_only=False))) == 3
