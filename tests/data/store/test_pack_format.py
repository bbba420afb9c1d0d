"""What is written is what is read, and what was damaged in between is named."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import zlib

import numpy as np
import pytest

from megavlm.data.sample import Sample
from megavlm.data.store import reader as reader_module
from megavlm.data.store.index_format import FORM, FORMS, HEADER, RECORD, IndexForm
from megavlm.data.store.manifest import Manifest, read_manifest
from megavlm.data.store.pack_format import PackRules, ShardWriter, pack_block, sections
from megavlm.data.store.reader import Reader
from megavlm.io.storage import ReadError
from tests.data.samples import make_dataset, make_sample, store_packs

FACTS = {"vocab_size": 512, "context_token_id": 500, "tile_size": 32, "features_per_tile": 4}
MANIFEST = Manifest(
    tokenizer_fingerprint="x",
    vocab_size=512,
    context_token_id=500,
    template="t",
    image_size=32,
    features_per_tile=4,
    capacity=300,
    tile_cap=99,
)


def random_packs(count: int) -> list[list[Sample]]:
    rng = np.random.default_rng(7)
    sizes = rng.integers(1, 5, count)
    return [
        [
            make_sample(
                rng,
                images=int(rng.integers(3)),
                text_tokens=int(rng.integers(1, 30)),
                line=line,
                instruction_tokens=int(rng.integers(4)),
                **FACTS,
            )
            for line in range(1, size + 1)
        ]
        for size in sizes
    ]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return make_stored(tmp_path_factory.mktemp("packs"))


def make_stored(folder):
    packs = random_packs(12)
    return folder, packs, store_packs(folder, packs, MANIFEST, shard_bytes=4000)


@pytest.fixture
def damaged(stored, tmp_path):
    """Copy the dataset, so that a test may damage it."""
    return shutil.copytree(stored[0], tmp_path / "packs")


def flip(path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_round_trip(stored):
    folder, packs, manifest = stored
    reader = Reader(folder)
    assert reader.manifest == manifest == read_manifest(folder)
    assert len(manifest.shards) > 2
    for pack_id, samples in enumerate(packs):
        pack = reader.read(pack_id)
        assert np.array_equal(pack.tokens, np.concatenate([sample.tokens for sample in samples]))
        assert np.array_equal(
            pack.supervised, np.concatenate([sample.supervised for sample in samples])
        )
        assert pack.tokens.dtype == np.int32 and pack.supervised.dtype == bool
        assert pack.lengths.tolist() == [sample.length for sample in samples]
        assert pack.provenance["line"].tolist() == [sample.line for sample in samples]
        asked = [sample.instruction for sample in samples]
        assert pack.provenance["instruction"].tolist() == list(map(len, asked))
        assert np.array_equal(pack.instructions, np.concatenate(asked))
        images = [(place, image) for place, sample in enumerate(samples) for image in sample.images]
        assert pack.images["sample"].tolist() == [place for place, _ in images]
        for number, (_, image) in enumerate(images):
            assert pack.image(number) == image.encoded
            row = pack.images[number]
            assert all(
                row[name] == getattr(image, name)
                for name in ("width", "height", "columns", "rows", "tiles", "frames", "interval")
            )
    assert reader.check() == 12


def test_index(stored):
    folder, packs, manifest = stored
    index = Reader(folder).index
    ids = np.array([11, 0, 5, 5])
    rows = index[ids]
    assert rows.dtype == RECORD
    for row, pack_id in zip(rows, ids, strict=True):
        samples = packs[pack_id]
        # The first token of a sample is no label, so it does not count.
        counts = [int(sample.supervised[1:].sum()) for sample in samples]
        lengths = [sample.length for sample in samples]
        assert (
            row["samples"] == len(samples)
            and row["tokens"] == sum(lengths)
            and row["longest"] == max(lengths)
        )
        assert row["images"] == sum(len(sample.images) for sample in samples) and row[
            "tiles"
        ] == sum(sample.tiles for sample in samples)
        assert row["supervised"] == row["weight_token"] == sum(counts)
        assert row["weight_sample"] == sum(count > 0 for count in counts)
        assert row["weight_square"] == pytest.approx(sum(count**0.5 for count in counts), rel=1e-15)
        assert row["squared_lengths"] == sum(length**2 for length in lengths)
        shown = [image.tiles for sample in samples for image in sample.images]
        assert row["squared_tiles"] == sum(tiles**2 for tiles in shown)
        asked = [len(sample.instruction) for sample in samples]
        assert (row["instructions"], row["longest_instruction"]) == (sum(asked), max(asked))
        assert row["offset"] % 64 == 0
    for name in ("tokens", "samples", "images", "tiles", "supervised", "bytes"):
        assert getattr(manifest.totals, name) == index[name].sum()
        assert index.largest(name) == index[name].max()
    assert index[3] == index[[3]][0]
    with pytest.raises(IndexError, match="0 to 11, not 12"):
        index[12]


def test_one_supervised_first_token_counts_nothing():
    sample = Sample(
        tokens=np.array([5, 6], np.int32),
        supervised=np.array([True, False]),
        images=(),
        source=0,
        line=1,
    )
    _, record = pack_block([sample])
    assert record["supervised"] == record["weight_sample"] == record["weight_square"] == 0


def test_same_samples_same_bytes(stored, tmp_path):
    make_stored(tmp_path)
    for path in stored[0].iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_pickle(stored):
    copy = pickle.loads(pickle.dumps(Reader(stored[0])))
    assert len(pickle.dumps(copy)) < 1000
    assert np.array_equal(copy.read(4).tokens, Reader(stored[0]).read(4).tokens)


def test_more_shards_than_may_stay_open(tmp_path, monkeypatch):
    make_dataset(tmp_path, packs=6, shard_bytes=1)
    monkeypatch.setattr("megavlm.io.open_files.most_open", lambda: 2)
    reader = Reader(tmp_path)
    assert len(reader.manifest.shards) == 6
    first = reader.read(0)
    tokens = first.tokens.copy()
    assert reader.check() == 6
    assert np.array_equal(first.tokens, tokens)


def test_packs_against_the_rules_are_refused(tmp_path):
    long = Sample(
        tokens=np.zeros(301, np.int32), supervised=np.zeros(301, bool), images=(), source=0, line=1
    )
    rules = PackRules(capacity=300, tile_cap=2, alignment=4)
    with ShardWriter(tmp_path, 0, rules) as writer:
        for samples in ([], [long], [long_part(long, 297), long_part(long, 1)]):
            with pytest.raises(ValueError, match="aligned to 4.*--capacity 300"):
                writer.write(samples)
        tiles = make_sample(np.random.default_rng(0), images=3, text_tokens=3, line=1, **FACTS)
        with pytest.raises(ValueError, match="above --tile_cap 2"):
            writer.write([tiles])
    with pytest.raises(ValueError, match="--capacity 10 is not a multiple of --alignment 4"):
        PackRules(capacity=10, alignment=4)


def long_part(sample: Sample, length: int) -> Sample:
    return dataclasses.replace(
        sample, tokens=sample.tokens[:length], supervised=sample.supervised[:length]
    )


def test_damaged_bytes(stored, damaged):
    record = Reader(stored[0]).index[0]
    layout = sections(
        *(int(record[name]) for name in ("tokens", "samples", "images", "instructions"))
    )
    path = damaged / "packs-00000.bin"
    flip(path, 8)
    with pytest.raises(
        ValueError,
        match=r"packs-00000.bin: pack 0: CRC32 of its tokens is [0-9a-f]{8}, written was",
    ):
        Reader(damaged).read(0)
    flip(path, 8)
    if record["images"] == 0:
        pytest.fail("the first pack needs an image for this test")
    flip(path, layout.encoded + 5)
    Reader(damaged).read(0, with_images=False)
    with pytest.raises(ValueError, match="pack 0: CRC32 of its images"):
        Reader(damaged).read(0)


def test_a_check_names_all_damaged_packs_or_the_first_of_many(damaged, monkeypatch):
    flip(damaged / "packs-00000.bin", 8)
    reader = Reader(damaged)
    (damaged / "packs-00001.bin").unlink()
    start, end = reader.index.starts[1:3].tolist()
    with pytest.raises(ReadError, match=rf"{1 + end - start} of 12 packs cannot be read:") as told:
        reader.check()
    _, first, *others = str(told.value).splitlines()
    assert "packs-00000.bin: pack 0: CRC32 of its tokens" in first
    assert len(others) == end - start > 1
    for pack_id, line in zip(range(start, end), others, strict=True):
        assert f": pack {pack_id}: [Errno 2] No such file" in line and "packs-00001.bin" in line
    monkeypatch.setattr(reader_module, "SHOWN_ERRORS", 2)
    with pytest.raises(ReadError) as told:
        reader.check()
    assert str(told.value).splitlines()[1:] == [first, others[0], "  ..."]


def test_damaged_index(damaged):
    path = damaged / "packs.idx"
    flip(path, FORM.header_bytes + 16)
    with pytest.raises(ValueError, match="packs.idx: checksum"):
        Reader(damaged).check()
    flip(path, FORM.header_bytes + 16)
    second = int(Reader(damaged).index.starts[1])
    flip(path, FORM.header_bytes + second * RECORD.itemsize + 5)
    with pytest.raises(ValueError, match="outside .*packs-00001.bin; packs.idx is damaged"):
        Reader(damaged).read(second)


@pytest.mark.parametrize("name", ["packs-00001.bin", "packs.idx"])
def test_cut_off(damaged, name):
    path = damaged / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name}: \d+ bytes, written were \d+"):
        Reader(damaged)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{name}: .*the file is cut off"):
        Reader(damaged)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: missing"):
        Reader(damaged)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"?", "not an index of packs"),
        (8, bytes([FORM.version + 1]), "format version 6, but this megavlm reads 2, 3, 4, 5"),
        (16, bytes([72]), "records of 72 bytes"),
        (HEADER.size + 4, b"?", "with other fields"),
        (24, bytes([99]), "header says 99 packs"),
    ],
)
def test_wrong_header(damaged, place, value, message):
    path = damaged / "packs.idx"
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        Reader(damaged)
    assert str(path) in str(caught.value)


def test_no_packs(tmp_path):
    store_packs(tmp_path, [], MANIFEST)
    with pytest.raises(ValueError, match="the dataset has no packs"):
        Reader(tmp_path)


def write_older(folder, packs, form: IndexForm) -> None:
    """Write packs as an older version did: with its tables of images, in which a frame of a video
    had no grid, and its index.
    """
    manifest = store_packs(folder, packs, MANIFEST, shard_bytes=4000)
    new = Reader(folder)
    rows = new.index[np.arange(len(packs))]
    blocks = [new.read(pack_id) for pack_id in range(len(packs))]
    older = np.zeros(len(packs), form.record)
    shards = []
    for number, shard in enumerate(manifest.shards):
        content = b""
        for pack_id in np.flatnonzero(new.index.shard_of(np.arange(len(packs))) == number):
            pack = blocks[pack_id]
            content += bytes(-len(content) % 64)
            table = np.zeros(len(pack.images), form.image)
            for name in form.image.names:
                table[name] = pack.images[name]
            left = pack.images["frames"]
            table["columns"] = np.where(left, 0, table["columns"])
            table["rows"] = np.where(left, left, table["rows"])
            counts = (len(pack.tokens), len(pack.lengths), len(table))
            places = sections(*counts, image=form.image)
            parts = {
                0: pack.tokens,
                places.supervised: pack.supervised,
                places.lengths: pack.lengths,
                places.provenance: pack.provenance,
                places.images: table,
            }
            head = np.zeros(places.encoded, np.uint8)
            for start, values in parts.items():
                data = values.tobytes()
                head[start : start + len(data)] = np.frombuffer(data, np.uint8)
            row = rows[pack_id]
            row["offset"] = len(content)
            row["bytes"] = len(head) + len(pack.encoded)
            row["crc_tokens"] = zlib.crc32(head)
            content += head.tobytes() + pack.encoded.tobytes()
        (folder / f"{shard.name}.bin").write_bytes(content)
        shards.append(dataclasses.replace(shard, bin_bytes=len(content)))
    for name in form.record.names:
        older[name] = rows[name]
    index = form.header(len(packs)) + older.tobytes()
    (folder / "packs.idx").write_bytes(index)
    shown = dict(idx_crc32=zlib.crc32(index), shards=tuple(shards))
    dataclasses.replace(manifest, **shown).write(folder)


def as_frames(sample: Sample) -> Sample:
    """Return a sample whose images are the frames of a video."""
    frames = [
        dataclasses.replace(image, columns=1, rows=1, frames=len(sample.images) - number)
        for number, image in enumerate(sample.images)
    ]
    return dataclasses.replace(sample, images=tuple(frames))


@pytest.mark.parametrize(("version", "size"), [(2, 80), (3, 88), (4, 96)])
def test_packs_of_older_versions_are_read(stored, tmp_path, version: int, size: int):
    packs = [
        [
            dataclasses.replace(sample, instruction=np.zeros(0, np.int32))
            for sample in (first, *map(as_frames, others))
        ]
        for first, *others in stored[1]
    ]
    store_packs(tmp_path / "new", packs, MANIFEST, shard_bytes=4000)
    write_older(tmp_path / "old", packs, FORMS[version])
    new = Reader(tmp_path / "new")
    old = Reader(tmp_path / "old")
    assert FORMS[version].record.itemsize == size and old.check() == len(packs)
    ids = np.arange(len(packs))
    rows = new.index[ids]
    read = old.index[ids]
    assert rows["squared_tiles"].any() and read["squared_tiles"].any() == (version > 3)
    # Blocks are of other sizes.
    for name in set(RECORD.names) - {"squared_tiles", "offset", "bytes", "crc_tokens"}:
        assert np.array_equal(read[name], rows[name])
    assert not old.index["instructions"].any() and old.index["tokens"].sum() > 0
    frames = 0
    for pack_id in range(len(packs)):
        ours = new.read(pack_id)
        theirs = old.read(pack_id)
        assert np.array_equal(ours.tokens, theirs.tokens) and not len(theirs.instructions)
        assert np.array_equal(ours.images, theirs.images)
        assert np.array_equal(ours.encoded, theirs.encoded)
        frames += int((theirs.images["frames"] > 1).sum())
    assert frames > 0
