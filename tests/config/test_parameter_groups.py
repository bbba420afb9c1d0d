"""Which learning rate and weight decay a parameter has, by its name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megavlm.config.cli import parse
from megavlm.config.layer_ranges import expand
from megavlm.config.models import architecture
from megavlm.config.parameter_groups import multiplier
from megavlm.config.schema import NO_VISION, Config, Optimizer
from megavlm.job_checks import parameter_problems, problems
from megavlm.planner.parameter_table import parameter_table
from tools import show_parameters

ARCH = architecture("internvl2_5-1b")
WIDTH = 1024
INNER = 4096


def configured(*arguments: str) -> Config:
    # Some of them freeze the vision encoder.
    common = ["--model", "internvl2_5-1b", "--stage", "2", "--training.drop_path", "0"]
    return parse([*common, *arguments])


def test_layer_decay_is_that_of_internvl() -> None:
    # InternVL's classification/models/intern_vit_6b.py: rate ** (depth - i) for block i,
    # rate ** (depth + 1) for the embeddings, 1 for the rest.
    settings = Optimizer(vision_layer_decay=0.9, language_layer_decay=0.8)
    wanted = {
        "vision.class_token": 0.9**25,
        "vision.patch_embedding.bias": 0.9**25,
        "vision.encoder.layers.0.mlp.linear_fc1.weight": 0.9**24,
        "vision.encoder.layers.23.mlp_scale": 0.9,
        "connector.mlp.linear_fc1.weight": 1.0,
        "language.embedding.word_embeddings.weight": 0.8**25,
        "language.decoder.layers.3.mlp.linear_fc1.weight": 0.8**21,
        "language.decoder.final_layernorm.weight": 1.0,
        "language.output_layer.weight": 1.0,
    }
    assert {key: multiplier(key, settings, ARCH) for key in wanted} == pytest.approx(wanted)


def test_the_last_pattern_counts_and_layer_decay_multiplies_it() -> None:
    settings = Optimizer(
        lr_multipliers=("vision=0.1", "*.linear_fc1.weight=0.5", "connector=10"),
        vision_layer_decay=0.5,
    )
    found = [
        multiplier(key, settings, ARCH)
        for key in (
            "vision.encoder.layers.23.mlp.linear_fc2.weight",
            "vision.encoder.layers.23.mlp.linear_fc1.weight",
            "connector.mlp.linear_fc1.weight",
            "language.decoder.layers.0.mlp.linear_fc1.weight",
            "language.output_layer.weight",
        )
    ]
    assert found == pytest.approx([0.05, 0.25, 10.0, 0.5, 1.0])


def test_ranges_of_layers_become_names() -> None:
    config = configured(
        "--training.trainable", "vision.layers.-2:,language.layers.0,connector",
        "--optimizer.lr_multipliers", "vision.layers.-1=0.5",
    )  # fmt: skip
    assert config.training.trainable == (
        "vision.encoder.layers.22",
        "vision.encoder.layers.23",
        "language.decoder.layers.0",
        "connector",
    )
    assert config.optimizer.lr_multipliers == ("vision.encoder.layers.23=0.5",)
    assert expand("vision.layers.2:4", ARCH) == tuple(f"vision.encoder.layers.{n}" for n in (2, 3))
    for wrong in ("vision.layers.24", "language.layers.30:", "vision.layers.5:2"):
        with pytest.raises(ValueError, match="no such layers; the model has"):
            expand(wrong, ARCH)
    with pytest.raises(ValueError, match="no such layers; the model has no vision layers"):
        expand("vision.layers.-1", replace(ARCH, vision=NO_VISION))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--optimizer.lr_multipliers vison=0.1", "vison=0.1: no parameter of the model is called"),
        ("--optimizer.lr_multipliers *q_proj*=2", "part of linear_qkv, one tensor, which has one"),
        ("--optimizer.lr_multipliers vision=0", "0 would still keep moments of these parameters"),
        ("--optimizer.lr_multipliers vision=-1", "must be above 0"),
        ("--optimizer.lr_multipliers vision", "must be a part or a pattern of names, =, and"),
        ("--optimizer.lr_multipliers vision=x", "must be a part or a pattern of names, =, and"),
        ("--optimizer.no_decay *temperature", "no_decay *temperature: no parameter of the model"),
        ("--optimizer.vision_layer_decay 1.1", "vision_layer_decay 1.1: must be above 0"),
        ("--training.trainable connector,language.heads", "language.heads: no parameter"),
        (
            "--training.trainable connector --optimizer.language_layer_decay 0.9",
            "language_layer_decay 0.9 has no effect: nothing of language is in",
        ),
        ("--weight-decay 0 --optimizer.no_decay vision", "no_decay vision has no effect with"),
        ("--weight-decay 0 --optimizer.decay matrices", "decay matrices has no effect with"),
        (
            "--training.trainable connector --optimizer.no_decay vision",
            "names frozen parameters only",
        ),
        (
            "--training.trainable connector --training.drop_path 0.1",
            "drop_path 0.1 has no effect: --training.trainable connector leaves the vision encoder",
        ),
        (
            "--architecture.lora.rank 4 --training.trainable *.lora --training.end_drop_path 0.1",
            "leaves the vision encoder frozen; use 0",
        ),
        (
            "--training.trainable connector,*.final_layernorm --fp8.vision delayed",
            "scales are never set; use tensorwise",
        ),
    ],
)
def test_patterns_that_mean_nothing_are_refused(arguments: str, words: str) -> None:
    [found] = parameter_problems(configured(*arguments.split(" ")))
    assert words in found


def test_patterns_and_other_problems_are_told_together() -> None:
    pattern = ("--optimizer.lr_multipliers", "vison=0.1")
    found = problems(configured(*pattern, "--optimizer.vision_layer_decay", "2", "--lr", "0"), 1)
    for flag in ("lr_multipliers vison", "vision_layer_decay 2", "lr 0.0"):
        assert [flag in text for text in found].count(True) == 1, found
    found = problems(configured(*pattern, "--training.trainable", "visoin"), 1)
    assert ["trainable visoin:" in text for text in found].count(True) == 1, found
    # A model that cannot be has no names.
    found = problems(configured(*pattern, "--architecture.vision.num_layers", "-1"), 1)
    assert not any("vison" in text for text in found) and any("layers -1" in text for text in found)


def test_a_mistake_in_a_setting_is_not_told_again_by_what_follows_from_it() -> None:
    adapters = ("--architecture.lora.rank", "4", "--architecture.lora.targets", "visoin")
    for arguments in (
        (*adapters, "--training.trainable", "language.*.lora"),
        ("--training.frozen_until", "vision=0.5,connector=9"),
    ):
        assert len(parameter_problems(configured(*arguments))) == 1, arguments


def test_patterns_of_a_recipe_may_name_what_a_narrower_mask_freezes() -> None:
    def found(*arguments: str) -> list[str]:
        words = ["--recipe", "flamingo", "--stage", "1", "--training.trainable", "connector"]
        return parameter_problems(parse([*words, *arguments]))

    assert found() == []
    # A stage of InternVL-C has rates by part and by layer.
    pairs = ["--recipe", "internvl_c", "--stage", "1", "--training.trainable", "vision"]
    assert parameter_problems(parse(pairs)) == []
    [told] = found("--optimizer.no_decay", "connector,language.embedding")
    assert "--optimizer.no_decay language.embedding: names frozen parameters only" in told


def test_the_tool_counts_parameters_and_rates_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = (
        "--model internvl2_5-1b --stage 2 --lr 1e-4 --optimizer.decay matrices"
        " --optimizer.no_decay vision.position_embedding --optimizer.vision_layer_decay 0.9"
        " --optimizer.lr_multipliers vision=0.1,connector=5"
        " --training.trainable vision,connector,language.layers.-1: --json"
    )
    assert show_parameters.main([*command.split(), str(tmp_path / "groups.json")]) == 0
    rows = json.loads((tmp_path / "groups.json").read_text())
    by_first = {row["names"][0]: row for row in rows}
    # InternViT-300M: 24 layers of 1024, patches of 14 x 14, 1025 positions.
    patches = by_first["vision.patch_embedding.weight"]
    assert patches["parameters"] == 3 * 14 * 14 * WIDTH and patches["weight_decay"]
    assert patches["lr"] == pytest.approx(1e-4 * 0.1 * 0.9**25)
    around = by_first["vision.patch_embedding.bias"]
    assert around["parameters"] == WIDTH + WIDTH + 1025 * WIDTH and not around["weight_decay"]
    layer = by_first["vision.encoder.layers.7.self_attention.linear_qkv.weight"]
    assert layer["parameters"] == 4 * WIDTH * WIDTH + 2 * WIDTH * INNER
    assert layer["lr"] == pytest.approx(1e-4 * 0.1 * 0.9**17)
    # Two norms, four biases and two layer scales.
    vectors = by_first["vision.encoder.layers.7.self_attention.linear_qkv.layer_norm_weight"]
    assert vectors["parameters"] == 4 * WIDTH + (3 + 1 + 4 + 1) * WIDTH + 2 * WIDTH
    connector = by_first["connector.mlp.linear_fc1.weight"]
    assert connector["parameters"] == 4096 * 896 + 896 * 896 and connector["lr"] == 5e-4
    # Qwen2.5-0.5B: 24 layers of 896, 2 key-value heads of 64, 4864 in the MLP, tied head.
    last = by_first["language.decoder.layers.23.self_attention.linear_qkv.weight"]
    assert last["parameters"] == 896 * (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4864
    assert last["lr"] == 1e-4 and not last["frozen"]
    frozen = by_first["language.embedding.word_embeddings.weight"]
    assert frozen["frozen"] and frozen["lr"] == 0.0
    assert len(rows) == 2 + 2 * 24 + 2 + 2 + 1
    assert "trainable:" in capsys.readouterr().out
    for option, value in (("no_decay", "nothing"), ("muon_scale", "0.1")):
        with pytest.raises(SystemExit):
            show_parameters.main(
                ["--model", "tiny", "--stage", "2", f"--optimizer.{option}", value]
            )


def test_a_run_of_defaults_has_one_group_a_part() -> None:
    rows = parameter_table(replace(configured(), optimizer=Optimizer()))
    assert [(row.part, row.multiplier, row.weight_decay) for row in rows] == [
        (part, 1.0, True) for part in ("vision", "connector", "language")
    ]


@pytest.mark.parametrize(
    ("command", "without"),
    [
        ("--recipe clip --stage 1", {"vision.position_embedding"}),
        (
            "--recipe siglip --stage 1",
            {"vision.position_embedding", "language.embedding.position_embeddings.weight"},
        ),
        ("--model tiny --stage 2", {"vision.position_embedding"}),
        ("--recipe blip2 --stage 1", {"connector.position_embedding.weight", "connector.queries"}),
    ],
)
def test_the_models_own_list_is_that_of_vision_libraries(command: str, without: set) -> None:
    def decayed(rule: str) -> set[str]:
        run = parse([*command.split(), "--optimizer.decay", rule])
        return {name for row in parameter_table(run) if row.weight_decay for name in row.names}

    assert without <= decayed("matrices") and not without & decayed("model")
    left_out = decayed("matrices") - decayed("model")
    assert left_out <= {*without, "language.embedding.position_embeddings.weight"}
