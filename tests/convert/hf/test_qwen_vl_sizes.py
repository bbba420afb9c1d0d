"""The published sizes of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against the classes of transformers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers

from megavlm.config.recipes import qwen2_5_vl, qwen2_vl, qwen3_vl
from megavlm.convert.hf import qwen_vl_config
from megavlm.convert.hf.hub_formats import HUB_FORMATS
from megavlm.convert.weights.tables import rows
from megavlm.convert.weights.transforms import Shape
from megavlm.planner.flops import pieces
from tests.convert.models import ids_with
from tests.convert.qwen_vl_models import MARKS, kind_of

EXPERTS = 128
MODELS = qwen2_vl.MODELS | qwen2_5_vl.MODELS | qwen3_vl.MODELS


def fused(pairs: list[tuple[str, Shape]]) -> list[tuple[str, Shape]]:
    """Return names and shapes of weights with those of the experts of a layer as the class has
    them: in two tensors, outputs first.
    """
    found: dict[str, Shape] = {}
    for name, shape in pairs:
        part = re.fullmatch(r"(.*\.experts)\.\d+\.(?:(gate|up)|down)_proj\.weight", name)
        if part is None:
            found[name] = shape
            continue
        whole = f"{part[1]}.gate_up_proj" if part[2] else f"{part[1]}.down_proj"
        rows_so_far, *_ = found.get(whole, (0,))
        found[whole] = (rows_so_far + shape[0], *shape[1:])
    return [
        (name, (EXPERTS, shape[0] // EXPERTS, shape[1]) if ".experts." in name else shape)
        for name, shape in found.items()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_published_models_are_those_of_transformers(name: str) -> None:
    architecture = MODELS[name]
    kind = kind_of(architecture)
    settings = qwen_vl_config.write(kind, architecture, MARKS, ids_with(7), torch.bfloat16)
    form: Any = getattr(transformers, kind.class_name)
    with torch.device("meta"):
        model = form(form.config_class.from_dict(settings))
    hub_format = HUB_FORMATS[kind.model_type]
    theirs = {
        hub_format.name_on_disk(name): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    if architecture.language.tied_head:
        del theirs["lm_head.weight"]
    table = rows(architecture, kind.model_type)
    pairs = [pair for row in table for pair in zip(row.names, row.part_shapes, strict=True)]
    if architecture.language.num_experts:
        pairs = fused(pairs)
    assert dict(pairs) == theirs and len(pairs) == len(theirs)
    elements = sum(torch.Size(shape).numel() for shape in theirs.values())
    assert elements == sum(piece.elements for piece in pieces(architecture))
    assert (
        f"{elements:,}"
        == {
            "qwen2-vl-2b": "2,208,985,600",
            "qwen2-vl-7b": "8,291,375,616",
            "qwen2-vl-72b": "73,405,560,320",
            "qwen2_5-vl-3b": "3,754,622,976",
            "qwen2_5-vl-7b": "8,292,166,656",
            "qwen2_5-vl-32b": "33,452,718,336",
            "qwen2_5-vl-72b": "73,410,777,344",
            "qwen3-vl-2b": "2,127,532,032",
            "qwen3-vl-4b": "4,437,815,808",
            "qwen3-vl-8b": "8,767,123,696",
            "qwen3-vl-32b": "33,357,390,064",
            "qwen3-vl-30b-a3b": "31,070,754,032",
            "qwen3-vl-235b-a22b": "235,670,022,896",
        }[name]
    )
    assert architecture.placeholders_per_tile == 1
