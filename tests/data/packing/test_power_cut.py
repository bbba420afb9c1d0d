"""A packing writes what it has done into small files. None of them tells of more than is on the
disk, so that a power cut at any moment costs time and no data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavlm.data.packing import scan
from megavlm.data.packing.job import pack_dataset
from megavlm.data.packing.scan_state import ROW
from megavlm.data.store.index_format import INDEX_NAME, RECORD
from tests.data.packing.test_repair import folder, job, save  # noqa: F401  (a fixture)


def promised(name: str, text: str, beside: Path) -> Iterator[tuple[Path, int]]:
    """Yield the files that a file of a packing tells of, and their bytes."""
    facts = json.loads(text)
    if name == "scan.json":
        yield beside / f"rows.{facts['generation']}.bin", facts["rows"] * ROW.itemsize
        yield beside / f"rejects.{facts['generation']}.jsonl", facts["rejects_bytes"]
    elif name == "manifest.json":
        yield beside / INDEX_NAME, (beside / INDEX_NAME).stat().st_size
    elif name.startswith("packs-"):
        shard = facts["shard"]
        yield beside / f"{shard['name']}.bin", shard["bin_bytes"]
        yield beside / f"{shard['name']}.records", shard["packs"] * RECORD.itemsize


def test_what_a_packing_says_that_it_has_done_is_on_the_disk(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flushed: dict[int, int] = {}
    seen = set()
    fsync = os.fsync
    replace = os.replace

    def watched_fsync(descriptor: int) -> None:
        state = os.fstat(descriptor)
        flushed[state.st_ino] = state.st_size
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        if target.suffix == ".json":
            for path, size in promised(target.name, source.read_text(), target.parent):
                assert flushed.get(path.stat().st_ino, 0) >= size, (target.name, path.name)
                if size:
                    seen.add(path.name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(scan, "SAVE_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(scan, "RECORDS_PER_TASK", 1)
    with pytest.raises(ValueError, match="2 of 4 records"):
        pack_dataset(job(folder))
    save(folder / "1.png")
    with pytest.raises(ValueError, match="1 of 4 records"):
        pack_dataset(job(folder))
    save(folder / "2.png")
    pack_dataset(job(folder))
    scanned = {"rows.0.bin", "rejects.0.jsonl", "rows.1.bin", "rejects.1.jsonl", "rows.2.bin"}
    assert seen == scanned | {"packs-00000.bin", "packs-00000.records", INDEX_NAME}
