"""Reading packs: the records that are asked for, one read a pack, a checksum on what is read.

Shapes: T tokens of the pack, N samples.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megavlm.data.store.index_format import (
    FORM,
    FORMS,
    INDEX_NAME,
    RECORD,
    IndexForm,
    as_images,
    as_records,
    read_header,
)
from megavlm.data.store.manifest import Manifest, read_manifest
from megavlm.data.store.pack_format import PROVENANCE, Sections, sections
from megavlm.io.checksum import measure
from megavlm.io.open_files import OpenFiles
from megavlm.io.record_file import CHUNK_BYTES, RecordFile
from megavlm.io.storage import Files, ReadError, is_remote, open_folder

# Shards whose sizes are looked at before a run starts; a parallel file system takes a millisecond
# for each.
CHECKED_SHARDS = 1024
# Packs that cannot be read, of which the words are shown.
SHOWN_ERRORS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """One pack as stored. The arrays are read-only views of the file.

    Args:
        pack_id: its index in the dataset.
        tokens: int32 [T].
        supervised: bool [T].
        lengths: int32 [N], tokens of each sample.
        provenance: [N] with fields ``source``, ``line`` and ``instruction`` (tokens of it).
        images: table of images, with the fields of ``index_format.IMAGE``.
        instructions: int32 [M], what a Q-Former reads beside the images of each sample in turn.
        encoded: encoded bytes of all images; empty if they were not asked for.
    """

    pack_id: int
    tokens: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    provenance: np.ndarray
    images: np.ndarray
    instructions: np.ndarray
    encoded: np.ndarray

    @property
    def tiles(self) -> int:
        """Tiles of all images."""
        return int(self.images["tiles"].sum())

    def image(self, index: int) -> bytes:
        """Return the encoded bytes of an image."""
        row = self.images[index]
        return self.encoded[int(row["offset"]) : int(row["offset"] + row["bytes"])].tobytes()


class Index:
    """The records of all packs; nothing is read until it is asked for.

    ``index[pack_ids]`` is a structured array with the fields of ``store.RECORD``, in the order of
    the ids; ``index["tiles"]`` is a whole column (8 bytes a pack at most: meant for statistics).

    Args:
        rows: the records.
        packs: number of packs of each shard.
    """

    def __init__(self, rows: RecordFile, packs: Sequence[int]) -> None:
        self._rows = rows
        self.starts = np.concatenate([[0], np.cumsum(packs, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: str | int | np.ndarray | list[int]) -> np.ndarray:
        if not isinstance(key, str):
            return as_records(self._rows[key])
        if key not in self._rows.dtype.names:  # of an older version
            return np.zeros(len(self), RECORD[key])
        return self._rows[key]

    def largest(self, name: str) -> int:
        """Return the largest value of a field; the records are read a part at a time."""
        return max(int(rows[name].max()) for rows in self._rows.chunks())

    def shard_of(self, ids: np.ndarray | int) -> np.ndarray:
        """Return the number of the shard that holds each pack."""
        return np.searchsorted(self.starts, ids, side="right") - 1


class Reader:
    """A packed dataset. It can be pickled: the copy opens the files again.

    Args:
        folder: folder with ``manifest.json``, or the URL of one in object storage.
        opened: open files that it shares with other datasets; none: it has its own.
        with_shards: whether to look at the sizes of the shards, as ``check_shards`` does.

    Raises:
        FileNotFoundError: no manifest, or a file that it names is missing.
        ValueError: another format, a file cut off, or an index of another build.
    """

    def __init__(
        self, folder: Path | str, opened: OpenFiles | None = None, *, with_shards: bool = True
    ) -> None:
        self.folder: Path | str = str(folder) if is_remote(folder) else Path(folder)
        self._opened = opened
        self.files = open_folder(folder, opened)
        self.manifest: Manifest = read_manifest(self.folder)
        self._form = _check_index(self.files, self.manifest)
        if with_shards:
            check_shards([self.folder])
        packs = [shard.packs for shard in self.manifest.shards]
        form = self._form
        rows = RecordFile(self.files, INDEX_NAME, form.record, sum(packs), form.header_bytes)
        self.index = Index(rows, packs)
        if len(self.index) == 0:
            raise ValueError(f"{self.folder}: the dataset has no packs")

    def __reduce__(self) -> tuple:
        return partial(type(self), self.folder, self._opened, with_shards=False), ()

    def __len__(self) -> int:
        return len(self.index)

    def bin_path(self, pack_id: int) -> str:
        """Return the file that holds the pack."""
        return f"{self.folder}/{self.manifest.shards[int(self.index.shard_of(pack_id))].name}.bin"

    def read(self, pack_id: int, *, with_images: bool = True) -> Pack:
        """Read a pack and verify its checksums; without ``with_images`` the encoded images are
        neither read nor verified.

        Raises:
            ReadError: the bytes on the disk are not those that were written, or the storage does
                not give them; names the pack and the file.
        """
        try:
            return self._read(pack_id, with_images)
        except OSError as error:
            raise ReadError(f"{self.folder}: pack {pack_id}: {error}") from error

    def _read(self, pack_id: int, with_images: bool) -> Pack:
        record = self.index[pack_id]
        shard = self.manifest.shards[int(self.index.shard_of(pack_id))]
        layout = _sections(record, self._form)
        start = int(record["offset"])
        end = int(record["offset"] + record["bytes"])
        middle = start + layout.encoded
        if not 0 <= start <= middle <= end <= shard.bin_bytes:
            raise ReadError(
                f"pack {pack_id}: its record places it outside {self.bin_path(pack_id)};"
                f" {INDEX_NAME} is damaged, pack again"
            )
        end = end if with_images else middle
        data = self.files.read(f"{shard.name}.bin", start, end)
        if len(data) != end - start:
            raise ReadError(
                f"{self.bin_path(pack_id)}: ends inside pack {pack_id}; the file is cut off, copy"
                " or pack the dataset again"
            )
        block = np.frombuffer(data, np.uint8)
        head = block[: layout.encoded]
        encoded = block[layout.encoded :]
        self._check(pack_id, "tokens", head, int(record["crc_tokens"]))
        if with_images:
            self._check(pack_id, "images", encoded, int(record["crc_images"]))
        return parse_pack(int(pack_id), record, head, encoded, self._form)

    def origin(self, pack: Pack, sample: int) -> str:
        """Where a sample of the pack comes from: ``annotations.jsonl:line``."""
        source = int(pack.provenance[sample]["source"])
        line = int(pack.provenance[sample]["line"])
        sources = self.manifest.sources
        is_known = 0 <= source < len(sources)
        return f"{sources[source].annotations if is_known else f'source {source}'}:{line}"

    def check(self) -> int:
        """Read everything and verify all checksums; returns the number of packs.

        Raises:
            ReadError: names the packs that cannot be read, the first of many.
        """
        size = self._form.header_bytes + self._form.record.itemsize * len(self)
        _, crc = measure(
            self.files.read(INDEX_NAME, start, min(start + CHUNK_BYTES, size))
            for start in range(0, size, CHUNK_BYTES)
        )
        if crc != self.manifest.idx_crc32:
            raise ReadError(
                f"{self.folder}/{INDEX_NAME}: checksum is not the one in the manifest; the file is"
                " damaged, copy or pack the dataset again"
            )
        wrong = []
        for pack_id in range(len(self)):
            try:
                self.read(pack_id)
            except ReadError as error:
                wrong.append(str(error))
        if wrong:
            listed = "\n  ".join(
                [*wrong[:SHOWN_ERRORS], *(["..."] if wrong[SHOWN_ERRORS:] else [])]
            )
            raise ReadError(
                f"{self.folder}: {len(wrong)} of {len(self)} packs cannot be read:\n  {listed}"
            )
        return len(self)

    def _check(self, pack_id: int, what: str, data: np.ndarray, expected: int) -> None:
        found = zlib.crc32(data)
        if found != expected:
            raise ReadError(
                f"{self.bin_path(pack_id)}: pack {pack_id}: CRC32 of its {what} is {found:08x},"
                f" written was {expected:08x}; the file is damaged, copy or pack the dataset again"
            )


def parse_pack(
    pack_id: int,
    record: np.ndarray,
    head: np.ndarray,
    encoded: np.ndarray,
    form: IndexForm = FORM,
) -> Pack:
    """Read a pack from the bytes of its block.

    Args:
        pack_id: its index in the dataset.
        record: of the index.
        head: uint8, what stands before the encoded images.
        encoded: uint8, the encoded images.
        form: in which the pack was written.
    """
    count = int(record["tokens"])
    samples = int(record["samples"])
    layout = _sections(record, form)
    return Pack(
        pack_id=pack_id,
        tokens=head[: 4 * count].view("<i4"),
        supervised=head[layout.supervised : layout.supervised + count].view(bool),
        lengths=head[layout.lengths : layout.lengths + 4 * samples].view("<i4"),
        provenance=head[layout.provenance : layout.images].view(PROVENANCE),
        images=as_images(head[layout.images : layout.instructions].view(form.image)),
        instructions=head[layout.instructions :].view("<i4")[: int(record["instructions"])],
        encoded=encoded,
    )


def empty_pack(pack_id: int) -> Pack:
    """Return a pack that holds no sample."""
    return parse_pack(pack_id, np.zeros((), RECORD), np.empty(0, np.uint8), np.empty(0, np.uint8))


def _sections(record: np.ndarray, form: IndexForm) -> Sections:
    """Compute the layout of a block from its record."""
    counts = (int(record[name]) for name in ("tokens", "samples", "images", "instructions"))
    return sections(*counts, image=form.image)


def check_shards(folders: Iterable[Path | str]) -> None:
    """Compare the sizes of local shards with the manifests of their datasets. Of more than
    ``CHECKED_SHARDS``, so many are looked at, spread over all: a run over a thousand datasets
    starts at once, and what is wrong with another one is told when it is read.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a shard is cut off or changed.
    """
    local = [folder for folder in folders if not is_remote(folder)]
    shards = [read_manifest(folder).shards for folder in local]
    ends = np.cumsum([len(each) for each in shards])
    count = int(ends[-1]) if local else 0
    chosen = np.linspace(0, count - 1, min(count, CHECKED_SHARDS)).astype(int)
    for number in chosen.tolist():
        owner = int(np.searchsorted(ends, number, side="right"))
        shard = shards[owner][number - int(ends[owner])]  # counted from the end
        path = Path(local[owner]) / f"{shard.name}.bin"
        try:
            _check_size(path, path.stat().st_size, shard.bin_bytes)
        except FileNotFoundError:
            raise _missing(path) from None


def _check_index(files: Files, manifest: Manifest) -> IndexForm:
    """Look at the size and the header of the index, and return its form."""
    path = f"{files.folder}/{INDEX_NAME}"
    if not files.exists(INDEX_NAME):
        raise _missing(path)
    packs = sum(shard.packs for shard in manifest.shards)
    longest = max(form.header_bytes for form in FORMS.values())
    found = files.size(INDEX_NAME)
    form = read_header(path, files.read(INDEX_NAME, 0, min(longest, found)), packs)
    _check_size(path, found, form.header_bytes + form.record.itemsize * packs)
    return form


def _missing(path: Path | str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path}: missing, but the manifest names it; copy or pack the dataset again"
    )


def _check_size(path: Path | str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"{path}: {found} bytes, written were {expected}; "
            "the file is cut off or changed, copy or pack the dataset again"
        )
