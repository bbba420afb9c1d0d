"""LoRA adapters of a checkpoint as a folder that PEFT loads on the exported base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megavlm.checkpoint import step_folder
from megavlm.checkpoint.step_folder import SHARDS
from megavlm.config.hub_cache import find_folder
from megavlm.config.lora import Lora
from megavlm.convert.dist_checkpoint import ShardsFolder
from megavlm.convert.hf.convert import open_weights, refuse_other
from megavlm.convert.hf.hub_formats import dialect_of, hub_format_of
from megavlm.convert.hf.peft_folder import CONFIG, NORMS, PREFIX, WEIGHTS
from megavlm.convert.weights.adapters import adapted_rows, factors
from megavlm.convert.weights.tables import name_in_memory, rows
from megavlm.io.atomic import new_folder
from megavlm.model.nf4 import rounded

_CONNECTOR = "multi_modal_projector"


def export(
    checkpoint: str | Path, out: str | Path, *, base: str | Path, averages: bool = False
) -> Path:
    """Write the adapters of a checkpoint, and its connector if that is not the base's.

    Args:
        checkpoint: folder of a step, or a run's save folder.
        out: folder to make; missing or empty.
        base: Hugging Face folder, in the native dialect, of the model that they were trained on,
            or its hub id, which the adapters then name.
        averages: write the moving averages of what was trained.

    Raises:
        FileNotFoundError: the checkpoint or the base is missing.
        ValueError: the checkpoint has no adapters, or some of experts, or other weights than the
            base.
    """
    found = step_folder.find_given(checkpoint)
    architecture = found.config.architecture
    if not architecture.lora.rank:
        raise ValueError(f"--load {checkpoint}: has no LoRA adapters; leave --peft out")
    model = find_folder(str(base), "--peft")
    if dialect_of(model) != "native":
        raise ValueError(
            f"--peft {base}: adapters are written for an InternVLForConditionalGeneration only"
            f" (made by --dialect native), and this is of {hub_format_of(model).class_name}; leave"
            " --peft out to merge them"
        )
    if any(".experts." in row.key for row in adapted_rows(architecture)):
        raise ValueError(
            f"--peft {base}: adapters of experts have no form that PEFT loads: transformers 5 holds"
            " all experts of a layer in one parameter, with one A for gate and up; leave --peft out"
            " to merge them"
        )
    refuse_other(model, architecture)
    source = ShardsFolder(found.folder / SHARDS, averages=averages)
    tensors: dict[str, Tensor] = {}
    for row in adapted_rows(architecture):
        for name, (a, b, magnitude) in factors(source, row).items():
            stem = PREFIX + name_in_memory(name.removesuffix("weight"))
            tensors[f"{stem}lora_A.weight"] = a.contiguous()
            tensors[f"{stem}lora_B.weight"] = b.contiguous()
            if magnitude is not None:
                tensors[f"{stem}{NORMS}"] = magnitude.contiguous()
    targets = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    connector = _trained_connector(source, found.config.architecture, model)
    with new_folder(Path(out), "--out") as growing:
        save_file(tensors | connector, growing / WEIGHTS, metadata={"format": "pt"})
        settings = _settings(architecture.lora, targets, str(base), is_whole=bool(connector))
        (growing / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return Path(out)


def _trained_connector(source: ShardsFolder, architecture: Any, base: Path) -> dict[str, Tensor]:
    """Return the connector if it is not the base's, under PEFT's names; everything else must be."""
    there = open_weights(base)
    changed: list[str] = []
    connector: dict[str, Tensor] = {}
    for row in rows(architecture):
        in_4_bits = architecture.lora.quantises(row.key)

        def as_trained(theirs: Tensor, ours: Tensor, in_4_bits: bool = in_4_bits) -> Tensor:
            return rounded(theirs.to(ours.dtype)) if in_4_bits else theirs.to(ours.dtype)

        for name, ours in row.split(source[row.key]).items():
            is_same = name in there.headers and torch.equal(as_trained(there[name], ours), ours)
            if row.key.startswith("connector."):
                connector[PREFIX + name_in_memory(name)] = ours.contiguous()
            if not is_same:
                changed.append(name)
    others = [name for name in changed if not name.startswith(_CONNECTOR)]
    if others:
        raise ValueError(
            f"--peft {base}: {len(others)} weights beside the adapters and the connector are not"
            f" those of the checkpoint, such as {others[0]}; name the model that the adapters were"
            " trained on, or leave --peft out to merge them"
        )
    return connector if changed else {}


def _settings(lora: Lora, targets: list[str], base: str, *, is_whole: bool) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``.

    Args:
        lora: the settings of the adapters.
        targets: names of the linear layers, as PEFT matches them.
        base: the model that they are of.
        is_whole: whether the connector is in the folder too.
    """
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": targets,
        "modules_to_save": [_CONNECTOR] if is_whole else None,
        "use_rslora": False,
        "use_dora": lora.dora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
