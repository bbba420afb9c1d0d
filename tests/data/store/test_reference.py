"""Probabilities of a reference model on the disk: written by whole packs, gone on with, read back,
and refused if they are damaged or of something else.
"""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megavlm.data.store import reference as reference_module
from megavlm.data.store.manifest import read_manifest
from megavlm.data.store.reader import Reader
from megavlm.data.store.reference import (
    Reference,
    ReferenceFacts,
    ReferenceWriter,
    read_facts,
    reference_folder,
)
from megavlm.io.storage import ReadError
from tests.data.preference_packs import make_pairs
from tests.data.samples import write_packs

SIZES = dict(vocab_size=199, context_token_id=7, tile_size=16, features_per_tile=4)
PAIRS = (2, 1, 3, 2, 1)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    [samples] = make_pairs(1, sum(PAIRS), **SIZES)
    ends = np.cumsum(PAIRS).tolist()
    packs = [samples[end - count : end] for end, count in zip(ends, PAIRS, strict=True)]
    write_packs(tmp_path / "packs", packs, capacity=256, **SIZES)
    return Reader(tmp_path / "packs")


def facts_of(reader: Reader, weights: str = "step 5") -> ReferenceFacts:
    manifest = reader.manifest
    return ReferenceFacts(
        weights=weights,
        dataset=str(reader.folder),
        idx_crc32=manifest.idx_crc32,
        packs=manifest.totals.packs,
        pairs=manifest.totals.samples // 2,
    )


VALUES = -np.random.default_rng(0).random((sum(PAIRS), 2), np.float32) * 50
ENDS = np.cumsum(PAIRS).tolist()


def write(folder: Path, reader: Reader, first: int, end: int, weights: str = "step 5") -> int:
    """Write the packs from ``first`` to ``end``; return how many were there before."""
    writer = ReferenceWriter(folder, facts_of(reader, weights), reader.index)
    before = writer.packs
    if first < end:
        writer.append(VALUES[ENDS[first] - PAIRS[first] : ENDS[end - 1]])
    writer.close()
    return before


def test_what_is_written_is_read_back_pack_by_pack(tmp_path: Path, reader: Reader) -> None:
    folder = reference_folder(tmp_path / "of", reader.folder, reader.manifest)
    assert folder.name == f"packs-{reader.manifest.idx_crc32:08x}"
    assert write(folder, reader, 0, 5) == 0
    reference = Reference(folder)
    reference.check()
    assert reference.is_complete and reference.facts.is_of(facts_of(reader))
    for pack, (count, end) in enumerate(zip(PAIRS, ENDS, strict=True)):
        found = reference.of_pack(pack, count)
        assert found.dtype == np.float32 and np.array_equal(found, VALUES[end - count : end])
    with pytest.raises(ReadError, match="has 3 pairs for pack 2, which has 4"):
        reference.of_pack(2, 4)


def test_a_writer_goes_on_behind_the_last_whole_pack(tmp_path: Path, reader: Reader) -> None:
    write(tmp_path / "of", reader, 0, 2)
    assert read_facts(tmp_path / "of") is None and not Reference(tmp_path / "of").is_complete
    with (tmp_path / "of" / "logprobs.bin").open("ab") as file:
        file.write(VALUES[3:5].tobytes() + b"\1\2\3")  # killed inside of pack 2
    assert write(tmp_path / "of", reader, 2, 5) == 2
    assert np.array_equal(Reference(tmp_path / "of").of_pack(4, 1), VALUES[8:])
    Reference(tmp_path / "of").check()


@pytest.mark.parametrize("change", ["weights", "packs"])
def test_a_writer_begins_again_for_other_weights_or_packs(
    tmp_path: Path, reader: Reader, change: str
) -> None:
    write(tmp_path / "of", reader, 0, 2)
    if change == "weights":
        assert write(tmp_path / "of", reader, 0, 5, "step 6") == 0
    else:
        facts = dataclasses.replace(facts_of(reader), idx_crc32=1)
        assert ReferenceWriter(tmp_path / "of", facts, reader.index).packs == 0


def test_a_writer_killed_at_its_start_leaves_none_of_other_weights(
    tmp_path: Path, reader: Reader
) -> None:
    write(tmp_path / "of", reader, 0, 2)
    with (
        mock.patch.object(reference_module, "open", side_effect=KeyboardInterrupt, create=True),
        pytest.raises(KeyboardInterrupt),
    ):
        ReferenceWriter(tmp_path / "of", facts_of(reader, "step 6"), reader.index)
    assert write(tmp_path / "of", reader, 0, 5, "step 6") == 0


def test_what_two_writers_wrote_is_not_complete(tmp_path: Path, reader: Reader) -> None:
    folder = tmp_path / "of"
    writer = ReferenceWriter(folder, facts_of(reader), reader.index)
    writer.append(VALUES)
    with (folder / "logprobs.bin").open("ab") as file:
        file.write(VALUES.tobytes())
    with pytest.raises(ReadError, match="has 144 bytes, but 9 pairs were written.*another run"):
        writer.close()
    assert not Reference(folder).is_complete
    assert write(folder, reader, 0, 5) == 0
    Reference(folder).check()


def test_a_full_disk_is_told_once_with_the_file(tmp_path: Path, reader: Reader) -> None:
    writer = ReferenceWriter(tmp_path / "of", facts_of(reader), reader.index)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(OSError, match=r"of/logprobs\.bin"):
            writer.append(VALUES)
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not Reference(tmp_path / "of").is_complete
    assert write(tmp_path / "of", reader, 1, 5) == 1


def test_pairs_of_half_a_pack_are_refused(tmp_path: Path, reader: Reader) -> None:
    writer = ReferenceWriter(tmp_path / "of", facts_of(reader), reader.index)
    with pytest.raises(ValueError, match="4 pairs are not those of whole packs"):
        writer.append(VALUES[:4])
    with pytest.raises(ValueError, match="10 pairs are not those of whole packs"):
        writer.append(np.zeros((10, 2), np.float32))
    writer.close()


def test_damage_is_told(tmp_path: Path, reader: Reader) -> None:
    folder = tmp_path / "of"
    write(folder, reader, 0, 5)
    path = folder / "logprobs.bin"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ReadError, match=r"logprobs\.bin: damaged.*remove the folder"):
        Reference(folder).check()
    content[20] ^= 1
    path.write_bytes(content)
    starts = (folder / "starts.bin").read_bytes()
    (folder / "starts.bin").write_bytes(starts[:8] + b"\3" + starts[9:])  # 2 before
    with pytest.raises(ReadError, match=r"starts\.bin: damaged"):
        Reference(folder).check()
    (folder / "starts.bin").write_bytes(starts)
    Reference(folder).check()
    path.write_bytes(content[:-8])
    with pytest.raises(ReadError, match="damaged"):
        Reference(folder).check()
    path.unlink()
    with pytest.raises(ReadError, match="No such file"):
        Reference(folder).check()
    facts = json.loads((folder / "reference.json").read_text())
    (folder / "reference.json").write_text(json.dumps(facts | {"version": 2}))
    with pytest.raises(ReadError, match="format version 2, but this megavlm reads 1"):
        Reference(folder).of_pack(0, 2)
    (folder / "reference.json").unlink()
    with pytest.raises(ReadError, match=r"has no probabilities.*--data\.reference"):
        Reference(folder).of_pack(0, 2)


def test_a_folder_of_packs_is_known_by_its_content(tmp_path: Path, reader: Reader) -> None:
    manifest = read_manifest(reader.folder)
    assert reference_folder("root", "s3://bucket/packs/", manifest) == Path(
        f"root/packs-{manifest.idx_crc32:08x}"
    )
