"""The training stage that packs are made for, as ``--recipe`` and ``--stage`` of
``tools/pack_dataset.py`` name it, and the options that follow from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megavlm.config.architecture import Architecture
from megavlm.config.objectives import needs_of
from megavlm.config.recipes import RECIPES, recipe
from megavlm.config.recipes.recipe import Recipe
from megavlm.config.schema import ANY, Config


def add_stage_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a stage."""
    group = parser.add_argument_group("stage")
    group.add_argument(
        "--recipe",
        metavar="NAME",
        default="",
        help=(
            f"recipe that the packs are for: {', '.join(RECIPES)}; with --stage it sets --template,"
            " --tiling, --image_size, --capacity and --model, each unless it is given, and"
            " --preferences"
            " (default: internvl if there is a --stage)"
        ),
    )
    group.add_argument(
        "--stage",
        metavar="NAME",
        default="",
        help="stage of the recipe; may be left out if the recipe's stages all read the same packs",
    )


def stage_settings(recipe_name: str, stage: str) -> dict[str, str | int]:
    """Return the options that follow from a recipe and a stage, by name; none if neither is named.

    Raises:
        ValueError: there is no such recipe or stage, or the stages differ and none is named.
    """
    if not recipe_name and not stage:
        return {}
    chosen = recipe(recipe_name or Config.recipe)
    found = [_settings(chosen, name) for name in ([stage] if stage else chosen.stages)]
    if any(settings != found[0] for settings in found):
        raise ValueError(
            f"--recipe {chosen.name}: its stages read different packs; name one: --stage"
            f" {' or '.join(chosen.stages)}"
        )
    return found[0]


def taken_settings(args: argparse.Namespace) -> str:
    """Return, as a command line has them, the options that were not given and follow from the
    stage.
    """
    settings = stage_settings(args.recipe, args.stage)
    return " ".join(
        f"--{name}" if value is True else f"--{name} {value}"
        for name, value in settings.items()
        if vars(args)[name] == value
    )


def other_templates(args: argparse.Namespace) -> list[str]:
    """Return the templates that the stage takes beside its first, which was taken because none was
    given: the tokenizer may need one of them.
    """
    if stage_settings(args.recipe, args.stage).get("template") != args.template:
        return []
    chosen = recipe(args.recipe or Config.recipe)
    names = chosen.data(args.stage or next(iter(chosen.stages))).template
    return [name for name in names if name != args.template]


def form_warnings(args: argparse.Namespace) -> Iterator[str]:
    """Warn of a template, of tiles or of preferences that the stage is not trained on or, if none
    is named, of tiles that no stage is trained on whose packs have the template: that is noticed
    when training starts, and packing may have taken a day.
    """
    is_named = bool(args.recipe or args.stage)
    settings = stage_settings(args.recipe, args.stage)
    if is_named and args.preferences and "preferences" not in settings:
        yield (
            "--preferences: the stage is trained on single answers; leave it out, or train it with"
            " --architecture.objective preference"
        )
    rows = [recipe(args.recipe or Config.recipe)] if is_named else RECIPES.values()
    stages = [
        row.data(name) for row in rows for name in ([args.stage] if args.stage else row.stages)
    ]
    templates = dict.fromkeys(name for data in stages for name in data.template)
    if is_named and not templates.keys() & {args.template, ANY}:
        yield (
            f"--template {args.template}: the stage is not trained on such packs; give --template"
            f" {' or '.join(templates)}, or --data.template {args.template} to the training"
        )
    tilings = {data.tiling: None for data in stages if is_named or args.template in data.template}
    if tilings and not tilings.keys() & {args.tiling, ANY}:
        where = (
            "the stage is not trained on such tiles"
            if is_named
            else (f"no stage is trained on such tiles with --template {args.template}")
        )
        yield (
            f"--tiling {args.tiling}: {where}; give --tiling {' or '.join(tilings)}, or"
            f" --data.tiling {args.tiling} to the training"
        )


def _settings(chosen: Recipe, stage: str) -> dict[str, str | int]:
    """Return the options that follow from one stage."""
    data = chosen.data(stage)
    row = chosen.stage(stage)
    given = {
        "template": data.template[0],
        "tiling": data.tiling,
        "image_size": row.image_size,
        "capacity": row.capacity,
        "model": chosen.name if chosen.architecture else None,
        "preferences": needs_of(row.objective).is_of_preferences or None,
    }
    return {name: value for name, value in given.items() if value not in (ANY, None)}


def model_warnings(args: argparse.Namespace, model: Architecture) -> Iterator[str]:
    """Warn of tiles that the model does not read, whose packs training refuses: a command line
    that names a Qwen2.5-VL but no recipe has InternVL's tiles and template.
    """
    spans = model.vision.spans_tiles
    if spans == (args.tiling == "native"):
        return
    name = f"--model {args.model}" if args.model else "InternVL2.5, which no --model means,"
    if spans:
        yield (
            f"--tiling {args.tiling}: {name} reads images of any size, and its training refuses"
            " such images; give --tiling native and its --template, or --recipe and --stage, which"
            " set both"
        )
    else:
        yield (
            f"--tiling native: {name} reads each tile by itself, and its training refuses such"
            " images; name a model that reads images of any size, or give another --tiling"
        )
