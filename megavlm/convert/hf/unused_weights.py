"""Weights of a pretrained vision encoder that no model here uses, and that files of
``LlavaForConditionalGeneration`` hold all the same: the layers behind the features, the norm behind
the last layer, and the head of a SigLIP.

A checkpoint has them in a file of their own, under their names in the encoder. A run copies them
from what it starts from into each of its checkpoints, and an export writes them unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megavlm.config.schema import Architecture, Vision
from megavlm.convert.hf.hub_formats import HUB_FORMATS
from megavlm.convert.hf.safetensors_files import SafetensorsFolder, write_in_memory
from megavlm.convert.weights.families import clip
from megavlm.convert.weights.tables import Dialect, unused_rows
from megavlm.convert.weights.views import HuggingFaceView, Overlaid

FILE_NAME = "unused_weights.safetensors"
Weights = Mapping[str, Tensor]
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


def of_model(folder: Path, architecture: Architecture, dialect: Dialect) -> dict[str, Tensor]:
    """Read them from the folder of a whole model."""
    table = unused_rows(architecture, dialect)
    if not table:
        return {}
    source = SafetensorsFolder(folder, rename=HUB_FORMATS[dialect].name_on_disk)
    names = [name for row in table for name in row.names]
    start = len(names[0]) - len(clip.unused_rows(architecture.vision)[0].names[0])
    return {name[start:]: source[name].clone() for name in names}


def of_export(folder: Path, architecture: Architecture, dialect: Dialect) -> dict[str, Tensor]:
    """Read them for an export from the folder that ``--vision`` names.

    Raises:
        ValueError: files of the dialect hold none of them, or as ``of_encoder``.
    """
    if not unused_rows(architecture, dialect):
        raise ValueError(
            f"--vision {folder}: has no effect, since files of --dialect {dialect} hold no weights"
            " that training does not use; leave it out"
        )
    return of_encoder(folder, architecture.vision)


def of_encoder(folder: Path, vision: Vision) -> dict[str, Tensor]:
    """Read them from the folder of a CLIP or SigLIP, with or without its text half.

    Raises:
        ValueError: the folder has more layers than the encoder, or fewer, or lacks its head.
    """
    source = _open_encoder(folder)
    check_encoder(folder, vision)
    names = [name for row in clip.unused_rows(vision) for name in row.names]
    return {name: source[name].clone() for name in names}


def check_encoder(folder: Path, vision: Vision) -> None:
    """Raise ValueError if the folder of a CLIP or SigLIP has more layers than the encoder, or
    fewer, or lacks its head.
    """
    names = _open_encoder(folder).headers
    found = {int(layer[1]) for name in names if (layer := _LAYER.match(name))}
    if len(found) != vision.num_layers + vision.unused_layers:
        raise ValueError(
            f"--architecture.vision.num_layers {vision.num_layers},"
            f" --architecture.vision.unused_layers {vision.unused_layers}: {folder} has"
            f" {len(found)} layers; exports hold all of them, so the two must add up to that"
        )
    if vision.unused_head and not any(map(_is_of_head, names)):
        raise ValueError(
            f"--architecture.vision.unused_head true: {folder} has no weights of a head (head.*);"
            " use false, and exports have none"
        )


def _is_of_head(name: str) -> bool:
    return name.startswith("head.")


def _open_encoder(folder: Path) -> SafetensorsFolder:
    return SafetensorsFolder(folder, rename=lambda name: name.removeprefix("vision_model."))


def write(weights: Weights, folder: Path) -> None:
    """Write them into a checkpoint, if there are any.

    Raises:
        OSError: the disk is full.
    """
    if not weights:
        return
    write_in_memory(weights, folder / FILE_NAME)


def read(folder: Path) -> dict[str, Tensor]:
    """Read them from a checkpoint; empty if it has none."""
    return load_file(folder / FILE_NAME) if (folder / FILE_NAME).is_file() else {}


class WithUnused(Overlaid):
    """A model's tensors as Hugging Face's files have them, and the unused ones beside them.

    Args:
        view: the model's tensors.
        architecture: the model.
        dialect: that names the tensors.
        weights: the unused tensors. A model that was never part of a pretrained encoder has none;
            its files get a norm that changes nothing.
        dtype: of the tensors; None: as they are.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """

    def __init__(
        self,
        view: HuggingFaceView,
        architecture: Architecture,
        dialect: Dialect,
        weights: Weights,
        dtype: torch.dtype | None = None,
    ):
        table = unused_rows(architecture, dialect)
        plain = clip.unused_rows(architecture.vision) if table else []
        vision = architecture.vision
        if not vision.unused_head:
            weights = {name: one for name, one in weights.items() if not _is_of_head(name)}
        if table and not weights and not (vision.unused_layers or vision.unused_head):
            first = next(iter(view.headers.values())).dtype
            weights = {
                row.key: (torch.zeros if row.key.endswith("bias") else torch.ones)(
                    row.shape, dtype=first
                )
                for row in plain
            }
        shapes = {row.key: row.shape for row in plain}
        if table and {name: tuple(found.shape) for name, found in weights.items()} != shapes:
            head = " and head" if vision.unused_head else ""
            raise ValueError(
                f"{view}: the checkpoint has no {FILE_NAME} with the {vision.unused_layers} layers"
                f" that --architecture.vision.unused_layers names and the norm{head} behind them;"
                " name the folder of the vision encoder that it started from with --vision"
            )
        unused = {
            name: weights[row.key].to(dtype or weights[row.key].dtype)
            for row, whole in zip(plain, table, strict=True)
            for name in whole.names
        }
        super().__init__(view, unused)
