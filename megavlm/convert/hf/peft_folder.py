"""Folders of LoRA adapters as PEFT (https://github.com/huggingface/peft) writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megavlm.config.lora import LINEARS, Lora
from megavlm.config.schema import Architecture
from megavlm.convert.hf.hub_formats import HUB_FORMATS
from megavlm.convert.hf.json_files import (
    missing,
    needed_sizes,
    no_positive_numbers,
    read_json,
)
from megavlm.convert.weights.adapters import factor_keys, magnitude_key, moves_rows
from megavlm.convert.weights.mapping import Row
from megavlm.convert.weights.tables import Dialect, rows, unused_rows
from megavlm.convert.weights.views import Overlaid, Tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
NORMS = "lora_magnitude_vector"
"""End of the names of DoRA's norms."""
_MUST_BE: dict[str, Sequence[Any]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False, None),
    # Other kinds change the weights of the base too, or adapt some tokens only.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": (None,),
    "kasa_config": (None,),
    # Layers that are repeated, or adapters that are computed otherwise or weighed by a router.
    "layer_replication": (None, []),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
}
_ADAPTER = re.compile(rf"\.(lora_[AB]\.weight|{NORMS})$")
_LAYER = re.compile(r"\.layers\.\d+\.")


class WithAdapters(Overlaid):
    """A model and the adapters of a PEFT folder, as tensors of a checkpoint.

    Queries, keys and values have one adapter here, with an A each. If PEFT's adapters leave out one
    of them, its factors are zero, and so are their gradients: it stays as it is.

    Args:
        model: the weights of the model that the adapters are of.
        architecture: of that model.
        folder: the PEFT folder.
        dialect: that the model is written in; adapters are named as in ``native`` for ``chat``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the adapters are of another kind, or not of this model.
    """

    def __init__(self, model: Tensors, architecture: Architecture, folder: Path, dialect: Dialect):
        settings = _read_settings(folder)
        dialect = "native" if dialect == "chat" else dialect
        self._left = _read_weights(folder, architecture, dialect)
        rank = settings["r"]
        alpha = float(settings["lora_alpha"])
        if settings.get("use_rslora"):
            alpha *= rank**0.5
        table = rows(architecture, dialect)
        own: dict[str, Tensor] = {}
        adapted = []
        every = Lora(rank=rank, targets=("vision", "language"))
        for row in table:
            if every.adapts(row.key) and (factors := self._take_factors(row, rank)):
                own |= factors | (self._take_norms(row) if settings.get("use_dora") else {})
                adapted.append(row.key)
            else:
                own |= self._take_whole(row)
        if self._left:
            listed = ", ".join(sorted(self._left)[:3])
            raise ValueError(
                f"{folder / WEIGHTS}: {len(self._left)} tensors are no adapters of linear layers of"
                f" this model, such as {listed}"
            )
        if not adapted:
            raise ValueError(f"{folder / WEIGHTS}: holds no adapters of this model")
        has_norms = bool(settings.get("use_dora"))
        lora = Lora(rank=rank, alpha=alpha, targets=_patterns(adapted, table), dora=has_norms)
        self.architecture = replace(architecture, lora=lora)
        super().__init__(model, own)

    def _take_factors(self, row: Row, rank: int) -> dict[str, Tensor]:
        """Take the adapters of a weight; none if it has none."""
        parts_a = []
        parts_b = []
        inputs = row.shape[1]
        some = None
        for name, (outputs, *_) in zip(row.names, row.part_shapes, strict=True):
            stem = name.removesuffix("weight")
            a = self._left.pop(f"{stem}lora_A.weight", None)
            b = self._left.pop(f"{stem}lora_B.weight", None)
            if (a is None) != (b is None):
                there, lost = "BA" if a is None else "AB"
                raise ValueError(
                    f"{stem}lora_{there}.weight is there, and {stem}lora_{lost}.weight is missing;"
                    " restore the adapters"
                )
            some = a if some is None else some
            for found, shape, factor in ((a, (rank, inputs), "A"), (b, (outputs, rank), "B")):
                if found is not None and tuple(found.shape) != shape:
                    raise ValueError(
                        f"{stem}lora_{factor}: has shape {list(found.shape)}, must be {list(shape)}"
                    )
            parts_a.append(torch.zeros(rank, inputs) if a is None else a)
            parts_b.append(torch.zeros(outputs, rank) if b is None else b)
        if some is None:
            return {}
        key_a, key_b = factor_keys(row)
        joined = row.operation.join(parts_b) if moves_rows(row) else parts_b[0]
        return {
            key_a: torch.cat(parts_a).to(some.dtype),
            key_b: joined.to(some.dtype).contiguous(),
        }

    def _take_norms(self, row: Row) -> dict[str, Tensor]:
        """Take the norms of DoRA, of all of a weight."""
        parts = []
        for name, (outputs, *_) in zip(row.names, row.part_shapes, strict=True):
            stem = name.removesuffix("weight")
            norms = self._left.pop(stem + NORMS, None)
            if norms is None or tuple(norms.shape) != (outputs,):
                found = "is missing" if norms is None else f"has shape {list(norms.shape)}"
                raise ValueError(
                    f"{stem}{NORMS}: {found}, must be [{outputs}]; queries, keys and values, and"
                    " gate and up, have DoRA together here: adapt all of them, or merge the"
                    " adapters with PEFT and import the model"
                )
            parts.append(norms)
        joined = row.operation.join(parts) if moves_rows(row) else parts[0]
        return {magnitude_key(row): joined.contiguous()}

    def _take_whole(self, row: Row) -> dict[str, Tensor]:
        """Take a weight that was trained in full (PEFT's ``modules_to_save``)."""
        if not all(name in self._left for name in row.names):
            return {}
        return {row.key: row.join([self._left.pop(name) for name in row.names])}


def _read_settings(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``, and refuse what would be computed otherwise here."""
    settings = read_json(folder / CONFIG)
    for name, allowed in _MUST_BE.items():
        if name in settings and settings[name] not in allowed:
            raise ValueError(
                f"{folder / CONFIG}: {name} is {settings[name]!r}; only {allowed[0]!r} is supported"
            )
    wrong = [
        *needed_sizes("", settings, "r"),
        *missing("", settings, "lora_alpha"),
        *no_positive_numbers("", settings, "lora_alpha"),
    ]
    if wrong:
        raise ValueError(f"{folder / CONFIG}: {'; '.join(wrong)}")
    return settings


def _read_weights(folder: Path, architecture: Architecture, dialect: Dialect) -> dict[str, Tensor]:
    """Read the weights of a PEFT folder, by names as in the model's files. Adapters of layers that
    the model does not compute, such as the last of LLaVA's CLIP, have no effect and are left out.
    """
    name_on_disk = HUB_FORMATS[dialect].name_on_disk
    unused = {name for row in unused_rows(architecture, dialect) for name in row.names}
    found = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        on_disk = name_on_disk(name.removeprefix(PREFIX))
        if on_disk is not None and _ADAPTER.sub(".weight", on_disk) not in unused:
            found[on_disk] = tensor
    return found


def _patterns(adapted: Sequence[str], table: Sequence[Row]) -> tuple[str, ...]:
    """Return the shortest patterns that mean these weights of a table and no others."""
    every = {row.key for row in table if row.key.endswith(".weight")}
    found: list[str] = []
    for part in ("vision.encoder", "language.decoder"):
        for name in LINEARS:
            end = f".{name}.weight"
            all_layers = {key for key in every if key.startswith(part) and key.endswith(end)}
            here = [key for key in adapted if key in all_layers]
            if here and len(here) == len(all_layers):
                found.append(_LAYER.sub(".layers.*.", here[0]).removesuffix(".weight"))
            else:
                found += [key.removesuffix(".weight") for key in here]
    return tuple(found)
