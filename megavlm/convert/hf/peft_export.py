"""LoRA adapters of a checkpoint as a folder that PEFT loads on the exported base."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavlm.checkpoint import step_folder
from megavlm.checkpoint.step_folder import SHARDS
from megavlm.config.hub_cache import find_folder
from megavlm.config.lora import Lora
from megavlm.convert.dist_checkpoint import ShardsFolder
from megavlm.convert.hf.convert import open_weights, refuse_other
from megavlm.convert.hf.hub_formats import HubFormat, dialect_of, hub_format_of
from megavlm.convert.hf.json_files import class_of_transformers
from megavlm.convert.hf.peft_folder import CONFIG, NORMS, PREFIX, WEIGHTS
from megavlm.convert.hf.safetensors_files import write_in_memory
from megavlm.convert.weights.adapters import adapted_rows, factors
from megavlm.convert.weights.mapping import Row
from megavlm.convert.weights.tables import rows
from megavlm.convert.weights.views import Tensors
from megavlm.io.atomic import new_folder
from megavlm.model.nf4 import rounded

_ADDED = re.compile(r"connector\.|objective\.|language\.added_|language\.decoder\..*\.cross\.")
"""Keys of what a recipe adds to its pretrained parts, and trains in full beside adapters."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""Modules that PEFT cannot save in full, but for what is in them."""


def export(
    checkpoint: str | Path, out: str | Path, *, base: str | Path, averages: bool = False
) -> Path:
    """Write the adapters of a checkpoint, and those modules beside the pretrained parts, such as
    the connector, that are not the base's.

    Args:
        checkpoint: folder of a step, or a run's save folder.
        out: folder to make; missing or empty.
        base: Hugging Face folder, of a class of transformers, of the model that they were trained
            on, or its hub id, which the adapters then name.
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
    form = hub_format_of(model)
    if not form.is_in_transformers:
        raise ValueError(
            f"--peft {base}: PEFT loads adapters on classes of transformers, and this is of"
            f" {form.class_name}; name the same model in another format (export's --dialect, such"
            " as native), or leave --peft out to merge them"
        )
    refuse_other(model, architecture)
    dialect = dialect_of(model)
    adapted = list(adapted_rows(architecture, dialect))
    if any(".experts." in row.key for row in adapted):
        raise ValueError(
            f"--peft {base}: adapters of experts have no form that PEFT loads: transformers 5 holds"
            " all experts of a layer in one parameter, with one A for gate and up; leave --peft out"
            " to merge them"
        )
    source = ShardsFolder(found.folder / SHARDS, averages=averages)
    skeleton = _skeleton(model, form)
    in_memory = _names_in_memory(skeleton, form)
    tensors = _adapters(adapted, source, in_memory)
    targets = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})

    table = rows(architecture, dialect)
    added = {in_memory[name] for row in table if _ADDED.match(row.key) for name in row.names}
    changed = _changed(table, source, open_weights(model), architecture.lora)
    modules = _modules_of([in_memory[name] for name in changed], added, skeleton, base)
    for row in table:
        if any(_module_of(in_memory[name], modules) for name in row.names):
            parts = row.split(source[row.key]).items()
            tensors |= {PREFIX + in_memory[name]: part for name, part in parts}
    with new_folder(Path(out), "--out") as growing:
        write_in_memory(tensors, growing / WEIGHTS, {"format": "pt"})
        settings = _settings(architecture.lora, targets, str(base), modules)
        (growing / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return Path(out)


def _skeleton(folder: Path, form: HubFormat) -> nn.Module:
    """Return the model of a Hugging Face folder in its class, without weights."""
    model_class = class_of_transformers(form.class_name)
    with torch.device("meta"):
        return model_class(model_class.config_class.from_pretrained(folder))


def _names_in_memory(skeleton: nn.Module, form: HubFormat) -> dict[str, str]:
    """Return what a class of transformers calls each weight, by its name in files. PEFT goes by
    what it is called in memory, and versions of transformers differ in that.
    """
    names = ((form.name_on_disk(name), name) for name in skeleton.state_dict())
    return {on_disk: name for on_disk, name in names if on_disk is not None}


def _adapters(
    adapted: Collection[Row], source: ShardsFolder, in_memory: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the adapters of some weights, as PEFT names them."""
    tensors: dict[str, Tensor] = {}
    for row in adapted:
        for name, (a, b, magnitude) in factors(source, row).items():
            stem = PREFIX + in_memory[name].removesuffix("weight")
            tensors[f"{stem}lora_A.weight"] = a
            tensors[f"{stem}lora_B.weight"] = b
            if magnitude is not None:
                tensors[f"{stem}{NORMS}"] = magnitude
    return tensors


def _changed(
    table: Collection[Row], source: ShardsFolder, base: Tensors, lora: Lora
) -> Iterator[str]:
    """Yield the names in files of the weights of a checkpoint that are not the base's."""
    for row in table:
        for name, ours in row.split(source[row.key]).items():
            theirs = base[name].to(ours.dtype) if name in base.headers else None
            if theirs is not None and lora.quantises(row.key):
                theirs = rounded(theirs)
            if theirs is None or not torch.equal(theirs, ours):
                yield name


def _modules_of(
    changed: Sequence[str], added: Collection[str], skeleton: nn.Module, base: str | Path
) -> list[str]:
    """Return the modules that PEFT has to save in full for some weights, all by their names in
    memory.

    Args:
        changed: weights that are not the base's.
        added: weights beside the pretrained parts, which alone may be saved in full.
        skeleton: the model.
        base: names the base in errors.

    Raises:
        ValueError: a weight of a pretrained part has changed, or one that belongs to no module
            beside them.
    """
    if others := [name for name in changed if name not in added]:
        raise ValueError(
            f"--peft {base}: {len(others)} weights beside the adapters and the connector are not"
            f" those of the checkpoint, such as {others[0]}; name the model that the adapters were"
            " trained on, or leave --peft out to merge them"
        )
    in_model = Counter(module for name in skeleton.state_dict() for module in _around(name))
    in_added = Counter(module for name in added for module in _around(name))
    modules = {
        name
        for name, module in skeleton.named_modules()
        if in_model[name] == in_added[name] > 0 and not isinstance(module, _CONTAINERS)
    }
    outermost = {name: _module_of(name, modules) for name in changed}
    if alone := [name for name, module in outermost.items() if module is None]:
        raise ValueError(
            f"--peft {base}: {alone[0]} was trained, which is a parameter of no module that PEFT"
            " could save in full; leave --peft out to merge the adapters"
        )
    return sorted({module for module in outermost.values() if module is not None})


def _around(name: str) -> Iterator[str]:
    """Yield the modules that hold a weight, the outermost first."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _module_of(name: str, modules: Collection[str]) -> str | None:
    """Return the outermost of some modules that holds a weight, if any does."""
    return next((module for module in _around(name) if module in modules), None)


def _settings(
    lora: Lora, targets: Sequence[str], base: str, modules: Sequence[str]
) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``.

    Args:
        lora: the settings of the adapters.
        targets: names of the linear layers, as PEFT matches them.
        base: the model that they are of.
        modules: names of the modules that are in the folder in full.
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
        "modules_to_save": modules or None,
        "use_rslora": False,
        "use_dora": lora.dora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
