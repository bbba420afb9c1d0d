"""Models that command lines name: rows of the table, and Hugging Face folders, for which torch is
imported late, since it takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megavlm.config.models import MODELS, architecture, refuse_doubt
from megavlm.config.recipes import RECIPES, recipe_of
from megavlm.config.schema import Architecture, Config, Init
from megavlm.config.tiling import NOTHING_STATED, StatedTiles


def read_model(folder: str, init: Init, default: Architecture | None = None) -> Architecture:
    """Read the architecture of the model in a Hugging Face folder or, if none is named, of the
    model that parts give; ``default`` has what no part says.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: a model that ours is not; every difference is named.
    """
    from megavlm.convert.hf import from_parts

    return from_parts.read_model(folder, init, default)


def recipe_problems(config: Config) -> Iterator[str]:
    """Yield that the folder of a run's model is of a class that another recipe trains: the stages
    are made for another model, and the recipe's exports could not hold this one.
    """
    folder = Path(config.model)
    if not config.model or config.model in MODELS or not (folder / "config.json").is_file():
        return
    from megavlm.convert.hf import hub_formats, json_files, vision_part

    if config.init.language and vision_part.is_encoder(config.model):
        return
    kind = json_files.read_config(folder / json_files.FILE_NAME).get("model_type")
    rows = hub_formats.HUB_FORMATS.items()
    of_kind = {recipe_of(dialect).name for dialect, row in rows if row.model_type == kind}
    if of_kind and config.recipe not in of_kind:
        yield (
            f"--recipe {config.recipe}: --model {config.model} is another model, of model_type"
            f" {kind!r} in its config.json; use --recipe {' or '.join(sorted(of_kind))}"
        )


def image_model(name: str | None) -> Architecture:
    """Return what packs must know of a model: a row of the table, the model that a recipe is known
    for, the folder of a whole model or of a vision encoder; InternVL 2.5's if unnamed.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: there is no such model, or it is one that ours is not; every difference is
            named.
    """

    def read(folder: str, init: Init, default: Architecture | None) -> Architecture:
        from megavlm.convert.hf import from_parts

        return from_parts.image_model(folder, init)

    if not name:
        return Architecture()
    of_recipe = RECIPES[name].architecture if name in RECIPES else None
    if of_recipe is None:
        return architecture(name, read_model=read)
    refuse_doubt(name)
    return of_recipe


def stated_tiles(name: str | None) -> StatedTiles:
    """Return what the folder of a model states of its tiles: a LLaVA-NeXT of its grids, a Qwen2-VL
    of the pixels of its images and of frames of videos; nothing for any other name. Errors are
    those of ``image_model``.
    """
    if not name or name in RECIPES or name in MODELS or not Path(name).is_dir():
        return NOTHING_STATED
    from megavlm.convert.hf import hub_formats, json_files, vision_part

    if vision_part.is_encoder(name):
        return NOTHING_STATED
    usage = hub_formats.hub_format_of(name).read_usage(Path(name))
    pixels = (usage.min_pixels, usage.max_pixels) if usage.tiling == "native" else None
    file = json_files.image_processor_file(Path(name))
    return StatedTiles(
        grids=usage.grids,
        pixels=pixels,
        video=usage.video,
        file=str(file) if file.is_file() else name,
    )
