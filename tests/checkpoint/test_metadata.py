"""What a checkpoint's description may hold, and that nothing which it names is run, in training and
in conversion alike.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megavlm.checkpoint.metadata import read_description
from megavlm.convert.dist_checkpoint import ShardsFolder


class _Attack:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "read", [lambda folder: read_description(folder / ".metadata"), ShardsFolder]
)
def test_a_description_that_would_run_a_program_is_refused_unrun(tmp_path: Path, read) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Attack(tmp_path / "broken-in")))
    with pytest.raises(ValueError, match=r"\.metadata: .*mkdir"):
        read(tmp_path)
    assert not (tmp_path / "broken-in").exists()


@pytest.mark.parametrize("content", [b"ctorch\nload\n.", b"ctorch\nSize\n(I2\ntR."])
def test_other_functions_of_torch_and_what_they_refuse_are_no_description(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="not a description of tensors, or damaged"):
        read_description(tmp_path / ".metadata")


def test_a_real_description_is_read_and_half_of_one_is_refused(tmp_path: Path) -> None:
    tensors = {"model.a": torch.zeros(3, 5), "model.b": torch.ones(2, dtype=torch.bfloat16)}
    save(tensors, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    assert (
        read_description(tmp_path / ".metadata").state_dict_metadata["model.b"].properties.dtype
        == torch.bfloat16
    )
    assert torch.equal(ShardsFolder(tmp_path)["b"], tensors["model.b"])
    content = (tmp_path / ".metadata").read_bytes()
    (tmp_path / ".metadata").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a description"):
        read_description(tmp_path / ".metadata")


def test_a_pickle_of_something_else_is_no_description(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="but list"):
        read_description(tmp_path / ".metadata")
