"""The table of recipes, which ``--recipe`` picks from: a module for each."""

from __future__ import annotations

from megavlm.config.recipes import (
    blip2,
    clip,
    flamingo,
    fuyu,
    instructblip,
    internvl,
    internvl_c,
    llava,
    llava_next,
    llava_onevision,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    siglip,
)
from megavlm.config.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE
    for module in (
        internvl,
        llava,
        llava_next,
        llava_onevision,
        paligemma,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        fuyu,
        blip2,
        instructblip,
        flamingo,
        clip,
        siglip,
        internvl_c,
    )
}


def recipe_of(hub_format: str) -> Recipe:
    """Return the recipe whose models are exported in a format; if there is none, the first."""
    rows = list(RECIPES.values())
    return next(
        (row for row in rows if hub_format in (row.hub_format, *row.other_formats.values())),
        rows[0],
    )


def recipe(name: str) -> Recipe:
    """Return the recipe ``name`` from the table.

    Raises:
        ValueError: there is no such recipe; the message lists the names.
    """
    if name not in RECIPES:
        raise ValueError(f"--recipe {name}: no such recipe; known are {', '.join(RECIPES)}")
    return RECIPES[name]
