"""Datasets of Megatron-Energon: which archives they list, and what the files of a record mean."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from megavlm.data.records.media_fields import IMAGE_ENDINGS
from megavlm.data.records.record import decode_text, parse_json
from megavlm.data.records.reject import RejectError
from megavlm.io.remote import exists, is_remote

KINDS = ("CaptioningSample", "VQASample", "TextSample")
# Subclasses of Energon's Webdataset that name their samples by their own name.
OWN_KINDS = {
    "CaptioningWebdataset": "CaptioningSample",
    "VQAWebdataset": "VQASample",
    "TextWebdataset": "TextSample",
}
OPEN_DATASETS = 64


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A folder with ``.nv-meta``.

    Args:
        folder: of the dataset.
        shards: archives of the training split, without the excluded ones.
        kind: class of its samples in Energon.
        fields: for each field of the class, the ending of a file, with a path inside it if the
            file is JSON (``json[text]``); empty: WebDataset's usual meaning.
        excluded: patterns of samples that are left out, ``shard_0.tar/0001``.
        counts: records of each archive, as Energon counted them.
    """

    folder: Path
    shards: tuple[str, ...]
    kind: str
    fields: Mapping[str, str]
    excluded: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def excludes(self, path: str, key: str) -> bool:
        """Return whether a record of an archive is left out."""
        name = f"{self._name(path)}/{key}"
        return any(fnmatchcase(name, pattern) for pattern in self.excluded)

    def shard_count(self, path: str) -> int | None:
        """Return how many records Energon counted in an archive, if it did."""
        return self.counts.get(self._name(path))

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.folder)


def describe_archive(path: str) -> Dataset | None:
    """Return the dataset that an archive lies in, or None."""
    if is_remote(path):
        meta = f"{path.rpartition('/')[0]}/.nv-meta"
        if exists(f"{meta}/dataset.yaml"):
            raise ValueError(
                f"{path}: part of an Energon dataset, whose {meta} is read from a local folder"
                " alone; copy the dataset"
            )
        return None
    for folder in Path(path).absolute().parents:
        if (folder / ".nv-meta").is_dir():
            return read_dataset(str(folder))
    return None


@lru_cache(maxsize=OPEN_DATASETS)
def read_dataset(folder: str) -> Dataset:
    """Read the description of an Energon dataset.

    Raises:
        ValueError: its ``.nv-meta`` cannot be read, lists no shard for training, or describes
            samples of a kind that is not supported.
    """
    meta = Path(folder) / ".nv-meta"
    split = _read_yaml(meta / "split.yaml")
    kind = _read_yaml(meta / "dataset.yaml")
    parts = split.get("split_parts")
    names = parts.get("train") if isinstance(parts, dict) else None
    if not isinstance(names, list):
        raise ValueError(f"{meta}: split.yaml needs split_parts with a list named train")
    excluded = tuple(
        name for pattern in split.get("exclude") or () for name in expand_braces(str(pattern))
    )
    shards = tuple(
        os.path.join(folder, shard)
        for pattern in names
        for shard in _shards(Path(folder), str(pattern))
        if not any(fnmatchcase(shard, pattern) for pattern in excluded)
    )
    if not shards:
        raise ValueError(
            f"{meta}: the training split lists no shard, or all are excluded (split.yaml,"
            " split_parts: train)"
        )
    for key in ("sample_loader", "part_filter"):
        if kind.get(key):
            raise ValueError(
                f"{meta}/dataset.yaml: {key} {str(kind[key])!r:.200} is Python code, which is not"
                " run; describe the samples with a field_map, or write them as .jsonl"
            )
    name, fields = _sample_kind(meta, kind)
    return Dataset(
        folder=Path(folder),
        shards=shards,
        kind=name,
        fields=fields,
        excluded=excluded,
        counts=_counts(meta),
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path.parent}: needs split.yaml with split_parts and dataset.yaml with sample_type"
            f" ({type(error).__name__}: {error})"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a mapping, not a {type(content).__name__}")
    return content


def _sample_kind(meta: Path, kind: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Return the class of the samples and their field map."""
    described = kind.get("sample_type") or kind
    name = str(described.get("__class__")) if isinstance(described, dict) else str(described)
    name = OWN_KINDS.get(name, name)
    given = kind.get("field_map") or {}
    if name == "CrudeWebdataset":
        return name, {}
    if name not in KINDS or not isinstance(given, dict) or not given:
        raise ValueError(
            f"{meta}: samples of kind {name} are not supported; those are {', '.join(KINDS)} with a"
            " field_map, and CrudeWebdataset"
        )
    return name, {key: str(value) for key, value in given.items() if not key.startswith("__")}


def _counts(meta: Path) -> dict[str, int]:
    """Read how many records each archive has, from ``.info.json`` or ``.info.yaml``."""
    for path in (meta / ".info.json", meta / ".info.yaml"):
        if path.is_file():
            facts = (
                json.loads(path.read_text(encoding="utf-8"))
                if path.suffix == ".json"
                else _read_yaml(path)
            )
            counts = facts.get("shard_counts") if isinstance(facts, dict) else None
            if isinstance(counts, dict):
                return {str(name): int(count) for name, count in counts.items()}
    return {}


def _shards(folder: Path, pattern: str) -> list[str]:
    """Return the archives that an entry of the split means, relative to the folder."""
    names = []
    for name in expand_braces(pattern):
        if any(sign in name for sign in "*?[") and not (folder / name).exists():
            names += sorted(str(path.relative_to(folder)) for path in folder.glob(name))
        else:
            names.append(name)
    return names


def map_fields(dataset: Dataset, by_ending: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the fields of a record of an Energon dataset.

    Raises:
        RejectError: a file that the map names is missing or cannot be read.
    """
    values = {name: _mapped(path, by_ending) for name, path in dataset.fields.items()}
    image = values.get("image")
    if dataset.kind == "VQASample":
        answers = values.get("answers")
        answer = answers[0] if isinstance(answers, list) and answers else answers
        turns = [
            {"from": "human", "value": _as_text(values.get("context"))},
            {"from": "gpt", "value": _as_text(answer)},
        ]
        return {"image": image, "conversations": turns}
    if dataset.kind == "CaptioningSample":
        return {"image": image, "caption": _as_text(values.get("caption"))}
    return {"text": _as_text(values.get("text"))}


def _mapped(path: str, by_ending: Mapping[str, bytes]) -> Any:
    """Return what stands at a path such as ``json[conversations][0][value]``; of ``png;jpg`` or
    ``png,jpg`` the first that exists.
    """
    for choice in re.split("[;,]", path):
        ending, *steps = re.split(r"[\[\]]+", choice.strip().rstrip("]"))
        if ending not in by_ending:
            continue
        data = by_ending[ending]
        if ending.rpartition(".")[2] in IMAGE_ENDINGS:
            return data
        if ending.rpartition(".")[2] != "json":
            return _as_text(data)
        value: Any = parse_json(b'{"":%s}' % data)[""]
        for step in steps:
            try:
                value = value[int(step)] if isinstance(value, list) else value[step]
            except (KeyError, IndexError, ValueError, TypeError):
                raise RejectError("malformed_json", f"{choice}: there is no {step!r}") from None
        return value
    raise RejectError(
        "missing_part", f"the record has no file {path}; it has {', '.join(sorted(by_ending))}"
    )


def _as_text(value: Any) -> Any:
    """Decode bytes; other values stay."""
    return decode_text(value) if isinstance(value, bytes) else value


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern with ``{000..127}`` or ``{a,b}`` stands for."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        return [pattern]
    first = found[1]
    if first is None:
        choices = found[3].split(",")
    else:
        width = len(first) if first.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(found[2]) + 1)]
    return [
        name
        for choice in choices
        for name in expand_braces(pattern[: found.start()] + choice + pattern[found.end() :])
    ]
