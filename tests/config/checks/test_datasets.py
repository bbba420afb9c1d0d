"""The form of conversations and images in packs fits what the stage is trained on."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megavlm.config.checks.datasets import facts_problems
from megavlm.config.cli import parse
from megavlm.config.recipes import RECIPES
from megavlm.config.recipes.recipe import Recipe, Stage
from megavlm.config.schema import Training
from tests.config.checks.test_rules import facts


@pytest.fixture(autouse=True)
def recipe_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a recipe whose first stage wants another form of packs than its second."""
    row = Recipe(
        name="mine",
        description="a recipe whose stages want unlike packs",
        stages={
            "1": Stage(
                description="pairs",
                template=("plain",),
                tiling="pad",
                training=Training(trainable=("language",)),
            ),
            "2": Stage(description="conversations"),
        },
        template=("vicuna", "phi3-chat"),
    )
    monkeypatch.setitem(RECIPES, "mine", row)


@pytest.mark.parametrize(
    ("stage", "form", "wrong"),
    [
        ("1", {"template": "plain", "tiling": "pad"}, ()),
        ("1", {"template": "vicuna", "tiling": "pad"}, ("template vicuna", "--data.template vic")),
        ("1", {"template": "plain", "tiling": "dynamic"}, ("--data.tiling dynamic to train",)),
        (
            "1 --data.train a,b --data.weights 1,1",
            {"template": "plain", "tiling": "dynamic"},
            ("--data.tiling any to train",),
        ),
        ("1", {"template": "plain", "tiling": "dynamic", "has_images": False}, ()),
        ("2", {"template": "phi3-chat", "tiling": "dynamic"}, ()),
        ("2", {"template": "plain"}, ("stage 2 of recipe mine is trained on vicuna,phi3-chat",)),
        ("2 --data.template plain,vicuna", {"template": "plain"}, ()),
        ("1 --data.template any --data.tiling any", {"template": "x", "tiling": "dynamic"}, ()),
    ],
)
def test_packs_have_the_form_that_the_stage_wants(
    stage: str, form: dict[str, str | bool], wrong: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = ["--recipe", "mine", "--model", "tiny", "--data.train", str(tmp_path)]
    config = parse([*arguments, "--stage", *stage.split()])
    found = facts_problems(config, [facts(config, **form)], 1)
    assert len(found) == (1 if wrong else 0)
    assert all(part in found[0] for part in wrong)


@pytest.mark.parametrize(
    ("stage", "other", "told"),
    [
        (
            "2",
            "1",
            "makes pairs of an image and a text, .* reads conversations; .*--template blip2$",
        ),
        ("1", "2", "makes conversations, .* reads pairs of .*; pack with --template blip2_pairs$"),
    ],
)
@pytest.mark.parametrize("asked", ["", "any"])
def test_no_option_is_proposed_to_read_pairs_as_conversations(
    stage: str, other: str, told: str, asked: str
) -> None:
    recipe = ["--recipe", "blip2", "--stage"]
    given = parse([*recipe, other])
    packs = facts(given, features_per_tile=32 if other == "2" else 0, tiling="stretch")
    config = parse([*recipe, stage, *(["--data.template", asked] if asked else [])])
    own = replace(packs, vocab_size=1, pixel_mean=config.architecture.vision.pixel_mean)
    [problem] = facts_problems(config, [own], 1)
    assert "--data.template" not in problem and "--model" not in problem
    assert re.search("; pack with another --template$" if asked else told, problem)


def test_internvl_is_not_trained_on_pairs_without_questions() -> None:
    config = parse(["--stage", "2", "--model", "tiny"])
    [problem] = facts_problems(config, [facts(config, template="plain")], 1)
    assert "pack with --template internvl2_5" in problem
    text = parse(["--stage", "0", "--model", "tiny"])
    assert not facts_problems(text, [facts(text, template="plain", has_images=False)], 1)
