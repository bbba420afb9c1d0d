"""Tensors on disk."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megavlm.convert.dist_checkpoint import ShardsFolder, write_shards
from megavlm.convert.hf.safetensors_files import (
    INDEX_NAME,
    SafetensorsFolder,
    write_safetensors,
)
from megavlm.io.full_disk import in_words
from tests.convert.models import load_all
from tests.convert.weights.test_views import InMemory


def some_tensors() -> InMemory:
    sizes = {
        "a.linear_qkv.weight": (5, 3),
        "b": (7,),
        "c.linear_fc1.weight": (2, 3, 4),
        "d": (1, 1, 6),
    }
    return InMemory(
        {name: torch.randn(shape).to(torch.bfloat16) for name, shape in sizes.items()}
        | {"wide": torch.randn(11)}
    )


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**9, 1), (60, 3), (1, 5)])
def test_safetensors_come_back(tmp_path: Path, shard_bytes: int, files: int) -> None:
    written = some_tensors()
    amounts: list[int] = []
    write_safetensors(written, tmp_path, shard_bytes, done=amounts.append)
    read = SafetensorsFolder(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == files and (
        tmp_path / INDEX_NAME
    ).is_file() == (files > 1)
    assert read.headers.keys() == written.headers.keys() and read.headers == {
        name: written.headers[name] for name in read.headers
    }
    assert all(torch.equal(read[name], tensor) for name, tensor in written.tensors.items())
    assert (
        sum(amounts)
        == sum(header.nbytes for header in written.headers.values())
        == 5 * 3 * 2 + 7 * 2 + 24 * 2 + 6 * 2 + 11 * 4
    )


def test_parts_of_one_tensor_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(6, 2)
    write_safetensors(
        InMemory({"top": whole[:3], "bottom": whole[3:], "turned": whole.T}), tmp_path
    )
    read = load_all(tmp_path)
    assert torch.equal(torch.cat([read["top"], read["bottom"]]), whole) and torch.equal(
        read["turned"], whole.T
    )


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file"):
        SafetensorsFolder(tmp_path)
    write_safetensors(some_tensors(), tmp_path, shard_bytes=1)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    (tmp_path / INDEX_NAME).write_text(
        json.dumps(
            {"weight_map": index["weight_map"] | {"ghost": "model-00001-of-00005.safetensors"}}
        )
    )
    with pytest.raises(
        ValueError, match=r"names ghost, which model-00001-of-00005.safetensors does not hold"
    ):
        SafetensorsFolder(tmp_path)
    (tmp_path / INDEX_NAME).write_text(
        json.dumps(
            {
                "weight_map": {
                    name: file for name, file in index["weight_map"].items() if name != "b"
                }
                | {"d": index["weight_map"]["b"]}
            }
        )
    )
    with pytest.raises(
        ValueError, match=r"does not name b, which model-00002-of-00005.safetensors holds"
    ):
        SafetensorsFolder(tmp_path)
    for damaged in ("[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (tmp_path / INDEX_NAME).write_text(damaged)
        with pytest.raises(ValueError, match="not an index"):
            SafetensorsFolder(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    (tmp_path / "model-00003-of-00005.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(ValueError, match=r"model-00003-of-00005.safetensors: damaged"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "model-00003-of-00005.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00003-of-00005.safetensors"):
        SafetensorsFolder(tmp_path)


def test_number_formats_without_use_are_refused(tmp_path: Path) -> None:
    save_file({"flags": torch.ones(3, dtype=torch.bool)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="flags has dtype BOOL"):
        SafetensorsFolder(tmp_path)


def test_shards_come_back_one_at_a_time(tmp_path: Path) -> None:
    written = some_tensors()
    amounts: list[int] = []
    write_shards(written, tmp_path / "shards", done=amounts.append)
    assert written.reads == 5 and sum(amounts) == sum(
        header.nbytes for header in written.headers.values()
    )
    read = ShardsFolder(tmp_path / "shards")
    assert read.headers == written.headers
    assert all(torch.equal(read[name], tensor) for name, tensor in written.tensors.items())


@pytest.mark.parametrize("room", [0, 100, 1000])
def test_a_full_disk_is_an_error_of_the_system_with_the_folder(tmp_path: Path, room: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_shards(some_tensors(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = in_words(error.value, "--out", tmp_path)
    assert said == f"--out {tmp_path}: [Errno 27] File too large"
    assert in_words(ValueError("wrong"), "--out", tmp_path) == "wrong"


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no distributed checkpoint"):
        ShardsFolder(tmp_path)
    write_shards(some_tensors(), tmp_path)
    (tmp_path / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="damaged"):
        ShardsFolder(tmp_path)
