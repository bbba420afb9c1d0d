"""Folders of models whose parts are folders of their own: a vision encoder and a language model
that other programs load by themselves, and beside them the weights of neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from megavlm.convert.hf.safetensors_files import SafetensorsFolder, write_safetensors
from megavlm.convert.weights.byte_ranges import Range
from megavlm.convert.weights.views import Header, Tensors, View
from megavlm.io.progress import Done, ignore

Folders = Mapping[str, str]
"""Folders of parts by what the names of their weights begin with in the whole model; in its own
folder a part's names are without that.
"""


class JoinedTensors:
    """The tensors of several folders as one; their names differ.

    Args:
        parts: the folders' tensors.
        where: the whole model's folder.
    """

    def __init__(self, parts: Sequence[Tensors], where: Path):
        self._where = where
        self._owner = {name: part for part in parts for name in part.headers}
        self.headers = {name: part.headers[name] for name, part in self._owner.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._owner[name][name]

    def ranges(self, name: str, rows: range) -> list[Range] | None:
        """See ``Tensors``."""
        return self._owner[name].ranges(name, rows)

    def __str__(self) -> str:
        return str(self._where)


class PartOfTensors(View):
    """Those of some tensors whose names begin alike, under the rest of their names.

    Args:
        source: the tensors.
        start: what their names begin with.
        without: what other parts' names begin with.
    """

    def __init__(self, source: Tensors, start: str, without: Sequence[str] = ()):
        super().__init__(source)
        self._start = start
        self.headers: dict[str, Header] = {
            name.removeprefix(start): header
            for name, header in source.headers.items()
            if name.startswith(start) and not name.startswith(tuple(without))
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._source[self._start + name]

    def ranges(self, name: str, rows: range) -> list[Range] | None:
        """See ``Tensors``."""
        return self._source.ranges(self._start + name, rows)


def open_parts(folder: Path, folders: Folders) -> Tensors:
    """Open the weights of a folder and of the folders of its parts; errors as of
    ``SafetensorsFolder``.
    """
    parts = [SafetensorsFolder(folder)]
    for start, name in folders.items():
        parts.append(SafetensorsFolder(folder / name, rename=start.__add__))
    return JoinedTensors(parts, folder)


def write_parts(
    tensors: Tensors, folder: Path, folders: Folders, shard_bytes: int, done: Done = ignore
) -> None:
    """Write weights into the folders of their parts, which exist, and all others into ``folder``;
    other arguments as of ``write_safetensors``.
    """
    for start, name in folders.items():
        write_safetensors(PartOfTensors(tensors, start), folder / name, shard_bytes, done)
    rest = PartOfTensors(tensors, "", without=tuple(folders))
    write_safetensors(rest, folder, shard_bytes, done)
