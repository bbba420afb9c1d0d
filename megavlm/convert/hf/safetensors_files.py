"""Folders of Hugging Face: tensors in safetensors files, read and written one at a time or as
ranges of files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megavlm.convert.weights.byte_ranges import Range, copy, write, write_tensor
from megavlm.convert.weights.views import Header, Tensors, whole_ranges
from megavlm.io.atomic import sync_file
from megavlm.io.progress import Done, ignore

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SHARD_BYTES = 5_000_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LISTED = 10
_LENGTH_BYTES = 8
"""A safetensors file starts with the length of its header, little-endian; the header is JSON, the
numbers follow it.
"""


@dataclass(frozen=True)
class _Location:
    """Where a tensor stands: its file, its name there, and its first byte."""

    path: Path
    inner: str
    offset: int


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, in one file or in several with an index.

    A tensor that is asked for is a map of its file: only what is used of it is read.

    Args:
        folder: the folder.
        rename: from the name in the file to the name that is wanted; none leaves the tensor out.

    Raises:
        FileNotFoundError: there is no such folder, or one of its files is missing.
        ValueError: a file is damaged, or the index is of other files.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str | None] = str):
        self._folder = folder
        index = folder / INDEX_NAME
        listed = _read_index(index) if index.is_file() else None
        _refuse_partial(folder, listed)
        self._locations: dict[str, _Location] = {}
        seen: set[str] = set()
        self.headers: dict[str, Header] = {}
        for file_name in sorted(set(listed.values())) if listed is not None else [SINGLE_NAME]:
            start, header = _read_header(folder / file_name)
            for inner, facts in header.items():
                if listed is not None and listed.get(inner) != file_name:
                    raise ValueError(f"{index}: does not name {inner}, which {file_name} holds")
                seen.add(inner)
                name = rename(inner)
                if name is None:
                    continue
                if name in self._locations:
                    raise ValueError(
                        f"{folder / file_name}: {inner} and {self._locations[name].inner} are the"
                        " same weight"
                    )
                if facts["dtype"] not in _DTYPES:
                    raise ValueError(
                        f"{folder / file_name}: {inner} has dtype {facts['dtype']}, which is not"
                        " supported"
                    )
                self._locations[name] = _Location(
                    folder / file_name, inner, start + facts["data_offsets"][0]
                )
                self.headers[name] = Header(tuple(facts["shape"]), _DTYPES[facts["dtype"]])
        lost = sorted(set(listed or {}) - seen)
        if lost:
            raise ValueError(f"{index}: names {lost[0]}, which {listed[lost[0]]} does not hold")

    def __getitem__(self, name: str) -> Tensor:
        location = self._locations[name]
        # Opened anew, so that what has been read does not stay in memory: the map is of the whole
        # file, and goes with its tensors.
        with _open(location.path) as file:
            return file.get_tensor(location.inner)

    def ranges(self, name: str, rows: range) -> list[Range]:
        """See ``Tensors``."""
        location = self._locations[name]
        header = self.headers[name]
        row_bytes = header.nbytes // max(header.shape[0], 1)
        return [
            Range(location.path, location.offset + rows.start * row_bytes, len(rows) * row_bytes)
        ]

    def __str__(self) -> str:
        return str(self._folder)


def _refuse_partial(folder: Path, listed: Mapping[str, str] | None) -> None:
    """Raise FileNotFoundError for a folder that lacks files of weights, or their index."""
    if listed is None:
        found = sorted(folder.glob("model-*-of-*.safetensors"))
        if found and not (folder / SINGLE_NAME).is_file():
            raise FileNotFoundError(
                f"{folder / INDEX_NAME}: no such file, and {found[0].name} is one of several files"
                " of weights; download the whole folder"
            )
        return
    names = sorted(set(listed.values()))
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        raise FileNotFoundError(
            f"{folder}: {len(lost)} of {len(names)} files of weights are missing:"
            f" {', '.join(lost[:_LISTED])}{', ...' if len(lost) > _LISTED else ''}; download them"
        )


def tensor_names(folder: Path) -> set[str] | None:
    """Names of the tensors in a Hugging Face folder, from index or header; none where it holds no
    weights.

    Raises:
        ValueError: index or file are damaged.
    """
    if (folder / INDEX_NAME).is_file():
        return set(_read_index(folder / INDEX_NAME))
    return set(_open(folder / SINGLE_NAME).keys()) if (folder / SINGLE_NAME).is_file() else None


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """First byte behind the header of a safetensors file, and what the header says of each
    tensor.
    """
    with _open(path):  # whether all is there, and fits together
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return _LENGTH_BYTES + length, header


def _read_index(path: Path) -> dict[str, str]:
    """Name of the file of each tensor."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in listed.values()):
            raise TypeError("names of files are texts")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not an index of safetensors files ({error!r})") from error
    return listed


def _open(path: Path) -> safe_open:
    """Open a safetensors file and read its header only."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a folder with weights in safetensors files is needed"
        )
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error})") from error


def write_in_memory(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors that are in memory into one file.

    Raises:
        OSError: the disk is full, or fails.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def write_safetensors(
    tensors: Tensors, folder: Path, shard_bytes: int = SHARD_BYTES, done: Done = ignore
) -> None:
    """Write ``model.safetensors``, or several files and their index where they would be larger than
    ``shard_bytes``.

    At most one tensor is in memory.
    """
    shards = _plan_shards(tensors.headers, shard_bytes)
    total = len(shards)
    names = (
        [SINGLE_NAME]
        if total == 1
        else [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    )
    for file_name, shard in zip(names, shards, strict=True):
        _write_file(tensors, shard, folder / file_name, done)
    if total > 1:
        size = sum(header.nbytes for header in tensors.headers.values())
        file_of_name = {
            name: file_name
            for file_name, shard in zip(names, shards, strict=True)
            for name in shard
        }
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(file_of_name.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(tensors: Tensors, names: Sequence[str], path: Path, done: Done) -> None:
    """Write one file, tensor by tensor; the library itself would want all of them in memory."""
    # Wide numbers first, so that all of them stand at multiples of their size.
    names = sorted(names, key=lambda name: -tensors.headers[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        facts = tensors.headers[name]
        header[name] = {
            "dtype": _NAMES[facts.dtype],
            "shape": facts.shape,
            "data_offsets": [end, end + facts.nbytes],
        }
        end += facts.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with open(path, "xb", buffering=0) as file:
        write(memoryview(len(text).to_bytes(_LENGTH_BYTES, "little") + text), file)
        for name in names:
            found = whole_ranges(tensors, name)
            if found is None:
                write_tensor(tensors[name], file)
            else:
                copy(found, file)
            done(tensors.headers[name].nbytes)
        sync_file(file)


def _plan_shards(headers: Mapping[str, Header], shard_bytes: int) -> list[list[str]]:
    """Names of each file's tensors, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, header in headers.items():
        if shards[-1] and filled + header.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += header.nbytes
    return shards
