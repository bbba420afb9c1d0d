"""Reading packs: memory maps over the index, one read a pack, a checksum on what is read.

Shapes: T tokens of the pack, N samples.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megavlm.data.manifest import Manifest, Shard, read_manifest
from megavlm.data.store import DESCRIPTION, HEADER, HEADER_BYTES, IMAGE, MAGIC, PROVENANCE, RECORD, VERSION, pack_header, sections

# Each map keeps a file open, and a process may commonly open 1024.
OPEN_SHARDS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """One pack as stored. The arrays are read-only views of the file.

    Args:
        pack_id: its place in the dataset.
        tokens: int32 [T].
        supervised: bool [T].
        lengths: int32 [N], tokens of each sample.
        provenance: [N] with fields ``source`` and ``line``.
        images: table of images, with the fields of ``store.IMAGE``.
        encoded: encoded bytes of all images; empty if they were not asked for.
    """

    pack_id: int
    tokens: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    provenance: np.ndarray
    images: np.ndarray
    encoded: np.ndarray

    @property
    def tiles(self) -> int:
        """Tiles of all images."""
        return int(self.images["tiles"].sum())

    def image(self, place: int) -> bytes:
        """The encoded bytes of an image."""
        row = self.images[place]
        return self.encoded[int(row["offset"]) : int(row["offset"] + row["bytes"])].tobytes()


class Index:
    """The records of all packs, over the shards' memory maps; nothing is read until it is asked for.

    ``index[pack_ids]`` is a structured array with the fields of ``store.RECORD``, in the order of the ids; ``index["tiles"]`` is a
    whole column (8 bytes a pack at most: meant for statistics).
    """

    def __init__(self, records: list[np.ndarray]) -> None:
        self._records = records
        self.starts = np.cumsum([0] + [len(shard) for shard in records], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: str | int | np.ndarray | list[int]) -> np.ndarray:
        if isinstance(key, str):
            return np.concatenate([shard[key] for shard in self._records])
        ids = np.asarray(key, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"pack ids run from 0 to {len(self) - 1}, not {ids.min()} to {ids.max()}")
        shards = self.shard_of(ids)
        found = np.empty(ids.shape, RECORD)
        for shard in np.unique(shards):
            chosen = shards == shard
            found[chosen] = self._records[shard][ids[chosen] - self.starts[shard]]
        return found

    def shard_of(self, ids: np.ndarray | int) -> np.ndarray:
        """The number of the shard that holds each pack."""
        return np.searchsorted(self.starts, ids, side="right") - 1


class Reader:
    """A packed dataset, memory-mapped. It can be pickled: the copy opens the files again.

    Args:
        folder: folder with ``manifest.json``.

    Raises:
        FileNotFoundError: no manifest, or a file that it names is missing.
        ValueError: a newer format, a file cut off, or an index of another build.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        self.index = Index([_map_index(self.folder, shard) for shard in self.manifest.shards])
        self._bins: OrderedDict[int, np.ndarray] = OrderedDict()
        if len(self.index) == 0:
            raise ValueError(f"{self.folder}: the dataset has no packs")

    def __reduce__(self) -> tuple:
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self.index)

    def bin_path(self, pack_id: int) -> Path:
        """The file that holds the pack."""
        return self.folder / f"{self.manifest.shards[int(self.index.shard_of(pack_id))].name}.bin"

    def read(self, pack_id: int, *, with_images: bool = True) -> Pack:
        """The pack, its checksums verified; without ``with_images`` the encoded images are neither read nor checked.

        Raises:
            ValueError: the bytes on the disk are not those that were written; names the pack and the file.
        """
        record = self.index[pack_id]
        shard = int(self.index.shard_of(pack_id))
        layout = sections(int(record["tokens"]), int(record["samples"]), int(record["images"]))
        start, end = int(record["offset"]), int(record["offset"] + record["bytes"])
        middle = start + layout.encoded
        data = self._bin(shard)
        if not 0 <= start <= middle <= end <= len(data):
            raise ValueError(f"pack {pack_id}: its record places it outside {self.bin_path(pack_id)}; the .idx file is damaged, pack again")
        head = data[start:middle]
        encoded = data[middle : end if with_images else middle]
        self._check(pack_id, "tokens", head, int(record["crc_tokens"]))
        if with_images:
            self._check(pack_id, "images", encoded, int(record["crc_images"]))
        count, samples = int(record["tokens"]), int(record["samples"])
        return Pack(
            pack_id=int(pack_id),
            tokens=head[: 4 * count].view("<i4"),
            supervised=head[layout.supervised : layout.supervised + count].view(bool),
            lengths=head[layout.lengths : layout.lengths + 4 * samples].view("<i4"),
            provenance=head[layout.provenance : layout.images].view(PROVENANCE),
            images=head[layout.images :].view(IMAGE),
            encoded=encoded,
        )

    def origin(self, pack: Pack, sample: int) -> str:
        """Where a sample of the pack comes from: ``annotations.jsonl:line``."""
        source, line = int(pack.provenance[sample]["source"]), int(pack.provenance[sample]["line"])
        sources = self.manifest.sources
        return f"{sources[source].annotations if source < len(sources) else f'source {source}'}:{line}"

    def check(self) -> int:
        """Read everything and verify all checksums; returns the number of packs.

        Raises:
            ValueError: at the first that is wrong.
        """
        for shard in self.manifest.shards:
            path = self.folder / f"{shard.name}.idx"
            if zlib.crc32(np.memmap(path, np.uint8, mode="r")) != shard.idx_crc32:
                raise ValueError(f"{path}: checksum is not the one in the manifest; the file is damaged, copy or pack the dataset again")
        for pack_id in range(len(self)):
            self.read(pack_id)
        return len(self)

    def _check(self, pack_id: int, what: str, data: np.ndarray, expected: int) -> None:
        found = zlib.crc32(data)
        if found != expected:
            raise ValueError(
                f"{self.bin_path(pack_id)}: pack {pack_id}: CRC32 of its {what} is {found:08x}, written was {expected:08x}; "
                "the file is damaged, copy or pack the dataset again"
            )

    def _bin(self, shard: int) -> np.ndarray:
        """The map of a ``.bin`` file; the files read last stay open."""
        if shard not in self._bins:
            if len(self._bins) >= OPEN_SHARDS:
                self._bins.popitem(last=False)
            # A plain view: slices of a memmap object are slow.
            self._bins[shard] = np.memmap(self.folder / f"{self.manifest.shards[shard].name}.bin", np.uint8, mode="r").view(np.ndarray)
        self._bins.move_to_end(shard)
        return self._bins[shard]


def _map_index(folder: Path, shard: Shard) -> np.ndarray:
    """The records of one shard, after a look at both files."""
    idx, data = folder / f"{shard.name}.idx", folder / f"{shard.name}.bin"
    for path in (idx, data):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing, but {folder / 'manifest.json'} names it; copy or pack the dataset again")
    with open(idx, "rb") as file:
        start = file.read(HEADER_BYTES)
    if len(start) < HEADER.size or not start.startswith(MAGIC):
        raise ValueError(f"{idx}: not an index of packs (it does not start with {MAGIC.decode()})")
    _, version, header_bytes, record_bytes, _, packs, _ = HEADER.unpack_from(start)
    if version > VERSION:
        raise ValueError(f"{idx}: format version {version}, but this megavlm reads up to {VERSION}; update megavlm or pack again")
    if (
        record_bytes != RECORD.itemsize
        or header_bytes != HEADER_BYTES
        or start[HEADER.size : HEADER.size + len(DESCRIPTION)] != DESCRIPTION
    ):
        raise ValueError(
            f"{idx}: records of {record_bytes} bytes with other fields than those of {RECORD.itemsize} bytes that this megavlm reads; "
            "pack the dataset again"
        )
    if start != pack_header(shard.packs, shard.bin_bytes):
        raise ValueError(
            f"{idx}: header says {packs} packs, {folder / 'manifest.json'} says {shard.packs}; the files do not belong together"
        )
    sizes = ((idx, HEADER_BYTES + RECORD.itemsize * shard.packs), (data, shard.bin_bytes))
    for path, expected in sizes:
        found = path.stat().st_size
        if found != expected:
            raise ValueError(
                f"{path}: {found} bytes, written were {expected}; the file is cut off or changed, copy or pack the dataset again"
            )
    if shard.packs == 0:
        return np.zeros(0, RECORD)
    return np.memmap(idx, RECORD, mode="r", offset=HEADER_BYTES, shape=(shard.packs,)).view(np.ndarray)
