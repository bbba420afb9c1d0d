"""Distributed checkpoints of megatron-core, whole tensors at a time or as ranges of files. Neither
a process group nor a model is needed.

Such a checkpoint is one of torch's: files of records, each a tensor (or a part of one) as
``torch.save`` writes it, and ``.metadata``, which says where each part stands. ``torch.save`` makes
the frame of a record here, and leaves out the numbers, which are copied into it.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    SavePlan,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future
from torch.serialization import skip_data

from megavlm.checkpoint.metadata import read_description
from megavlm.convert.weights.byte_ranges import Range, copy, write, write_tensor
from megavlm.convert.weights.views import Header, Tensors, whole_ranges
from megavlm.io.atomic import sync_file
from megavlm.io.progress import Done, ignore

_PREFIX = "model."
_AVERAGE_PREFIX = "ema."
_FILE_NAME = "__0_0.distcp"
# What megatron-core looks for beside the tensors: the format, and an (empty) file of everything
# that is no tensor.
_METADATA_NAME = "metadata.json"
_COMMON_NAME = "common.pt"
# Under this name a module finds what FP8 keeps beside its weights; megatron-core asks for it
# without FP8 too, where it is none.
_EXTRA_STATE = "._extra_state/shard_0_1"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class _Reader(FileSystemReader):
    """Reads the metadata once, not for every tensor, and runs nothing that it names."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._metadata = read_description(folder / ".metadata")

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self._metadata


def _current_key(stored: str) -> str:
    """Return the checkpoint key of a tensor; format 1 said ``projector`` for the connector."""
    return re.sub(r"^projector\.", "connector.", stored.removeprefix(_PREFIX))


class ShardsFolder:
    """The weights, whole, of a distributed checkpoint of megatron-core, however it was sharded when
    it was written.

    Args:
        folder: ``shards/`` of a step's folder.
        averages: take the moving averages of the parameters that have one.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: its metadata cannot be read, or it holds no averages.
    """

    def __init__(self, folder: Path, *, averages: bool = False):
        if not (folder / ".metadata").is_file():
            raise FileNotFoundError(f"{folder}: no distributed checkpoint (.metadata is missing)")
        self._reader = _Reader(folder)
        self._folder = folder
        stored = self._reader.read_metadata().state_dict_metadata
        # Beside weights there are the optimizer's tensors, and what FP8 keeps, which is no tensor.
        self._stored_keys = {
            _current_key(key): key
            for key, entry in stored.items()
            if key.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }
        self.headers = {
            key: Header(tuple(stored[name].size), stored[name].properties.dtype)
            for key, name in self._stored_keys.items()
        }
        if averages:  # in float32, read with the dtype of the parameter
            start = _AVERAGE_PREFIX + _PREFIX
            found = {key[len(start) :]: key for key in stored if key.startswith(start)}
            if not found:
                raise ValueError(
                    f"{folder}: holds no averages of parameters; its run had no --ema.decay"
                )
            self._stored_keys |= found
        self._entries = {key: stored[name] for key, name in self._stored_keys.items()}
        # Rows are asked for run by run, and many runs are of one part.
        self._numbers = lru_cache(maxsize=64)(self._find_numbers)

    def __getitem__(self, key: str) -> Tensor:
        header = self.headers[key]
        name = self._stored_keys[key]
        dtype = self._entries[key].properties.dtype
        target = {name: torch.empty(header.shape, dtype=dtype)}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _alone():
            torch_checkpoint.load(
                target, storage_reader=self._reader, planner=planner, no_dist=True
            )
        return target[name].to(header.dtype)

    def ranges(self, key: str, rows: range) -> list[Range] | None:
        """See ``Tensors``; none where a tensor was split along another axis than its first when it
        was written.
        """
        shape = self.headers[key].shape
        if self._entries[key].properties.dtype != self.headers[key].dtype:
            return None
        found = []
        row_bytes = self.headers[key].nbytes // max(shape[0], 1)
        row = rows.start
        for chunk in sorted(self._entries[key].chunks, key=lambda chunk: chunk.offsets):
            if tuple(chunk.sizes[1:]) != shape[1:]:
                return None
            first = chunk.offsets[0]
            last = chunk.offsets[0] + chunk.sizes[0]
            if not first <= row < min(last, rows.stop):
                continue
            numbers = self._numbers(key, chunk.offsets)
            if numbers is None:
                return None
            count = min(last, rows.stop) - row
            found.append(
                Range(numbers.path, numbers.offset + (row - first) * row_bytes, count * row_bytes)
            )
            row += count
        return found if row == rows.stop else None

    def _find_numbers(self, key: str, offsets: torch.Size) -> Range | None:
        """Find the byte range of one shard of a tensor; None if the file does not store it plainly,
        row by row.
        """
        index = MetadataIndex(self._stored_keys[key], offsets)
        info = self._reader.read_metadata().storage_data[index]
        path = self._folder / info.relative_path
        chunk = next(chunk for chunk in self._entries[key].chunks if chunk.offsets == offsets)
        with open(path, "rb") as file:
            record = _create_file_view(file, info.offset, info.length)
            with skip_data():
                frame = torch.load(record, map_location="cpu", weights_only=True)
            is_plain = (
                frame.is_contiguous()
                and not frame.storage_offset()
                and frame.dtype == self.headers[key].dtype
            )
            if info.transform_descriptors or not is_plain or frame.shape != chunk.sizes:
                return None
            record.seek(0)
            start = torch._C.PyTorchFileReader(record).get_record_offset("data/0")
        return Range(path, info.offset + start, frame.nbytes)

    def __str__(self) -> str:
        return str(self._folder)


@contextmanager
def _alone() -> Iterator[None]:
    """torch warns that there is no process group, even where it is told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Frame(io.RawIOBase):
    """Where ``torch.save`` writes a tensor without its numbers: it steps over their place, and they
    are written then.

    Args:
        file: unbuffered.
        fill: writes the numbers to it.
    """

    def __init__(self, file: BinaryIO, fill: Callable[[BinaryIO], None]):
        self._file = file
        self._fill = fill

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        block = memoryview(content)
        write(block, self._file)
        return block.nbytes

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        before = self._file.tell()
        if whence == io.SEEK_CUR and offset:
            self._fill(self._file)
            if self._file.tell() != before + offset:
                raise ValueError(
                    f"{self._file.tell() - before} bytes were written where a tensor has {offset}"
                )
        return self._file.tell()


class _Writer(FileSystemWriter):
    """Writes one file, tensor by tensor, each from the place that it comes from.

    Args:
        folder: of the checkpoint.
        tensors: to write.
        done: told the bytes of each.
    """

    def __init__(self, folder: Path, tensors: Tensors, done: Done):
        super().__init__(folder)
        self._tensors = tensors
        self._done = done

    def write_data(self, plan: SavePlan, planner: DefaultSavePlanner) -> Future[list[WriteResult]]:
        """Write the plan's items; torch.distributed.checkpoint calls this on every rank."""
        results = []
        with open(Path(self.path) / _FILE_NAME, "xb", buffering=0) as file:
            for item in plan.items:
                start = file.tell()
                if item.type == WriteItemType.BYTE_IO:
                    # Not getbuffer: Python 3.12.0 and 3.12.1 crash when a view of a buffer is in
                    # the traceback of an error (https://github.com/python/cpython/issues/111049).
                    write(planner.resolve_data(item).getvalue(), file)
                else:
                    self._write_tensor(item, file)
                length = file.tell() - start
                results.append(
                    WriteResult(item.index, length, _StorageInfo(_FILE_NAME, start, length))
                )
            sync_file(file)
        answer: Future[list[WriteResult]] = Future()
        answer.set_result(results)
        return answer

    def _write_tensor(self, item: WriteItem, file: BinaryIO) -> None:
        key = item.index.fqn.removeprefix(_PREFIX)
        header = self._tensors.headers[key]
        found = whole_ranges(self._tensors, key)
        # Read before ``skip_data``, which would skip the numbers of a tensor of a checkpoint too.
        tensor = self._tensors[key] if found is None else None

        def fill(target: BinaryIO) -> None:
            if found is None:
                write_tensor(tensor, target)
            else:
                copy(found, target)

        with skip_data():
            torch.save(torch.empty(header.shape, dtype=header.dtype), _Frame(file, fill))
        self._done(header.nbytes)


def write_shards(tensors: Tensors, folder: Path, done: Done = ignore) -> None:
    """Write a distributed checkpoint that ``megatron.core.dist_checkpointing.load`` reads at any
    layout.

    At most one tensor is in memory.

    Raises:
        OSError: the disk is full, or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    planned: dict[str, Any] = {
        f"{_PREFIX}{module}{_EXTRA_STATE}": [None] for module in _stateful_modules(tensors.headers)
    }
    for key, header in tensors.headers.items():
        planned[_PREFIX + key] = torch.empty(header.shape, dtype=header.dtype, device="meta")
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = _Writer(folder, tensors, done)
    with _alone():
        try:
            torch_checkpoint.save(planned, storage_writer=writer, planner=planner, no_dist=True)
        except torch_checkpoint.api.CheckpointException as error:
            raise _cause(error) from error
    common = io.BytesIO()
    torch.save({}, common)
    (folder / _COMMON_NAME).write_bytes(common.getvalue())
    (folder / _METADATA_NAME).write_text(json.dumps(_FORMAT), encoding="utf-8")


def _cause(error: torch_checkpoint.api.CheckpointException) -> BaseException:
    """Return what went wrong with writing: below ``torch.save``, which calls a file that it cannot
    finish an error of its own.
    """
    [(found, _)] = error.failures.values()
    cause: BaseException | None = found
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or found


def _stateful_modules(keys: Iterable[str]) -> set[str]:
    """Modules that may want more than tensors back: linear layers, those of experts excepted, and,
    with Transformer Engine, attention.
    """
    linear = {
        key.rpartition(".")[0] for key in keys if ".linear_" in key and ".mlp.experts." not in key
    }
    return linear | {
        name.replace(".linear_qkv", ".core_attention")
        for name in linear
        if name.endswith(".linear_qkv")
    }
