"""What the model in a Hugging Face folder is made of, and in what it differs from another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megavlm.config.differences import differing
from megavlm.config.schema import Architecture
from megavlm.convert.hf.hub_formats import hub_format_of
from megavlm.convert.hf.json_files import FILE_NAME, read_config
from megavlm.convert.hf.safetensors_files import tensor_names
from megavlm.convert.weights.tables import head_names, name_on_disk


def architecture_from_hf(folder: str | Path) -> Architecture:
    """Read the architecture of a Hugging Face folder, from config.json, the settings of its image
    processor and the names of the weights alone.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it is of a model that ours is not, every difference is named; or its image
            processor makes other images than training does.
    """
    folder = Path(folder)
    path = folder / FILE_NAME
    raw = read_config(path)
    quantised = raw.get("quantization_config") or {}
    # Of MXFP4 a file of weights says by itself which are in it.
    if quantised and quantised.get("quant_method") != "mxfp4":
        raise ValueError(
            f"{path}: has a quantization_config; quantised weights cannot be trained, name the"
            " folder of the original model"
        )
    row = hub_format_of(folder)
    names = tensor_names(folder)
    # What the weights say about the head is more reliable than config.json, where transformers ties
    # by default.
    has_head = None if names is None else not head_names().isdisjoint(map(name_on_disk, names))
    found = row.read_architecture(raw, folder, has_head=has_head)
    row.read_usage(folder)  # refuses what its image processor does otherwise than training
    return found


# Facts that weights of one model may be used with differently: positions are resized to the tile,
# the factor is only where training starts, unused layers and heads are not built, a family is how
# files name weights, rotary positions are stretched for longer samples only, some classes cap no
# logits, and how long instructions are stands in no file. A tied head may be untied, too.
_FREE = {
    "architecture.vision.image_size",
    "architecture.vision.layer_scale",
    "architecture.vision.unused_layers",
    "architecture.vision.unused_head",
    "architecture.language.max_position_embeddings",
    "architecture.language.family",
    "architecture.language.rotary_dynamic_factor",
    "architecture.language.final_softcap",
    "architecture.cross_attention.gate_start",
    "architecture.connector.qformer.instruction_tokens",
    "architecture.vision.patch_drop",
    "architecture.contrastive.positives",
    "architecture.contrastive.exchange",
    "architecture.contrastive.max_scale",
}
_LISTED = {"architecture.language.family", "architecture.language.tied_head"}


def differences(found: Architecture, wanted: Architecture) -> list[str]:
    """Describe the facts in which ``found`` contradicts ``wanted``, such as
    ``--architecture.vision.num_layers: 24 there, 45 asked for``.

    If there are any, the family and the tied head are listed too where they differ: who copies the
    list to the command line gets the model of the folder, not one of its shape that trains an
    untied head.
    """
    found = dataclasses.replace(found, preference=wanted.preference)
    if wanted.needs.trains_model_of(found.needs):
        # A folder does not say which of several objectives of the same parts trained it.
        found = dataclasses.replace(found, objective=wanted.objective)
    all_facts = list(differing(_explicit(found), _explicit(wanted), "architecture"))
    if not wanted.needs.has_vocabulary_head:
        all_facts = [fact for fact in all_facts if fact[0] != "architecture.image_tokens"]
    if all(_may_differ(name, old) for name, old, _ in all_facts):
        return []
    return [
        f"--{name}: {old} there, {new} asked for"
        for name, old, new in all_facts
        if name in _LISTED or not _may_differ(name, old)
    ]


def _explicit(architecture: Architecture) -> Architecture:
    """Return an architecture that names the width of its heads."""
    language = architecture.language
    return dataclasses.replace(
        architecture, language=dataclasses.replace(language, kv_channels=language.head_size)
    )


def _may_differ(name: str, value: Any) -> bool:
    """Return whether a model may start from weights for which a fact has another value."""
    return (
        name in _FREE
        or name.startswith("architecture.lora.")
        or (name.startswith("architecture.image_text.") and name != "architecture.image_text.size")
        or (name == "architecture.language.tied_head" and value)
    )
