"""Shards get their rows in the order of the plan, and the rows of many are read at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megavlm.data.packing import plan as plans
from megavlm.data.packing import shard_rows as reading
from megavlm.data.packing.plan import PackPlan
from megavlm.data.packing.scan_state import ROW
from megavlm.data.packing.shard_rows import shard_rows
from megavlm.io import record_file
from megavlm.io.record_file import RecordFile
from megavlm.io.storage import LocalFiles

COUNT = 4000


@pytest.mark.parametrize("most", [1, 450, COUNT])
def test_each_shard_gets_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(plans, "LEAST_PACKS_PER_SHARD", 5)
    monkeypatch.setattr(reading, "LEAST_ROWS", most)
    monkeypatch.setattr(reading, "PARTS", COUNT)
    monkeypatch.setattr(record_file, "CHUNK_BYTES", 1000 * ROW.itemsize)
    values = np.zeros(COUNT, ROW)
    values["line"] = np.arange(COUNT)
    (tmp_path / "rows").write_bytes(values.tobytes())
    draw = np.random.default_rng(3)
    order = draw.permutation(COUNT).astype(np.int32)
    starts = np.unique([0, *draw.integers(0, COUNT, 97), COUNT])
    plan = PackPlan(order=order, starts=starts, tile_cap=1)
    sizes = []
    read = LocalFiles.read

    def counted(files: LocalFiles, name: str, start: int, end: int) -> bytes:
        sizes.append((end - start) // ROW.itemsize)
        return read(files, name, start, end)

    monkeypatch.setattr(LocalFiles, "read", counted)
    numbers = [number for number in range(plan.shards) if number != 2]  # it is written already
    rows = RecordFile(LocalFiles(tmp_path), "rows", ROW, COUNT)
    found = dict(shard_rows(rows, plan, numbers))
    assert list(found) == numbers
    for number, own in found.items():
        ends = plan.shard(number)
        assert own["line"].tolist() == order[ends[0] : ends[-1]].tolist()
    # A part goes through the file once, in chunks of a thousand rows.
    parts = {1: len(numbers), COUNT: 1}.get(most, len(sizes) // 4)
    assert len(sizes) == 4 * parts and max(sizes) <= 1000
    assert most != 450 or 1 < parts < len(numbers)
