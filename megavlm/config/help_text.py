"""What ``pretrain_vlm.py --help`` prints: an overview, or the options of a section."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from megavlm.config.models import MODELS
from megavlm.config.options import ALIASES, make_parser, nearest, options, sections
from megavlm.config.recipes import RECIPES
from megavlm.config.recipes.recipe import Recipe
from megavlm.config.schema import Architecture, Config
from megavlm.config.verdict import PROGRAM

ALL = "all"
RUN = "run"
_WIDTH = 100
_MOST_NEAR = 6


def help_text(asked: str, defaults: Config, chosen: Recipe) -> str:
    """Return the text for ``--help ASKED``.

    Args:
        asked: a section, for it and the sections inside it, an option, or ``all``; empty: the
            overview.
        defaults: of the options.
        chosen: the recipe whose stages are shown.

    Raises:
        ValueError: there is no such section or option; names those that are near.
    """
    if not asked:
        return _overview(chosen)
    description = f"{_introduction()}\n\n{_presets(chosen)}\n\n{_sizes()}"
    if asked == ALL:
        return make_parser(defaults, PROGRAM, description).format_help()
    keys = _keys_of(asked.strip("-").removesuffix("."))
    if not keys:
        raise ValueError(f"--help {asked}: no such section or option{_near(asked)}")
    heading = f"{_presets(chosen)}\n\n{_sizes()}" if asked == RUN else ""
    return make_parser(defaults, PROGRAM, heading, only=keys).format_help()


def section_names() -> dict[str, str]:
    """Return the names of all sections, and what each is about, in a few words."""
    about = {
        path.removesuffix("."): re.split(r"[:;]|\.(?: |$)| \(", text.replace("``", ""))[0]
        for path, text, _ in sections()
        if path
    }
    return {RUN: "Recipe, stage and model"} | about


def _keys_of(name: str) -> list[str]:
    """Return the options of a section and those inside it, or the one of that name or alias."""
    if name == RUN:
        return [key for key in options() if "." not in key]
    key = ALIASES.get(f"--{name}", name)
    return [found for found in options() if found == key or found.startswith(f"{key}.")]


def _near(asked: str) -> str:
    """Return the sections and options that a word may have meant, or where they are listed."""
    word = asked.strip("-")
    known = [*section_names(), *options(), *(alias.lstrip("-") for alias in ALIASES)]
    within = [name for name in known if word.lower() in name][:_MOST_NEAR]
    if within:
        return f"; did you mean {' or '.join(within)}?"
    return nearest(word, known) or "; --help without a word lists the sections"


def _overview(chosen: Recipe) -> str:
    """Return what a new user reads first."""
    listed = _rows(section_names(), 32)
    usage = make_parser(Config(stage="", model=""), PROGRAM, only=()).format_usage()
    return f"""{usage}
{_introduction()}

{_presets(chosen)}

models (--help {RUN} tells their sizes; --model also takes a Hugging Face folder):
{_names(MODELS)}

options, by section:
{listed}

--help SECTION lists the options of a section and of those inside it, as in --help parallel, and
--help OPTION tells of one, as in --help lr; --help {ALL} lists all. With --stage and --model the
defaults are those of that stage and model.
"""


def _introduction() -> str:
    return f"""Train a vision-language model.

example, on a machine with 8 GPUs:
  torchrun --nproc_per_node 8 {PROGRAM} --stage 1 --model internvl2_5-1b --load InternVL2_5-1B/ \\
      --data.train packs/captions --save runs/stage1 --tensor-model-parallel-size 2

Every option is also a key of the YAML files that --config FILE names. --config can be repeated;
later files override earlier ones, and the command line overrides all files. --print_config prints
the whole configuration as YAML instead of training. --check RANKS lists its problems for that many
ranks (without a number: for as many as torchrun starts), looks at the save folder and at what the
run would start from, writes nothing, and exits, with status 2 if there are any problems.

--stage A,B trains several stages in turn, each in a folder of its own in --save and from the
checkpoint of the one before; --for B 'OPTIONS' gives options to one of them."""


def _presets(chosen: Recipe) -> str:
    """Return the recipes, and the stages of the chosen one."""
    recipes = _rows({name: row.description for name, row in RECIPES.items()}, 15)
    stages = _rows({name: row.description for name, row in chosen.stages.items()}, 15)
    return f"""recipes (--recipe NAME):
{recipes}

stages (--stage NAME) of the recipe {chosen.name}:
{stages}"""


def _sizes() -> str:
    """Return the models with their sizes."""
    return f"models:\n{_rows({name: _size(row) for name, row in MODELS.items()}, 23)}"


def _rows(texts: dict[str, str], width: int) -> str:
    return "\n".join(f"  {name:<{width}} {text}" for name, text in texts.items())


def _names(names: Sequence[str]) -> str:
    return textwrap.fill(
        ", ".join(names),
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )


def _size(row: Architecture) -> str:
    vision = row.vision
    language = row.language
    encoder = f"{vision.num_layers} layers of {vision.hidden_size}" if vision.exists else "none"
    return (
        f"vision {encoder}, {vision.image_size} pixels;"
        f" language {language.num_layers} layers of {language.hidden_size}, vocabulary"
        f" {language.vocab_size}"
    )
