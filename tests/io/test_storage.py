"""Packs are read from object storage as from a disk."""

from __future__ import annotations

import errno
import os
import pickle

import fsspec
import numpy as np
import pytest

from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.loader import batches
from megavlm.data.loading.order import Plan
from megavlm.io.open_files import OpenFiles
from megavlm.io.storage import LocalFiles, file_states, open_folder
from tests.data.samples import make_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs")
    make_dataset(folder, packs=7, shard_bytes=5000)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "words.txt").write_text("a b")
    return folder


@pytest.fixture(scope="module")
def bucket(folder):
    """Copy the dataset to a storage that is not a disk."""
    fsspec.filesystem("memory").put(str(folder) + "/", "/bucket/packs/", recursive=True)
    return "memory://bucket/packs"


def test_packs_in_object_storage(folder, bucket):
    local = PackedDataset(folder)
    remote = PackedDataset(bucket)
    assert remote.manifest == local.manifest and remote.reader.check() == 7
    assert np.array_equal(remote.index[[5, 0]], local.index[[5, 0]])
    for pack_id in range(7):
        assert remote.batch(pack_id, 3) == local.batch(pack_id, 3)


@pytest.mark.slow
def test_workers_read_object_storage(folder):
    plan = Plan(num_packs=7, seed=1)
    expected, found = (
        list(batches(PackedDataset(place), plan, range(6), workers=1))
        for place in (folder, f"file://{folder}")
    )
    assert found == expected


def test_copies(folder, bucket, tmp_path):
    for number, place in enumerate((folder, bucket)):
        target = tmp_path / str(number)
        target.mkdir()
        for name in ("tokenizer", "manifest.json", "nowhere"):
            open_folder(place).copy(name, target / name)
        assert (target / "tokenizer" / "words.txt").read_text() == "a b"
        assert (target / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
        assert not (target / "nowhere").exists()


def test_a_slash_at_the_end_of_a_folder_means_nothing(folder, bucket):
    files = open_folder(f"{bucket}//")
    content = (folder / "manifest.json").read_bytes()
    assert files.exists("manifest.json") and not files.exists("tokenizer")
    assert files.size("manifest.json") == len(content)
    assert files.read("manifest.json", 3, 10**9) == content[3:]
    assert files.read("manifest.json", 3, 3) == b""
    with pytest.raises(FileNotFoundError, match=r"^memory://bucket/packs/nothing: there is no"):
        files.size("nothing")


def test_the_states_of_files_tell_of_every_change(tmp_path):
    (tmp_path / "inner").mkdir()
    first = tmp_path / "a.txt"
    second = tmp_path / "inner" / "b.txt"
    for path in (first, second):
        path.write_text("content")
        os.utime(path, ns=(1, 1_000_000_007))
    before = file_states(tmp_path)
    assert before == {"a.txt": [7, 1_000_000_007], "inner/b.txt": [7, 1_000_000_007]}
    assert list(before) == sorted(before)
    second.write_text("another")
    os.utime(second, ns=(1, 1_000_000_008))
    assert file_states(tmp_path) == before | {"inner/b.txt": [7, 1_000_000_008]}
    first.write_text("longer content")
    os.utime(first, ns=(1, 1_000_000_007))
    assert file_states(tmp_path)["a.txt"] == [14, 1_000_000_007]


def test_what_is_not_there():
    with pytest.raises(FileNotFoundError, match="memory://bucket/nothing/manifest.json: missing"):
        PackedDataset("memory://bucket/nothing")
    with pytest.raises(ValueError, match="nonsense://x: cannot be read: Protocol not known"):
        PackedDataset("nonsense://x")


def test_files_stay_open_up_to_a_number_over_all_folders_that_share_it(folder, monkeypatch):
    monkeypatch.setattr("megavlm.io.open_files.most_open", lambda: 3)
    opened = OpenFiles()
    folders = pickle.loads(pickle.dumps([LocalFiles(folder, opened) for _ in range(4)]))
    assert len({id(files.opened) for files in folders}) == 1
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    before = len(os.listdir("/proc/self/fd"))
    for name in names * 2:
        for files in folders:
            assert files.read(name, 0, 10**9) == (folder / name).read_bytes()
    assert len(os.listdir("/proc/self/fd")) == before + 3


@pytest.mark.parametrize("failures", [1, 2])
def test_a_file_that_fails_once_is_opened_again_and_one_that_fails_twice_is_named(
    folder, monkeypatch, failures
):
    left = [OSError(errno.ESTALE, "Stale file handle")] * failures
    read = os.pread

    def fail(*arguments):
        if left:
            raise left.pop()
        return read(*arguments)

    monkeypatch.setattr(os, "pread", fail)
    files = LocalFiles(folder)
    if failures == 1:
        assert files.read("manifest.json", 0, 10) == (folder / "manifest.json").read_bytes()[:10]
        return
    with pytest.raises(OSError, match="Stale file handle: .*manifest.json"):
        files.read("manifest.json", 0, 10)
