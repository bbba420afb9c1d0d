"""Tensors as ranges of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megavlm.config.schema import Architecture
from megavlm.convert.dist_checkpoint import ShardsFolder, write_shards
from megavlm.convert.hf.safetensors_files import SafetensorsFolder, write_safetensors
from megavlm.convert.weights import byte_ranges
from megavlm.convert.weights.byte_ranges import Range, Run
from megavlm.convert.weights.mapping import Row
from megavlm.convert.weights.tables import rows
from megavlm.convert.weights.transforms import Fused, GroupedQKV, Operation, Padded, Same, Stacked
from megavlm.convert.weights.views import HuggingFaceView, MegatronView, whole_ranges
from tests.convert.models import KINDS, SMALL, make_hf

OPERATIONS = [
    (Same(), (5, 3)),
    (Stacked(2), (8, 3)),
    (GroupedQKV(6, 2, 4), (40, 3)),
    (GroupedQKV(3, 3, 2), (18,)),
    (Fused(GroupedQKV(4, 4, 3), (12, 12, 12)), (36, 2)),
]


def follow(runs: list[Run], tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensors[run.tensor][run.first : run.first + run.count] for run in runs])


def read(found: list[Range], header) -> Tensor:
    content = b"".join(
        piece.path.read_bytes()[piece.offset : piece.offset + piece.nbytes] for piece in found
    )
    return torch.frombuffer(bytearray(content), dtype=header.dtype).view(header.shape)


@pytest.mark.parametrize(("operation", "shape"), OPERATIONS, ids=str)
def test_runs_do_what_the_operation_does(operation: Operation, shape: tuple[int, ...]) -> None:
    whole = torch.randn(shape)
    parts = list(operation.split(whole))
    assert torch.equal(
        follow(byte_ranges.joined_runs(operation, operation.part_shapes(shape)), parts), whole
    )
    for runs, part in zip(byte_ranges.split_runs(operation, shape), parts, strict=True):
        assert torch.equal(follow(runs, [whole]), part)


def test_padding_is_left_out_and_columns_are_no_rows() -> None:
    whole = torch.randn(13, 2)
    [runs] = byte_ranges.split_runs(Padded(11), (13, 2))
    assert torch.equal(follow(runs, [whole]), whole[:11])
    assert (
        byte_ranges.split_runs(Padded(2, axis=1), (5, 3)) is None
        and byte_ranges.joined_runs(Padded(2, axis=1), [(5, 2)]) is None
    )


def test_runs_are_as_long_as_can_be() -> None:
    assert byte_ranges.joined_runs(Stacked(2), [(4, 3), (4, 3)]) == [Run(0, 0, 4), Run(1, 0, 4)]
    assert byte_ranges.joined_runs(Same(), [(7,)]) == [Run(0, 0, 7)]


def test_a_share_of_the_rows_cuts_runs() -> None:
    runs = [Run(0, 0, 4), Run(1, 2, 3), Run(0, 4, 4)]
    assert list(byte_ranges.within(runs, 3, 5)) == [Run(0, 3, 1), Run(1, 2, 3), Run(0, 4, 1)]
    assert list(byte_ranges.within(runs, 4, 3)) == [Run(1, 2, 3)] and not list(
        byte_ranges.within(runs, 4, 0)
    )


# Matrices of GPT-OSS's experts are transposed, and cut out of one tensor.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt_oss"])
def test_every_tensor_is_found_in_files_both_ways(tmp_path: Path, kind: str) -> None:
    architecture: Architecture = KINDS[kind]
    ours = MegatronView(
        SafetensorsFolder(make_hf(tmp_path / "hf", architecture, shard_size="20KB")), architecture
    )
    write_shards(ours, tmp_path / "shards")
    back = HuggingFaceView(ShardsFolder(tmp_path / "shards"), architecture)
    for view in (ours, back):
        for name, header in view.headers.items():
            found = whole_ranges(view, name)
            # Heads of the vision encoder may be padded in the columns of this one.
            assert (found is None) == (
                name.startswith("vision")
                and name.endswith(("linear_proj.weight", "projection_layer.weight"))
            ), name
            assert found is None or torch.equal(read(found, header), view[name]), name


def test_where_numbers_change_there_are_no_ranges(tmp_path: Path) -> None:
    ours = MegatronView(SafetensorsFolder(make_hf(tmp_path / "hf")), SMALL)
    back = HuggingFaceView(ours, SMALL, torch.float32)
    name = rows(SMALL)[0].names[0]
    assert whole_ranges(back, name) is None and back[name].dtype == torch.float32


@pytest.mark.parametrize("blocked", [False, True], ids=["in the kernel", "through memory"])
def test_ranges_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocked: bool) -> None:
    def refuse(*_: object) -> int:
        raise OSError("not here")

    if blocked:
        monkeypatch.setattr(byte_ranges.os, "sendfile", refuse)
    monkeypatch.setattr(byte_ranges, "_CHUNK_BYTES", 7)
    (tmp_path / "one").write_bytes(bytes(range(100)))
    (tmp_path / "two").write_bytes(bytes(range(100, 200)))
    with open(tmp_path / "out", "wb", buffering=0) as target:
        byte_ranges.copy(
            [
                Range(tmp_path / "one", 10, 30),
                Range(tmp_path / "two", 0, 20),
                Range(tmp_path / "one", 5, 1),
            ],
            target,
        )
        with pytest.raises(
            OSError, match=r"two: ends at byte 100, before the end of a tensor at 120"
        ):
            byte_ranges.copy([Range(tmp_path / "two", 90, 30)], target)
    assert (tmp_path / "out").read_bytes() == bytes(
        [*range(10, 40), *range(100, 120), 5, *range(190, 200)]
    )


def test_a_truncated_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", shard_size="20KB")
    shard = sorted(source.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{shard.name}: damaged"):
        SafetensorsFolder(source)


def test_a_share_is_read_without_the_rest(tmp_path: Path) -> None:
    rows = 1 << 19
    width = 8192
    last = torch.arange(4.0)
    header = {
        "big": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, rows * width * 4]}
    }
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rows * width * 4)  # 16 GiB that take no place on the disk
        file.seek(-16, 2)
        file.write(last.numpy().tobytes())
    view = MegatronView(SafetensorsFolder(tmp_path), [Row("ours", ("big",), (rows, width))])
    found = view.part("ours", (slice(rows - 2, None), slice(width - 4, None)))
    assert torch.equal(found, torch.stack([torch.zeros(4), last]))


def test_files_are_what_the_library_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = SafetensorsFolder(make_hf(tmp_path / "hf"))
    write_safetensors(source, tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == source.headers.keys() and all(
        torch.equal(source[name], again[name]) for name in again
    )
