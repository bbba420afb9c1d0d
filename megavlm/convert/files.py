"""Tensors on disk, one at a time: safetensors folders of Hugging Face and distributed checkpoints of megatron-core.

Neither a process group nor a model is needed. A folder is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megavlm.convert.views import Header, Tensors

Done = Callable[[int], None]
"""Told how many bytes more are done."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SHARD_BYTES = 5_000_000_000
_PREFIX = "model."
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
# What megatron-core looks for beside the tensors: the format, and an (empty) file of everything that is no tensor.
_METADATA_NAME, _COMMON_NAME = "metadata.json", "common.pt"
# Under this name a module finds what FP8 keeps beside its weights; megatron-core asks for it without FP8 too, where it is none.
_EXTRA_STATE = "._extra_state/shard_0_1"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


def ignore(amount: int) -> None:
    """Take no notice of progress."""


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, in one file or in several with an index.

    Args:
        folder: the folder.
        rename: from the name in the file to the name that is wanted.

    Raises:
        FileNotFoundError: there is no such folder, or one of its files is missing.
        ValueError: a file is damaged, or the index is of other files.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = str):
        self._folder = folder
        index = folder / INDEX_NAME
        listed = _read_index(index) if index.is_file() else None
        names = sorted(set(listed.values())) if listed is not None else [SINGLE_NAME]
        self._files = {name: _open(folder / name) for name in names}
        self._places: dict[str, tuple[str, str]] = {}
        self.headers: dict[str, Header] = {}
        for file_name, file in self._files.items():
            for inner in file.keys():  # noqa: SIM118 - the object is no mapping
                if listed is not None and listed.get(inner) != file_name:
                    raise ValueError(f"{index}: does not name {inner}, which {file_name} holds")
                piece = file.get_slice(inner)
                if piece.get_dtype() not in _DTYPES:
                    raise ValueError(f"{folder / file_name}: {inner} has number format {piece.get_dtype()}, which is not supported")
                self._places[rename(inner)] = (file_name, inner)
                self.headers[rename(inner)] = Header(tuple(piece.get_shape()), _DTYPES[piece.get_dtype()])
        lost = sorted(set(listed or {}) - {inner for _, inner in self._places.values()})
        if lost:
            raise ValueError(f"{index}: names {lost[0]}, which {listed[lost[0]]} does not hold")

    def __getitem__(self, name: str) -> Tensor:
        file_name, inner = self._places[name]
        return self._files[file_name].get_tensor(inner)

    def __str__(self) -> str:
        return str(self._folder)


def tensor_names(folder: Path) -> set[str] | None:
    """Names of the tensors in a Hugging Face folder, from index or header; none where it holds no weights.

    Raises:
        ValueError: index or file are damaged.
    """
    if (folder / INDEX_NAME).is_file():
        return set(_read_index(folder / INDEX_NAME))
    return set(_open(folder / SINGLE_NAME).keys()) if (folder / SINGLE_NAME).is_file() else None


def _read_index(path: Path) -> dict[str, str]:
    """Name of the file of each tensor."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of safetensors files ({error!r})") from error


def _open(path: Path) -> safe_open:
    """A safetensors file, of which only the header is read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a folder with weights in safetensors files is needed")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error})") from error


def write_safetensors(tensors: Tensors, folder: Path, shard_bytes: int = SHARD_BYTES, done: Done = ignore) -> None:
    """Write ``model.safetensors``, or several files and their index where they would be larger than ``shard_bytes``.

    At most one file's tensors are in memory.
    """
    shards = _plan_shards(tensors.headers, shard_bytes)
    total = len(shards)
    names = [SINGLE_NAME] if total == 1 else [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        loaded = {}
        for name in shard:
            loaded[name] = tensors[name].contiguous()
            done(tensors.headers[name].nbytes)
        save_file(loaded, folder / file_name, metadata={"format": "pt"})
    if total > 1:
        size = sum(header.nbytes for header in tensors.headers.values())
        places = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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


class _Reader(FileSystemReader):
    """Reads the metadata once, not for every tensor."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._metadata = super().read_metadata()

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self._metadata


class ShardsFolder:
    """The weights, whole, of a distributed checkpoint of megatron-core, however it was sharded when it was written.

    Args:
        folder: ``shards/`` of a step's folder.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: its metadata cannot be read.
    """

    def __init__(self, folder: Path):
        if not (folder / ".metadata").is_file():
            raise FileNotFoundError(f"{folder}: no distributed checkpoint (.metadata is missing)")
        try:
            self._reader = _Reader(folder)
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"{folder / '.metadata'}: damaged, or of another version of torch ({error})") from error
        self._folder = folder
        entries = self._reader.read_metadata().state_dict_metadata.items()
        # Beside weights there are the optimizer's tensors, and what FP8 keeps, which is no tensor.
        self.headers = {
            key.removeprefix(_PREFIX): Header(tuple(entry.size), entry.properties.dtype)
            for key, entry in entries
            if key.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }

    def __getitem__(self, key: str) -> Tensor:
        header = self.headers[key]
        target = {_PREFIX + key: torch.empty(header.shape, dtype=header.dtype)}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _alone():
            torch_checkpoint.load(target, storage_reader=self._reader, planner=planner, no_dist=True)
        return target[_PREFIX + key]

    def __str__(self) -> str:
        return str(self._folder)


@contextmanager
def _alone() -> Iterator[None]:
    """torch warns that there is no process group, even where it is told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _LazyPlanner(DefaultSavePlanner):
    """Reads a tensor when it is written: the state dict that the writing is planned with holds only shapes and types of tensors.

    Args:
        tensors: to write.
        done: told the bytes of each.
    """

    def __init__(self, tensors: Tensors, done: Done):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._done = tensors, done

    def lookup_object(self, index: MetadataIndex) -> Tensor | None:
        key = index.fqn.removeprefix(_PREFIX)
        if key not in self._tensors.headers:
            return super().lookup_object(index)
        self._done(self._tensors.headers[key].nbytes)
        return self._tensors[key]


def write_shards(tensors: Tensors, folder: Path, done: Done = ignore) -> None:
    """Write a distributed checkpoint that ``megatron.core.dist_checkpointing.load`` reads at any layout.

    One tensor is in memory at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    planned: dict[str, Any] = {f"{_PREFIX}{module}{_EXTRA_STATE}": [None] for module in _stateful_modules(tensors.headers)}
    for key, header in tensors.headers.items():
        planned[_PREFIX + key] = torch.empty(header.shape, dtype=header.dtype, device="meta")
    with _alone():
        torch_checkpoint.save(planned, storage_writer=FileSystemWriter(folder), planner=_LazyPlanner(tensors, done), no_dist=True)
    torch.save({}, folder / _COMMON_NAME)
    (folder / _METADATA_NAME).write_text(json.dumps(_FORMAT), encoding="utf-8")


def _stateful_modules(keys: Iterable[str]) -> set[str]:
    """Modules that may want more than tensors back: linear layers and, with Transformer Engine, attention."""
    linear = {key.rpartition(".")[0] for key in keys if ".linear_" in key}
    return linear | {name.replace(".linear_qkv", ".core_attention") for name in linear if name.endswith(".linear_qkv")}


@contextmanager
def new_folder(target: Path, flag: str) -> Iterator[Path]:
    """A folder to fill, which takes the name ``target`` when the block ends well and is removed otherwise.

    Raises:
        ValueError: the target exists and is not an empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{flag} {target}: exists and is not an empty folder; name another one")
    target.parent.mkdir(parents=True, exist_ok=True)
    growing = target.with_name(f".growing_{target.name}")
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir()
    try:
        yield growing
        if target.exists():
            target.rmdir()
        growing.rename(target)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
