"""The logarithms of the probabilities that a frozen model gives the answers of a dataset of
preferences, in a folder of their own:

    starts.bin     int64 [packs + 1]: pack p has the pairs starts[p] to starts[p + 1]
    logprobs.bin   float32 [pairs, 2]: of the chosen and of the rejected answer of each pair
    reference.json what they are of; written last, so that its presence means that all are there

All numbers are little-endian. While they are computed, ``partial.json`` stands for
``reference.json``, and ``logprobs.bin`` grows by whole packs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megavlm.data.store.manifest import Manifest
from megavlm.data.store.reader import Index
from megavlm.io import atomic
from megavlm.io.checksum import chunks, measure
from megavlm.io.open_files import OpenFiles
from megavlm.io.record_file import RecordFile
from megavlm.io.storage import LocalFiles, ReadError
from megavlm.io.typed_json import build

FORMAT_VERSION = 1
FACTS = "reference.json"
_PARTIAL = "partial.json"
_STARTS = "starts.bin"
_LOGPROBS = "logprobs.bin"
_START = np.dtype("<i8")
_LOGPROB = np.dtype("<f4")
_PAIR_BYTES = 2 * _LOGPROB.itemsize


@dataclass(frozen=True, kw_only=True)
class ReferenceFacts:
    """What the probabilities of a dataset are of.

    Args:
        version: of this format.
        weights: names the weights of the model that gives them.
        dataset: folder of the packs, for people.
        idx_crc32: checksum of the dataset's index.
        packs: of the dataset.
        pairs: of the dataset.
        crc32, starts_crc32: checksums of ``logprobs.bin`` and of ``starts.bin``; 0 as long as the
            first one grows.
    """

    version: int = FORMAT_VERSION
    weights: str
    dataset: str
    idx_crc32: int
    packs: int
    pairs: int
    crc32: int = 0
    starts_crc32: int = 0

    def is_of(self, other: ReferenceFacts) -> bool:
        """Return whether both are of the same answers and weights."""
        names = ("version", "weights", "idx_crc32", "packs", "pairs")
        return all(vars(self)[name] == vars(other)[name] for name in names)


def reference_folder(root: Path | str, dataset: Path | str, manifest: Manifest) -> Path:
    """Return where the probabilities of a dataset lie in a folder of those of several."""
    name = str(dataset).rstrip("/").rpartition("/")[2] or "packs"
    return Path(root) / f"{name}-{manifest.idx_crc32:08x}"


def read_facts(folder: Path) -> ReferenceFacts | None:
    """Return what complete probabilities are of; none if they are not complete.

    Raises:
        ValueError: the file is damaged, or of a newer format.
    """
    return _read(folder / FACTS)


def _read(path: Path) -> ReferenceFacts | None:
    facts = atomic.read_json(path)
    if facts is None:
        return None
    version = facts.get("version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version}, but this megavlm reads {FORMAT_VERSION}; update"
            " megavlm, or remove the folder"
        )
    return build(ReferenceFacts, facts, str(path))


class Reference:
    """The probabilities of a dataset, which are complete.

    Args:
        folder: that they lie in.
        opened: open files that it shares with datasets; none: it has its own.
    """

    def __init__(self, folder: Path | str, opened: OpenFiles | None = None) -> None:
        self.folder = Path(folder)
        self._files = LocalFiles(folder, opened)

    @property
    def is_complete(self) -> bool:
        """Whether all probabilities of the dataset are there. Raises as ``read_facts``."""
        return read_facts(self.folder) is not None

    @cached_property
    def facts(self) -> ReferenceFacts:
        """What they are of. Raises ReadError if they are not complete, or damaged."""
        try:
            found = read_facts(self.folder)
        except ValueError as error:
            raise ReadError(str(error)) from None
        if found is None:
            raise ReadError(
                f"{self.folder}: has no probabilities of a reference model; name the folder that"
                " has them with --data.reference"
            )
        return found

    @cached_property
    def _starts(self) -> RecordFile:
        return RecordFile(self._files, _STARTS, _START, self.facts.packs + 1)

    @cached_property
    def _pairs(self) -> RecordFile:
        return RecordFile(self._files, _LOGPROBS, _LOGPROB, 2 * self.facts.pairs)

    def of_pack(self, pack_id: int, pairs: int) -> np.ndarray:
        """Return the logarithms of the probabilities of a pack's answers, float32 [pairs, 2].

        Raises:
            ReadError: they are not those of so many pairs, or cannot be read.
        """
        first, end = self._starts[np.array([pack_id, pack_id + 1])].tolist()
        if end - first != pairs:
            raise ReadError(
                f"{self.folder}: has {end - first} pairs for pack {pack_id}, which has {pairs};"
                " remove the folder, and they are computed again"
            )
        return self._pairs[np.arange(2 * first, 2 * end)].reshape(-1, 2)

    def check(self) -> None:
        """Compare the files with their facts, and the checksum.

        Raises:
            ReadError: they are damaged.
        """
        facts = self.facts
        for name, size, crc in (
            (_LOGPROBS, facts.pairs * _PAIR_BYTES, facts.crc32),
            (_STARTS, (facts.packs + 1) * _START.itemsize, facts.starts_crc32),
        ):
            if _measure(self.folder / name) != (size, crc):
                raise ReadError(
                    f"{self.folder / name}: damaged (its size or checksum is another one); remove"
                    " the folder, and the probabilities are computed again"
                )


class ReferenceWriter:
    """Writes the probabilities of a dataset, pack after pack, and goes on where one that was
    stopped has come to, if that was of the same answers and weights.

    Args:
        folder: that they are to lie in.
        facts: what they are of.
        index: of the dataset.

    Attributes:
        packs: whose probabilities are on the disk.
    """

    def __init__(self, folder: Path, facts: ReferenceFacts, index: Index) -> None:
        self.folder = folder
        self.facts = facts
        folder.mkdir(parents=True, exist_ok=True)
        counts = index["samples"].astype(np.int64) // 2
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        (folder / FACTS).unlink(missing_ok=True)
        self.packs = self._packs_done()
        if not self.packs:
            # First, so that those of other weights never stand beside these facts.
            (folder / _LOGPROBS).unlink(missing_ok=True)
            atomic.write_bytes(folder / _STARTS, self._starts.astype(_START).tobytes())
            atomic.write_text(folder / _PARTIAL, _text(facts))
        # Stays open from block to block: close() closes it.
        self._file = open(folder / _LOGPROBS, "ab")  # noqa: SIM115
        self._file.truncate(int(self._starts[self.packs]) * _PAIR_BYTES)

    def _packs_done(self) -> int:
        """Return how many packs an earlier writer of the same has written whole."""
        before = _read(self.folder / _PARTIAL)
        path = self.folder / _LOGPROBS
        if before is None or not before.is_of(self.facts) or not path.is_file():
            return 0
        pairs = path.stat().st_size // _PAIR_BYTES
        return int(np.searchsorted(self._starts, pairs, side="right")) - 1

    def append(self, logprobs: np.ndarray) -> None:
        """Add those of the next packs, float32 [pairs, 2], and wait until they are on the disk.

        Raises:
            OSError: the disk is full, or cannot be written to.
            ValueError: these are not the pairs of whole packs.
        """
        end = int(self._starts[self.packs]) + len(logprobs)
        packs = int(np.searchsorted(self._starts, end, side="right")) - 1
        if packs >= len(self._starts) or self._starts[packs] != end:
            raise ValueError(f"{self.folder}: {len(logprobs)} pairs are not those of whole packs")
        try:
            self._file.write(np.ascontiguousarray(logprobs, _LOGPROB).tobytes())
            atomic.sync_file(self._file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None
        self.packs = packs

    def close(self) -> None:
        """Let go of the file, unless that is done; the probabilities are complete if all packs are
        there.

        Raises:
            ReadError: the file holds something else too.
            OSError: the disk is full, or cannot be written to.
        """
        if self._file.closed:
            return
        with contextlib.suppress(OSError):  # what could not be written, which append has told
            self._file.close()
        if self.packs < self.facts.packs:
            return
        size, crc = _measure(self.folder / _LOGPROBS)
        if size != self.facts.pairs * _PAIR_BYTES:
            (self.folder / _PARTIAL).unlink()  # nothing of it is to be gone on with
            raise ReadError(
                f"{self.folder / _LOGPROBS}: has {size:,} bytes, but {self.facts.pairs:,} pairs"
                " were written, so another run writes to it; start again when it has ended"
            )
        _, starts = _measure(self.folder / _STARTS)
        facts = dataclasses.replace(self.facts, crc32=crc, starts_crc32=starts)
        atomic.write_text(self.folder / FACTS, _text(facts))
        (self.folder / _PARTIAL).unlink()


def _text(facts: ReferenceFacts) -> str:
    return json.dumps(dataclasses.asdict(facts), indent=2, ensure_ascii=False) + "\n"


def _measure(path: Path) -> tuple[int, int]:
    try:
        return measure(chunks(path))
    except OSError as error:
        raise ReadError(f"{path}: {error.strerror or error}") from None
