"""How image processors make one tile of an image is read as transformers does it, or refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, PaliGemmaConfig

from megavlm.config.vision import PIXELS, RESAMPLES
from megavlm.convert.hf import one_tile
from megavlm.convert.hf.hub_formats import HUB_FORMATS
from megavlm.convert.hf.json_files import class_of_transformers, pixel_fields, write_json
from megavlm.convert.hf.limits import limits
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.preprocessing import Usage
from megavlm.data.images.tiling import pad_colour
from megavlm.data.images.transforms import decode_changed
from tests.convert.fuyu_models import make_fuyu

SIDE = 16
LLAVA = ("Llava", "LlavaNext", "LlavaOnevision")
SQUARE = {"height": SIDE, "width": SIDE}
EDGE = {"shortest_edge": SIDE}
MEAN = (0.25, 0.5, 0.75)
STD = (0.5, 0.25, 0.5)
CROPPED = {"size": EDGE, "crop_size": SQUARE}
OLD = {"size": SIDE, "crop_size": SIDE}


def as_file(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an image processor of a kind."""
    pixels = {"image_mean": list(MEAN), "image_std": list(STD)}
    return {"image_processor_type": f"{kind}ImageProcessor", **pixels, **settings}


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("kind", "settings", "tiling"),
    [
        ("CLIP", CROPPED, "crop"),
        ("CLIP", OLD, "crop"),
        ("CLIP", {"size": SQUARE, "crop_size": SQUARE}, "stretch"),
        ("CLIP", {"size": SQUARE, "do_center_crop": False}, "stretch"),
        ("CLIP", CROPPED | {"do_pad": True}, "crop"),
        ("Siglip", {"size": SQUARE}, "stretch"),
        ("Siglip", CROPPED | {"do_center_crop": True}, "crop"),
        ("Blip", {"size": SQUARE}, "stretch"),
        ("Blip", OLD | {"do_center_crop": True}, "stretch"),
        ("CLIP", {"size": SQUARE, "do_center_crop": None}, "stretch"),
        ("Llava", CROPPED | {"do_pad": True}, "pad"),
    ],
)
def test_tiles_are_those_of_transformers(
    tmp_path: Path, resample: str, name: str, kind: str, settings: dict[str, Any], tiling: str
) -> None:
    found = as_file(kind, settings | {"resample": RESAMPLES[resample]})
    inside = name == "processor_config.json"
    write_json(tmp_path / name, {"image_processor": found} if inside else found)
    assert one_tile.read_tiling(tmp_path, "") == tiling
    pixels = pixel_fields(tmp_path)
    assert pixels == dict(pixel_mean=MEAN, pixel_std=STD, resample=resample)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (25, 41, 3), np.uint8))
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    seen = theirs(image, return_tensors="pt")["pixel_values"][0]
    file = io.BytesIO()
    image.save(file, "PNG")
    shape = dict(pad_colour=pad_colour(tiling, MEAN), crops=tiling == "crop", resample=resample)
    [tile] = decode_changed(file.getvalue(), 1, 1, SIDE, False, **shape)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert ((torch.from_numpy(tile) / 255 - mean) / std - seen).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"size": {"shortest_edge": 18}, "crop_size": SQUARE}, "must be the same"),
        ({"size": EDGE, "do_center_crop": False}, "images would not become squares"),
        ({"size": EDGE, "do_center_crop": None}, "images would not become squares"),
        ({"size": SIDE, "do_center_crop": False}, "images would not become squares"),
        ({"crop_size": SQUARE}, "size is missing beside crop_size"),
        ({"size": EDGE}, "crop_size is missing beside size"),
        ({"size": {"height": 16, "width": 18}}, "must be a square"),
        ({"size": {"longest_edge": 16}}, "must have height and width, or shortest_edge"),
        ({"size": {"shortest_edge": "x"}}, "size.shortest_edge is 'x'"),
        ({"size": [16, 16]}, r"size.shortest_edge is \[16, 16\], must be a whole number"),
        ({"do_center_crop": "no"}, "do_center_crop is 'no', must be true or false"),
    ],
)
def test_other_squares_are_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    write_json(tmp_path / "preprocessor_config.json", as_file("CLIP", settings))
    with pytest.raises(ValueError, match=f"preprocessor_config.json.*\n.*{told}"):
        one_tile.read_tiling(tmp_path, "")


@pytest.mark.parametrize(
    ("dialect", "usual"),
    [
        ("clip", "crop"),
        ("siglip", "stretch"),
        ("internvl_c", "stretch"),
        ("paligemma", "stretch"),
        ("blip2", "stretch"),
        ("blip2_retrieval", "stretch"),
        ("instructblip", "stretch"),
    ],
)
def test_formats_of_one_tile_read_their_image_processor(
    tmp_path: Path, dialect: str, usual: str
) -> None:
    read = HUB_FORMATS[dialect].read_usage
    assert read(tmp_path).tiling == usual
    settings = {"size": SQUARE, "do_center_crop": False} if usual == "crop" else CROPPED
    write_json(tmp_path / "preprocessor_config.json", as_file("CLIP", settings))
    assert read(tmp_path).tiling == {"crop": "stretch", "stretch": "crop"}[usual]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"resample": 0}, r"resample is 0, must be 2 \(bilinear\) or 3 \(bicubic\)"),
        ({"do_resize": False}, "do_resize is False, must be True"),
        ({"do_resize": None}, "do_resize is None, must be True"),
        ({"do_rescale": None}, "do_rescale is None, must be True"),
        ({"do_normalize": None}, "do_normalize is None, must be True"),
    ],
)
def test_other_resizing_is_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    write_json(tmp_path / "preprocessor_config.json", settings)
    with pytest.raises(ValueError, match=f"preprocessor_config.json.*\n.*{told}"):
        pixel_fields(tmp_path)


def test_a_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    source = make_fuyu(tmp_path)
    for settings, told in (
        ({"resample": 3}, "resample is 3, must be 2 .bilinear., as images are resized"),
        ({"patch_size": {"height": 7, "width": 7}}, "patch_size is .* must be .*height.: 6"),
        ({"padding_value": 0.0}, "padding_value is 0.0, must be 1.0"),
    ):
        write_json(source / "preprocessor_config.json", settings)
        with pytest.raises(ValueError, match=told):
            architecture_from_hf(source)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 14, "width": 14}},
        {"size": {"shortest_edge": 14}},
        {"size": 14},
        {"size": [SIDE, SIDE]},
        {"image_size": 14},
        {"size": EDGE, "crop_size": {"height": 14, "width": 14}},
    ],
)
def test_tiles_of_another_side_than_the_models_are_refused(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    write_json(tmp_path / "preprocessor_config.json", settings)
    *_, name = settings
    told = rf"preprocessor_config.json.*\n.*{name} is .*must be that of tiles, image_size {SIDE}"
    with pytest.raises(ValueError, match=told):
        pixel_fields(tmp_path, side=SIDE)
    pixel_fields(tmp_path)
    right = {"size": EDGE, "crop_size": {"height": 14, "width": 14}, "do_center_crop": False}
    write_json(tmp_path / "preprocessor_config.json", right)
    pixel_fields(tmp_path, side=SIDE)


@pytest.mark.parametrize("kind", ["CLIP", *LLAVA, "Blip", "GotOcr2", "Idefics", "Siglip", "Fuyu"])
def test_colours_that_are_not_stated_are_those_of_the_class(tmp_path: Path, kind: str) -> None:
    for name in (f"{kind}ImageProcessor", f"{kind}ImageProcessorFast"):
        write_json(tmp_path / "preprocessor_config.json", {"image_processor_type": name})
        found = pixel_fields(tmp_path)
        theirs = class_of_transformers(f"{kind}ImageProcessor")()
        for field, colours in (("mean", theirs.image_mean), ("std", theirs.image_std)):
            expected = np.broadcast_to(colours, 3)
            assert found[f"pixel_{field}"] == pytest.approx(tuple(expected), abs=1e-8)


def test_a_paligemma_without_an_image_processor_has_the_pixels_of_siglip(tmp_path: Path) -> None:
    settings = PaliGemmaConfig(image_token_index=7).to_dict()
    write_json(tmp_path / "config.json", settings)
    vision = architecture_from_hf(tmp_path).vision
    assert (vision.pixel_mean, vision.pixel_std) == PIXELS["siglip"]


GRID = Usage(thumbnail=False)


@pytest.mark.parametrize(
    ("dialect", "usage", "told"),
    [
        ("native", Usage(), ""),
        ("native", GRID, "adds a thumbnail"),
        ("native", Usage(thumbnail=False, max_tiles=1), ""),
        ("native", Usage(tiling="pad"), "training padded them"),
        ("native", Usage(tiling="crop"), "training took the square in their middle"),
        ("chat", GRID, ""),
        ("chat", Usage(tiling="pad"), ""),
        ("chat", Usage(tiling="crop"), "It stretches images"),
        ("paligemma", Usage(), "makes one tile of an image; training made up to 12"),
        ("paligemma", Usage(tiling="crop"), ""),
        ("clip", Usage(max_tiles=1), ""),
        ("idefics", Usage(tiling="pad"), "training padded them"),
        ("llava_next", Usage(tiling="crop"), "also makes a grid of tiles; training made one tile"),
        ("llava_next", Usage(tiling="anyres"), ""),
        (
            "llava_onevision",
            Usage(tiling="anyres", grids=((1, 2),)),
            "also makes a grid of tiles; training made other tiles",
        ),
        ("llava_onevision", Usage(tiling="anyres_max_9"), ""),
        ("fuyu", Usage(tiling="patches"), ""),
        ("qwen2_vl", Usage(tiling="native"), ""),
        ("qwen3_vl", Usage(tiling="native"), ""),
        ("qwen3_vl_moe", Usage(tiling="pad"), "to whole tiles, as many as are near its size; tr"),
        ("qwen2_5_vl", Usage(tiling="stretch"), "to whole tiles, as many as are near its size; tr"),
    ],
)
def test_a_card_tells_what_an_image_processor_does_otherwise(
    dialect: str, usage: Usage, told: str
) -> None:
    found = list(limits(usage, dialect))
    assert len(found) == bool(told) and told in "".join(found)
