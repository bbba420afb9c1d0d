"""What vision encoders that see whole images do not go with is refused, with the flag to change."""

from __future__ import annotations

import dataclasses

import pytest

from megavlm.config.checks.rules import facts_problems, problems
from megavlm.config.cli import parse
from megavlm.config.recipes import RECIPES
from megavlm.config.schema import Config
from tests.config.checks.configs import facts

RECIPE = ("--recipe", "qwen2_5_vl")
OTHER = ("--recipe", "qwen2_vl")
THIRD = ("--recipe", "qwen3_vl")
INTERNVL = ("--recipe", "internvl", "--model", "internvl2_5-8b")
ADAPTERS = (
    "--architecture.lora.rank 8 --architecture.lora.targets vision --training.trainable"
    " vision.*.lora --architecture.lora.dropout 0.1"
)


def run(recipe: tuple[str, ...], options: str = "") -> Config:
    """Return the last stage of a recipe."""
    stage = "2" if recipe == INTERNVL else list(RECIPES[recipe[1]].stages)[-1]
    return parse(
        [*recipe, "--stage", stage, "--data.train", ".", "--checkpoint.save", "x", *options.split()]
    )


def found(recipe: tuple[str, ...], options: str = "") -> list[str]:
    """List the problems of a run on two ranks."""
    return problems(run(recipe, options), 2)


@pytest.mark.parametrize("recipe", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_recipes_have_no_problem(recipe: str) -> None:
    for stage in RECIPES[recipe].stages:
        saved = ["--data.train", ".", "--checkpoint.save", "x"]
        config = parse(["--recipe", recipe, "--stage", stage, *saved])
        assert problems(config, 2) == []
        packed = facts(config, tiling="native", preferences=stage == "dpo")
        assert facts_problems(config, [packed], 2) == []


@pytest.mark.parametrize(
    ("recipe", "options", "told"),
    [
        (RECIPE, "vision.temporal_patch_size 0", "temporal_patch_size 0: qwen2_5_vl reads"),
        (RECIPE, "vision.tokens_per_second -1", "tokens_per_second -1: must be 0 or more"),
        (RECIPE, "connector.kind mlp", "connector.kind mlp: a vision encoder of"),
        (RECIPE, "connector.kind linear", "which only merger reads; use it"),
        (RECIPE, "connector.kind qformer", "which only merger reads; use it"),
        (RECIPE, "cross_attention.every 4", "cross_attention.every 4: a vision encoder of"),
        (RECIPE, "objective contrastive", "connector.kind merger: gives 1 features"),
        (RECIPE, "objective qformer", "objective qformer"),
        (RECIPE, "vision.unused_layers 1", "vision.unused_layers 1: features of"),
        (RECIPE, "vision.final_norm true", "vision.final_norm true: a vision encoder of"),
        (RECIPE, "vision.qk_norm true", "vision.qk_norm true:"),
        (RECIPE, "vision.patch_drop 0.5", "vision.patch_drop 0.5:"),
        (RECIPE, "vision.num_attention_heads 128", "128: 10 a head"),
        (RECIPE, "vision.normalization LayerNorm", "qwen2_5_vl has RMSNorm; use it"),
        (RECIPE, "vision.activation gelu", "vision.activation gelu: --architecture.vision.family"),
        (RECIPE, "vision.window_size 100", "window_size 100: must be a multiple of --arch"),
        (RECIPE, "vision.window_size -28", "window_size -28: must be 0 or more"),
        (RECIPE, "vision.window_size 0", "full_attention_layers 7,15,23,31 has no effect without"),
        (RECIPE, "vision.full_attention_layers 7,32", "7,32: there is no layer 32; the 32 of"),
        (OTHER, "vision.window_size 112", "qwen2_vl has no windows, as qwen2_5_vl has; use 0"),
        (OTHER, "vision.normalization RMSNorm", "qwen2_vl has LayerNorm; use it"),
        (OTHER, "vision.activation swiglu", "needs quick_gelu, gelu or gelu_tanh"),
        (
            OTHER,
            "vision.position_side 48",
            "qwen2_vl has no table; use 0",
        ),
        (OTHER, "vision.deepstack_layers 1,2", "qwen2_vl has features of its last layer alone"),
        (THIRD, "vision.position_side 0", "qwen3_vl needs a number above 0, such as 48"),
        (THIRD, "vision.deepstack_layers 8,27", "8,27: there is no layer 27; the 27 of"),
        (THIRD, "vision.deepstack_layers 9,8", "9,8: name each layer once, in their order"),
        (THIRD, "language.num_layers 2", "3 levels are added behind as many layers"),
        (THIRD, "vision.window_size 128", "qwen3_vl has no windows, as qwen2_5_vl has; use 0"),
        (THIRD, "language.rotary_sections 16,24,24", "they can have 21 of 64 at most"),
        (RECIPE, "language.rotary_sections 16,48", "rotary_sections 16,48: needs three numbers"),
        (RECIPE, "language.rotary_sections 0,24,40", "0,24,40: needs three numbers above 0"),
        (RECIPE, "language.rotary_sections 16,24,23", "together 63, and must be 64, half of"),
        (RECIPE, "language.rotary_percent 0.5", "rotary_percent 0.5: --architecture.language.rot"),
        (RECIPE, "language.rotary_dynamic_factor 2", "rotary_dynamic_factor 2.0: --architecture"),
        (RECIPE, "language.rotary_yarn_factor 4", "rotary_yarn_factor 4.0: --architecture.lang"),
        (INTERNVL, "vision.temporal_patch_size 2", "temporal_patch_size 2: a vision encoder of"),
        (INTERNVL, "vision.tokens_per_second 2", "tokens_per_second 2: a vision encoder of"),
        (INTERNVL, "vision.deepstack_layers 2,4", "deepstack_layers 2,4: a vision encoder of"),
        (INTERNVL, "vision.position_side 4", "position_side 4: a vision encoder of"),
        (INTERNVL, "language.rotary_interleaved true", "interleaved true has no effect without"),
        (INTERNVL, "vision.window_size 112", "vision.window_size 112: a vision encoder of"),
        (INTERNVL, "vision.full_attention_layers 7,15", "full_attention_layers 7,15: a vision"),
        (INTERNVL, "connector.kind merger", "connector.kind merger: reads the patches of whole"),
        (INTERNVL, "vision.activation swiglu", "only --architecture.vision.family qwen2_5_vl has"),
        (INTERNVL, "language.rotary_sections 16,24,24", "rotary_sections 16,24,24: places in an"),
    ],
)
def test_models_that_cannot_be_are_refused(
    recipe: tuple[str, ...], options: str, told: str
) -> None:
    listed = found(recipe, f"--architecture.{options}")
    assert any(told in problem for problem in listed), listed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--training.drop_path 0.1", "--training.drop_path 0.1: the tiles of an image share"),
        ("--training.drop_path_schedule linear --training.end_drop_path 0.1", "end_drop_path 0.1"),
        (
            "--parallel.tensor_model_parallel_size 8",
            "3420; use 1, 2 or 4, or --parallel.vision data",
        ),
        ("--fp8.vision tensorwise", "ffn_hidden_size makes matrices 3420 wide"),
        (
            f"{ADAPTERS} --parallel.tensor_model_parallel_size 2 --parallel.vision data",
            "lora.dropout 0.1: with --parallel.vision data the adapters of",
        ),
    ],
)
def test_runs_that_cannot_be_are_refused(options: str, told: str) -> None:
    listed = found(RECIPE, options)
    assert any(told in problem for problem in listed), listed


def test_adapters_with_dropout_that_know_their_patches_are_taken() -> None:
    assert found(RECIPE, f"{ADAPTERS} --parallel.tensor_model_parallel_size 2") == []


def test_preferences_are_taken() -> None:
    options = "--architecture.objective preference --data.loss_reduction sample --data.reference x"
    assert found(RECIPE, options) == []


def test_packs_that_are_cut_otherwise_are_refused() -> None:
    for recipe, tiling, told in (
        (RECIPE, "dynamic", "--data.train packs: packed with --tiling dynamic, and a vision"),
        (RECIPE, "patches", "pack with --tiling native"),
        (INTERNVL, "native", "packed with --tiling native, whose tiles are parts of one image"),
    ):
        config = run(recipe, "--data.tiling any")
        packed = facts(config, tiling=tiling)
        [problem] = facts_problems(config, [packed], 1)
        assert told in problem
        assert not facts_problems(config, [dataclasses.replace(packed, has_images=False)], 1)


def test_a_model_without_a_vision_encoder_reads_no_whole_images() -> None:
    vision = RECIPES["qwen2_5_vl"].architecture.vision
    assert vision.spans_tiles
    assert not dataclasses.replace(vision, num_layers=0).spans_tiles
