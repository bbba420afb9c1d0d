"""What the model in a Hugging Face folder is made of, and in what it differs from another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megavlm.config.schema import Architecture
from megavlm.convert.hf import chat_config, native_config
from megavlm.convert.hf.json_files import FILE_NAME, read_json
from megavlm.convert.hf.safetensors_files import tensor_names
from megavlm.convert.weights.tables import Dialect, head_names, name_on_disk

_Reader = Callable[..., Architecture]
_READERS: dict[str, tuple[Dialect, _Reader]] = {
    native_config.MODEL_TYPE: ("native", native_config.read),
    chat_config.MODEL_TYPE: ("chat", chat_config.read),
}


def dialect_of(folder: str | Path) -> Dialect:
    """The dialect in which a Hugging Face folder is written.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it is of another kind of model.
    """
    path = Path(folder) / FILE_NAME
    return _reader(path, read_json(path))[0]


def _reader(path: Path, raw: dict[str, Any]) -> tuple[Dialect, _Reader]:
    kind = raw.get("model_type")
    if kind not in _READERS:
        raise ValueError(
            f"{path}: model_type is {kind!r}, must be {' or '.join(map(repr, _READERS))}"
        )
    return _READERS[kind]


def architecture_from_hf(folder: str | Path) -> Architecture:
    """What the model in a Hugging Face folder is made of. Only config.json and the names of the
    weights are read.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it is of a model that ours is not; every difference is named.
    """
    folder = Path(folder)
    path = folder / FILE_NAME
    raw = read_json(path)
    _, read = _reader(path, raw)
    names = tensor_names(folder)
    # What the weights say about the head is more reliable than config.json, where transformers ties
    # by default.
    has_head = None if names is None else not head_names().isdisjoint(map(name_on_disk, names))
    return read(raw, folder, has_head=has_head)


# Facts that weights of one model may be used with differently: positions are resized to the tile,
# the factor is only where training starts, a family is how files name weights, and rotary positions
# are stretched for longer samples only. A tied head may be untied, too.
_FREE = {
    "vision.image_size",
    "vision.layer_scale",
    "language.max_position_embeddings",
    "language.family",
    "language.rotary_dynamic_factor",
}


def differences(found: Architecture, wanted: Architecture) -> list[str]:
    """Facts in which ``found`` contradicts ``wanted``, such as ``--architecture.pixel_shuffle: 2
    there, 4 asked for``.
    """

    def flat(architecture: Architecture) -> dict[str, Any]:
        facts: dict[str, Any] = {
            name: vars(architecture)[name] for name in ("pixel_shuffle", "projector_norm")
        }
        for section in ("vision", "language"):
            facts |= {
                f"{section}.{name}": value
                for name, value in dataclasses.asdict(architecture)[section].items()
            }
        return facts | {"language.kv_channels": architecture.language.head_size}

    ours = flat(wanted)
    theirs = flat(found)
    return [
        f"--architecture.{name}: {theirs[name]} there, {ours[name]} asked for"
        for name in ours
        if name not in _FREE
        and ours[name] != theirs[name]
        and not (name == "language.tied_head" and theirs[name])
    ]
