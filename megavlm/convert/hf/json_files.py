"""JSON files of Hugging Face folders, and the facts that every dialect finds in the same places."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megavlm.config.vision import PIXELS, RESAMPLES

FILE_NAME = "config.json"
IMAGE_PROCESSOR_NAME = "preprocessor_config.json"
VIDEO_PROCESSOR_NAME = "video_preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"
# Sizes of a transformer, as most files of Hugging Face call them.
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
# Masks of transformers 5 let tokens see later ones if config.json says so.
CAUSAL = {"is_causal": True}
NORMS = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}
_CLASS_NAMES = ("image_processor_type", "feature_extractor_type")
_CLASS_ENDS = re.compile(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$")
# By classes of image processors: the row of ``PIXELS`` that they have by default.
_PIXELS_OF = {
    **dict.fromkeys(("CLIP", "Blip", "GotOcr2", "Idefics"), "clip"),
    **dict.fromkeys(("Llava", "LlavaNext", "LlavaOnevision", "Qwen2VL"), "clip"),
    **dict.fromkeys(("Siglip", "Fuyu"), "siglip"),
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json; errors as of ``read_json``."""
    content = read_json(path)
    wrong = [*no_texts("", content, "model_type")]
    classes = content.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        wrong.append(f"architectures is {classes!r}, must be a list of names of classes")
    refuse(path, wrong)
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as Hugging Face lays it out."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def class_of_transformers(name: str) -> Any:
    """Return a class of transformers, which takes a second to import: a run that reads and writes
    none of its folders is spared that.
    """
    import transformers

    return getattr(transformers, name)


def complete(form: str, raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return settings with what the file leaves out, as a class of transformers has it.

    Args:
        form: name of the class.
        raw: content of the file.
        path: of the file.

    Raises:
        ValueError: the class refuses them.
    """
    kind = class_of_transformers(form)
    try:
        return kind.from_dict(raw).to_dict()
    except Exception as error:  # transformers' checks raise errors of many kinds
        raise ValueError(
            f"{path}: transformers cannot read it: {' '.join(str(error).split()):.300}"
        ) from None


def read_complete(path: Path) -> dict[str, Any]:
    """Read a config.json with what it leaves out, if transformers has the class; errors as of
    ``read_config`` and ``complete``.
    """
    return completed(read_config(path), path)


def completed(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return settings, or those of a part, with what the file leaves out, if transformers has the
    class that ``model_type`` names; errors as of ``complete``.
    """
    classes = class_of_transformers("CONFIG_MAPPING")
    kind = raw.get("model_type")
    return complete(classes[kind].__name__, raw, path) if kind in classes else raw


def named(section: str, name: str) -> str:
    """Return what a setting is called in messages; the file itself is the section ``""``."""
    return f"{section}.{name}".lstrip(".")


def is_whole_model(raw: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is that of a vision-language model, and not of a part of one."""
    return "vision_config" in raw


def name_of(value: Any, names: Mapping[str, Any]) -> str:
    """Return what files call one of our values, from a table of ours by theirs."""
    return next(name for name, ours in names.items() if ours == value)


def contradictions(
    section: str, found: Mapping[str, Any], fixed: Mapping[str, Any]
) -> Iterator[str]:
    """Yield settings that differ from the one value that our model supports."""
    for name, value in fixed.items():
        if name in found and found[name] != value:
            yield f"{named(section, name)} is {found[name]!r}, must be {value!r}"


def missing(section: str, found: Mapping[str, Any], *names: str) -> Iterator[str]:
    """Yield settings that the file lacks."""
    return (f"{named(section, name)} is missing" for name in names if found.get(name) is None)


def needed_sizes(section: str, found: Mapping[str, Any], *names: str) -> Iterator[str]:
    """Yield settings that the file lacks, and those that are no whole numbers of at least 1."""
    yield from missing(section, found, *names)
    yield from no_sizes(section, found, *names)


def no_sizes(section: str, found: Mapping[str, Any], *names: str, least: int = 1) -> Iterator[str]:
    """Yield settings that are stated and no whole numbers of at least ``least``."""
    for name in names:
        value = found.get(name)
        if value is not None and (type(value) is not int or value < least):
            yield (
                f"{named(section, name)} is {value!r}, must be a whole number of at least {least}"
            )


def no_positive_numbers(section: str, found: Mapping[str, Any], *names: str) -> Iterator[str]:
    """Yield settings that are stated and no numbers above 0."""
    for name in names:
        value = found.get(name)
        if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            yield f"{named(section, name)} is {value!r}, must be a number above 0"


def no_flags(section: str, found: Mapping[str, Any], *names: str) -> Iterator[str]:
    """Yield settings that are stated and neither true nor false."""
    for name in names:
        if not isinstance(found.get(name), bool | None):
            yield f"{named(section, name)} is {found[name]!r}, must be true or false"


def layer_types(count: int) -> list[str]:
    """Return the kinds of attention of all layers, if every other has a sliding window."""
    return [("sliding_attention", "full_attention")[number % 2] for number in range(count)]


def layer_type_problems(section: str, found: Mapping[str, Any]) -> Iterator[str]:
    """Yield that other layers than every other one have a sliding window, if the file says so."""
    kinds = found.get("layer_types")
    if kinds is not None and kinds != layer_types(found.get("num_hidden_layers") or len(kinds)):
        yield (
            f"{named(section, 'layer_types')} are not sliding_attention and full_attention by"
            " turns, one for each of num_hidden_layers, which all models of the family have"
        )


def no_texts(section: str, found: Mapping[str, Any], *names: str) -> Iterator[str]:
    """Yield settings that are stated and no text."""
    for name in names:
        if not isinstance(found.get(name), str | None):
            yield f"{named(section, name)} is {found[name]!r}, must be text"


def rotary_problems(section: str, found: Mapping[str, Any]) -> Iterator[str]:
    """Yield why the settings of rotary positions cannot be read."""
    yield from no_positive_numbers(section, found, "rope_theta", "partial_rotary_factor")
    for name in ("rope_parameters", "rope_scaling"):
        scaling = found.get(name)
        if isinstance(scaling, Mapping):
            numbers = ("rope_theta", "factor", "partial_rotary_factor")
            yield from no_positive_numbers(named(section, name), scaling, *numbers)
        elif scaling is not None:
            yield f"{named(section, name)} is {scaling!r}, must be an object"


def group_problems(section: str, found: Mapping[str, Any]) -> Iterator[str]:
    """Yield that query heads do not divide over the key-value heads, if the file states these."""
    heads = found["num_attention_heads"]
    groups = found.get("num_key_value_heads") or heads
    if heads % groups:
        yield (
            f"{named(section, 'num_attention_heads')} is {heads}, must be a multiple of"
            f" num_key_value_heads {groups}"
        )


def compressed_rotary_problems(section: str, scaling: Mapping[str, Any]) -> Iterator[str]:
    """Yield that rotary positions are stretched by less than 1, or by a number that is not told.

    Args:
        section: name of the language model's settings.
        scaling: settings of rotary positions of a type that stretches them.
    """
    name = named(section, "rope_scaling")
    yield from missing(name, scaling, "factor")
    factor = scaling.get("factor")
    if factor is not None and factor < 1:
        yield f"{named(name, 'factor')} is {factor}, must be at least 1"


def rotary_settings(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of rotary positions as transformers 5 or 4 calls them; empty if there
    are none.
    """
    return found.get("rope_parameters") or found.get("rope_scaling") or {}


def refuse(path: Path, wrong: list[str]) -> None:
    """Raise ValueError where anything is wrong with a model's settings."""
    if wrong:
        listed = "\n  ".join(wrong)
        raise ValueError(
            f"{path}: a model of another kind than those that can be trained here:\n  {listed}"
        )


def image_processor_file(folder: Path) -> Path:
    """Return the file that holds the settings of a folder's image processor, if there is one."""
    own = folder / IMAGE_PROCESSOR_NAME
    # transformers 5 keeps the image processor in the other one
    return own if own.is_file() else folder / PROCESSOR_NAME


def image_processor(folder: Path) -> dict[str, Any]:
    """Read the settings of the image processor; an empty mapping if the folder has none.

    Raises:
        ValueError: they are no object.
    """
    path = image_processor_file(folder)
    found = read_json(path) if path.is_file() else {}
    if path.name == PROCESSOR_NAME:
        found = found.get("image_processor", {})
    if not isinstance(found, dict):
        raise ValueError(f"{path}: image_processor is {found!r}, must be an object")
    refuse(path, list(no_texts("", found, *_CLASS_NAMES)))
    return found


def class_of_image_processor(found: Mapping[str, Any]) -> str:
    """Return the class of an image processor that its settings name, if they do."""
    return next((found[name] for name in _CLASS_NAMES if found.get(name)), "")


def normalisation(
    folder: Path, usual: tuple[tuple[float, ...], tuple[float, ...]] = PIXELS["imagenet"]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels; if the folder does not say, those of the class that it
    names, or else ``usual``.

    Raises:
        ValueError: the folder says what cannot be one, or that pixels are not normalised.
    """
    found = image_processor(folder)
    path = image_processor_file(folder)
    refuse(path, list(_other_scaling(found)))
    kind = _CLASS_ENDS.sub("", class_of_image_processor(found))
    mean, std = PIXELS[_PIXELS_OF[kind]] if kind in _PIXELS_OF else usual
    return (
        _of_colours(path, "image_mean", found.get("image_mean", mean)),
        _of_colours(path, "image_std", found.get("image_std", std)),
    )


def pixel_fields(
    folder: Path,
    usual: tuple[tuple[float, ...], tuple[float, ...]] = PIXELS["imagenet"],
    side: int | None = None,
) -> dict[str, Any]:
    """Return the fields of ``Vision`` that say how images are resized and normalised: ``usual``,
    and bicubic, if the folder says nothing.

    Args:
        folder: of the model.
        usual: mean and standard deviation.
        side: of the model's tiles in pixels, if its class of transformers reads no others.

    Raises:
        ValueError: as of ``normalisation``, or images are not resized, or neither way, or to
            another side.
    """
    mean, std = normalisation(folder, usual)
    settings = image_processor(folder)
    number = settings.get("resample")
    wrong = [*other_resizing(settings, *RESAMPLES)]
    if side is not None:
        wrong += _other_sides(settings, side)
    refuse(image_processor_file(folder), wrong)
    found = [name for name, known in RESAMPLES.items() if known == number]
    return dict(pixel_mean=mean, pixel_std=std, resample=found[0] if found else "bicubic")


def other_resizing(found: Mapping[str, Any], *names: str) -> Iterator[str]:
    """Yield settings by which an image processor resizes images otherwise than in one of the named
    ways.
    """
    if not found.get("do_resize", True):
        yield f"do_resize is {found['do_resize']}, must be True"
    resample = found.get("resample")
    if resample is not None and resample not in [RESAMPLES[name] for name in names]:
        ways = " or ".join(f"{RESAMPLES[name]} ({name})" for name in names)
        yield (
            f"resample is {resample!r}, must be {ways}, as images are resized here; change the file"
            " to use the model so"
        )


def _other_sides(found: Mapping[str, Any], side: int) -> Iterator[str]:
    """Yield sizes of an image processor whose tiles have another side than the model's."""
    crops = found.get("do_center_crop", True)
    for name in ("size", "image_size", *(("crop_size",) if crops else ())):
        size = found.get(name)
        sides = size.values() if isinstance(size, Mapping) else (size,)
        if any(each not in (None, side) for each in sides):
            yield f"{name} is {size!r}, must be that of tiles, image_size {side} of {FILE_NAME}"


def _other_scaling(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings of an image processor that scales pixels otherwise than to 0 to 1, and then by
    mean and standard deviation.
    """
    for name in ("do_rescale", "do_normalize"):
        if found.get(name, True) is not True:
            yield f"{name} is {found[name]!r}, must be True"
    factor = found.get("rescale_factor")
    if factor is not None and (
        type(factor) not in (int, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6)
    ):
        yield f"rescale_factor is {factor!r}, must be 1 / 255"


def _of_colours(path: Path, name: str, found: Any) -> tuple[float, ...]:
    """Return a value for each of red, green and blue, of one for all or three."""
    values = tuple(found) if isinstance(found, Sequence) else (found,) * 3
    if len(values) != 3 or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{path}: {name} is {found!r}, must be a number or three")
    return tuple(map(float, values))


def whole_inverse(ratio: float) -> int:
    """Patches along a side that become one feature; 0 where they are no whole number."""
    if ratio <= 0:
        return 0
    factor = 1 / ratio
    return round(factor) if factor == round(factor) else 0
