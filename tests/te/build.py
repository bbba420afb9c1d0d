"""Builds models of Transformer Engine's layers on a machine without a GPU, and prints what they are
made of, as JSON.

Building asks the device a few questions and computes nothing, so that answers for a Hopper GPU are
enough; running needs a real one. The answers change torch for the whole process: ``test_build``
starts one of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from tests.te import torch_permutation


def pretend_hopper() -> None:
    """Answer what constructors ask about the device."""
    import torch
    import transformer_engine.pytorch  # noqa: F401  its import looks at the real device

    from megavlm.parallel import cpu_backend

    cpu_backend.install()
    properties = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="Hopper", total_memory=141 * 2**30
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    torch.cuda.get_device_properties = lambda *args: properties
    torch_permutation.make_orders_on_cpu()


def build(config: Any, layout_groups: Any) -> Any:
    """Build a model of one chunk with fresh weights."""
    from megavlm.model import weights
    from megavlm.model.vlm import VisionLanguageModel
    from megavlm.planner.layout import make_layout

    model = VisionLanguageModel(config, make_layout(config), layout_groups)
    weights.fill([model], weights.fresh_tensor(config))
    return model


def facts(model: Any) -> dict[str, Any]:
    """Names, shapes, types and sums of a chunk's weights."""
    from megavlm.model.weights import named_weights, weight_sizes

    weights = named_weights(model)
    linear = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "fuse_wgrad_accumulation")
    }
    return {
        "sizes": weight_sizes(model),
        "shapes": {key: list(weight.shape) for key, weight in weights.items()},
        "dtypes": sorted({str(weight.dtype) for weight in weights.values()}),
        "sums": {key: float(weight.double().sum()) for key, weight in weights.items()},
        "modules": sorted(
            {type(module).__mro__[1].__name__ for module in model.modules()}
            | {type(m).__name__ for m in model.modules()}
        ),
        "sums_in_product": {
            name: bool(module.fuse_wgrad_accumulation) for name, module in linear.items()
        },
    }


def recipes(config: Any, groups: Any) -> dict[str, Any]:
    """Run the two parts, and the layers that must stay in 16 bits, under each FP8 recipe."""
    from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe

    found = {}
    for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        first = 0 if recipe == "delayed" else 1
        fp8 = dataclasses.replace(
            config.fp8, vision=recipe, language=recipe, first_bf16_layers=first
        )
        model = build(dataclasses.replace(config, fp8=fp8), groups)
        parts = {
            "vision": model.vision.config,
            "language": model.language.config,
            "connector": model.connector.config,
        }
        found[recipe] = {
            "classes": {
                part: type(get_fp8_recipe(settings)).__name__
                for part, settings in parts.items()
                if settings.fp8
            },
            "spared": (
                []
                if first == 0
                else [
                    n
                    for n in range(3)
                    if type(get_fp8_context(parts["language"], n)).__name__ == "nullcontext"
                ]
            ),
            "sizes": facts(model)["sizes"],
        }
    return found


def moved(config: Any, local: Any, groups: Any) -> dict[str, Any]:
    """Load a checkpoint of Transformer Engine's layers into local layers, and the other way; return
    sums of the weights.
    """
    from megatron.core import dist_checkpointing

    from megavlm.checkpoint.step_folder import Checkpoint
    from megavlm.checkpoint.train_state import State
    from megavlm.train.checkpoint import load_weights, sharded_weights

    found = {}
    for name, source, target in (("to local", config, local), ("to engine", local, config)):
        folder = Path(tempfile.mkdtemp())
        (folder / "shards").mkdir()
        dist_checkpointing.save(
            {"model": sharded_weights([build(source, groups)])}, str(folder / "shards")
        )
        other = build(
            dataclasses.replace(target, training=dataclasses.replace(target.training, seed=99)),
            groups,
        )
        before = facts(other)["sums"]
        load_weights(Checkpoint(folder=folder, config=source, state=State()), [other])
        found[name] = {"before": before, "after": facts(other)["sums"]}
    return found


def main() -> None:
    """Build everything and print it."""
    pretend_hopper()
    import torch.distributed as dist

    from megavlm.model import precision
    from megavlm.parallel import process_groups as groups
    from tests.ranks.runs import config_for

    store = Path(tempfile.mkdtemp()) / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    config = config_for(Path("unused"), precision="bfloat16")
    config = dataclasses.replace(config, architecture=wide(config.architecture))
    place = groups.create(config.parallel, 0)
    local = dataclasses.replace(
        config, training=dataclasses.replace(config.training, kernels="local")
    )
    answer = {
        "local": facts(build(local, place)),
        "engine": facts(build(config, place)),
        "normed": [
            facts(build(dataclasses.replace(one, architecture=normed(one.architecture)), place))
            for one in (local, config)
        ],
        "mixture": [
            facts(build(dataclasses.replace(one, architecture=mixture(one.architecture)), place))
            for one in (local, config)
        ],
        "moved": moved(config, local, place),
        "recipes": recipes(config, place),
        "tile_multiple": {
            "local": precision.tile_multiple(local),
            "engine": precision.tile_multiple(config),
            "fp8": precision.tile_multiple(
                dataclasses.replace(
                    config, fp8=dataclasses.replace(config.fp8, vision="tensorwise")
                )
            ),
        },
    }
    groups.destroy()
    dist.destroy_process_group()
    json.dump(answer, os.fdopen(int(sys.argv[1]), "w"))


def wide(architecture: Any) -> Any:
    """Widen the tests' tiny model to sizes that FP8 allows."""
    vision = dataclasses.replace(architecture.vision, hidden_size=64, ffn_hidden_size=96)
    language = dataclasses.replace(architecture.language, hidden_size=64, ffn_hidden_size=128)
    return dataclasses.replace(architecture, vision=vision, language=language)


def mixture(architecture: Any, experts: int = 5, has_options: bool = False) -> Any:
    """Put experts in the place of MLPs; with options: sigmoid scores, a bias, a shared expert."""
    from tests.convert.models import EXPERTS, SIGMOID_ROUTER

    chosen = SIGMOID_ROUTER | dict(shared_expert_gate=True) if has_options else EXPERTS
    language = dataclasses.replace(architecture.language, **chosen | dict(num_experts=experts))
    return dataclasses.replace(architecture, language=language)


def normed(architecture: Any) -> Any:
    """Add the norms of InternViT-6B and Qwen3, another head size, and a tied head."""
    vision = dataclasses.replace(
        architecture.vision, normalization="RMSNorm", qkv_bias=False, qk_norm=True
    )
    language = dataclasses.replace(
        architecture.language,
        family="qwen3",
        qkv_bias=False,
        qk_norm=True,
        kv_channels=32,
        tied_head=True,
    )
    return dataclasses.replace(architecture, vision=vision, language=language)


if __name__ == "__main__":
    main()
