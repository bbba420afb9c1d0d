"""Bounds of the frames of videos, as the video processors of Qwen2-VL and Qwen3-VL have them."""

from __future__ import annotations

import ast
import dataclasses
import random
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.image_utils import SizeDict

from megavlm.config.schema import Architecture
from megavlm.config.tiling import UNBOUNDED, VideoPixels
from megavlm.convert.hf import convert, preprocessing, qwen_vl_videos
from megavlm.convert.hf.check_files import check_files
from megavlm.convert.hf.hub_formats import hub_format_of
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.qwen_vl_kinds import QWEN2_VL, QWEN3_VL, Kind
from megavlm.data.images.feature_layout import feature_layout, sizes_in_text
from megavlm.data.images.frame_sampling import show_frames
from megavlm.data.images.native import frame_grid, usual_video_pixels
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.video import Frame, frames_as_images
from megavlm.data.records.record import Turn
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS, load_tokenizer
from tests.convert.hf.test_qwen_vl import load_processor
from tests.convert.part_folders import make_tokenizer
from tests.convert.qwen_vl_models import SMALL, SMALL_2, SMALL_3, kind_of, make_qwen_vl
from tests.data.native_packs import write_native

NAME = "video_preprocessor_config.json"
_OF_ALL = pytest.mark.parametrize("architecture", [SMALL, SMALL_2, SMALL_3], ids=["2.5", "2", "3"])
# In tiles: fewest and most of a frame, then of all.
STATED = VideoPixels(least=64, most=12 * 64, total=45 * 64)


def folder_of(root: Path, architecture: Architecture, settings: dict | None) -> Path:
    """Write a model, with its tokenizer and the settings of its video processor."""
    words = root / "words"
    make_tokenizer(words, IMAGE_TOKEN_SETS["qwen2_vl"].added)
    token = load_tokenizer(words).convert_tokens_to_ids("<|image_pad|>")
    source = make_qwen_vl(root / "hf", architecture, image_token_id=token)
    load_tokenizer(words).save_pretrained(source)
    if settings is not None:
        write_json(source / NAME, settings)
    return source


def usage_of(folder: Path) -> VideoPixels:
    return hub_format_of(folder).read_usage(folder).video


@_OF_ALL
def test_packs_say_what_an_export_makes_of_videos(
    tmp_path: Path, architecture: Architecture
) -> None:
    start = convert.import_(folder_of(tmp_path, architecture, None), tmp_path / "start")
    assert preprocessing.of_checkpoint(start).video == UNBOUNDED
    kind = kind_of(architecture)
    facts = dict(template=kind.template, system_message="", video=STATED)
    packs = write_native(tmp_path / "packs", [((8, 8),)], tile_size=8)
    dataclasses.replace(packs, **facts).write(start)
    out = convert.export(start, tmp_path / "out")
    settings = read_json(out / NAME)
    assert usage_of(out) == STATED
    assert settings["cap_pixels_per_frame"] is True
    assert (settings["do_sample_frames"], settings["fps"]) == (True, 2)
    vision = architecture.vision
    assert settings["image_std"] == list(vision.pixel_std) and settings["merge_size"] == 2
    if kind.is_third:
        assert settings["video_processor_type"] == "Qwen3VLVideoProcessor"
        assert settings["size"] == {"shortest_edge": 64, "longest_edge": 90 * 64}
        assert settings["max_video_tokens"] == 12 and "max_pixels" not in settings
    else:
        assert settings["video_processor_type"] == "Qwen2VLVideoProcessor"
        assert settings["size"] == {"shortest_edge": 64, "longest_edge": 12 * 64}
        assert (settings["min_pixels"], settings["max_pixels"]) == (64, 12 * 64)
        assert settings["max_video_tokens"] == 50  # of which 90% are 45
    assert '{"type": "video", "path": "clip.mp4"}' in (out / "README.md").read_text()
    # Once more, through a checkpoint that was only imported.
    again = convert.import_(out, tmp_path / "again")
    assert preprocessing.of_checkpoint(again).video == STATED
    assert read_json(convert.export(again, tmp_path / "third") / NAME) == settings


@_OF_ALL
@pytest.mark.parametrize("count", [4, 5])
def test_prompts_with_videos_are_those_of_the_processor(
    tmp_path: Path, architecture: Architecture, count: int
) -> None:
    source = folder_of(tmp_path, architecture, None)
    out = convert.export(convert.import_(source, tmp_path / "start"), tmp_path / "out")
    kind = kind_of(architecture)
    places = [7 * number for number in range(count)]
    rate = 7.5
    frames = [Frame(encoded=b"", width=40, height=24, seconds=place / rate) for place in places]
    tiling = Tiling(tile_size=8, mode="native", video=STATED)
    images = frames_as_images(frames, "a.mp4", tiling, with_times=kind.is_third)
    asked = [Turn(role="human", text="see <video>\nwhat is it")]
    turns = show_frames(
        asked, [[frame.seconds for frame in frames]], joined=True, with_times=kind.is_third
    )
    template = ChatTemplate(load_tokenizer(out), 1, name=kind.template)
    tokens = template.prompt(turns, *sizes_in_text(images, feature_layout("native", 1)))
    processor = load_processor(out)
    processor.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    content = [
        {"type": "text", "text": "see "},
        {"type": "video"},
        {"type": "text", "text": "what is it"},
    ]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    pairs = sum(image.tiles > 0 for image in images)
    assert pairs == (count + 1) // 2
    grid = [pairs, 2 * images[0].rows, 2 * images[0].columns]
    metadata = SimpleNamespace(frames_indices=places, fps=rate)
    made = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}
    clip = processor.replace_video_token(made, 0)
    [text], _ = processor.get_text_with_replacements([text], videos_replacements=[clip])
    found = processor.tokenizer(text)["input_ids"]
    assert text.count("<|vision_end|>") == (pairs if kind.is_third else 1)
    assert found.count(processor.video_token_id) == pairs * images[0].tiles
    ours = np.where(tokens == template.context_token_id, processor.video_token_id, tokens)
    assert found == ours.tolist()


_EDGES = {"shortest_edge": 128, "longest_edge": 6400}


@pytest.mark.parametrize(
    ("architecture", "settings", "expected"),
    [
        (SMALL, {}, UNBOUNDED),
        (SMALL, {"max_video_tokens": 70}, UNBOUNDED),
        # 128,000 tokens of 64 pixels, and 90% of them.
        (SMALL, {"size": _EDGES}, VideoPixels(least=128, most=6400, total=7372800)),
        (
            SMALL_2,
            {"min_pixels": 128, "max_pixels": 6400, "max_video_tokens": 20},
            VideoPixels(least=128, most=6400, total=1152),
        ),
        # Without a bound 768 frames have as many each: 384 pairs of 100 tiles, of 42,667 tokens.
        (
            SMALL_2,
            {"size": _EDGES, "cap_pixels_per_frame": False},
            VideoPixels(least=128, most=6400, total=2457619),
        ),
        (SMALL_3, {"size": _EDGES}, VideoPixels(least=128, most=768 * 64, total=3200)),
        (
            SMALL_3,
            {"size": _EDGES, "cap_pixels_per_frame": False},
            VideoPixels(least=128, most=3200, total=3200),
        ),
        (
            SMALL_3,
            {"size": _EDGES, "max_video_tokens": 20},
            VideoPixels(least=128, most=1280, total=3200),
        ),
    ],
)
def test_what_a_folder_states_is_exported_again(
    tmp_path: Path, architecture: Architecture, settings: dict, expected: VideoPixels
) -> None:
    source = folder_of(tmp_path, architecture, settings)
    assert usage_of(source) == expected
    assert not any(part.changes for part in check_files(source))
    out = convert.export(convert.import_(source, tmp_path / "start"), tmp_path / "out")
    assert usage_of(out) == expected
    assert ("size" in read_json(out / NAME)) == (expected != UNBOUNDED)
    # transformers 5 keeps all processors in one file.
    (source / NAME).unlink()
    write_json(source / "processor_config.json", {"video_processor": settings})
    assert usage_of(source) == expected


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"size": 3}, "size is 3, must be an object"),
        ({"size": _EDGES, "max_video_tokens": 0}, "max_video_tokens is 0, must be a whole number"),
        ({"min_pixels": 70, "max_pixels": 69}, "at least 70 pixels and at most 69"),
        ({"size": _EDGES, "cap_pixels_per_frame": 1}, "must be true or false"),
    ],
)
def test_bounds_that_cannot_be_are_refused(tmp_path: Path, settings: dict, told: str) -> None:
    with pytest.raises(ValueError, match=rf"{NAME}: a(.|\n)*{told}"):
        usage_of(folder_of(tmp_path, SMALL, settings))


class _Resizing:
    """In the place of the base class of video processors: returns the size that is asked for."""

    def __init__(self, tokens: int) -> None:
        self.max_video_tokens = tokens

    def resize(self, image: torch.Tensor, size: SizeDict, resample: object) -> tuple[int, int]:
        return size.width, size.height


def processor_of_transformers(kind: Kind) -> Any:
    """Return transformers' own class with nothing but how it resizes: the module that has it cannot
    be imported without torchvision.
    """
    name = f"video_processing_{'qwen3' if kind.is_third else 'qwen2'}_vl"
    folder = Path(find_spec(transformers.__name__).origin).parent / "models" / name[17:]
    tree = ast.parse((folder / f"{name}.py").read_text())
    kept: list[ast.stmt] = ast.parse("from __future__ import annotations; import math").body
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "smart_resize":
            kept.append(node)
        if isinstance(node, ast.ClassDef) and node.name.endswith("VideoProcessor"):
            node.decorator_list = []
            node.bases = [ast.Name("Resizing", ast.Load())]
            node.body = [part for part in node.body if vars(part).get("name") == "resize"]
            node.name = "Processor"
            kept.append(node)
    known = {"Resizing": _Resizing, "SizeDict": SizeDict, "__name__": name}
    code = compile(ast.fix_missing_locations(ast.Module(kept, [])), name, "exec")
    exec(code, known)
    return known["Processor"]


@pytest.mark.parametrize("kind", [QWEN2_VL, QWEN3_VL], ids=["2", "3"])
@pytest.mark.parametrize("tokens", [128_000, 8192, 2048])
def test_frames_get_the_size_that_transformers_gives_them(kind: Kind, tokens: int) -> None:
    tile = 32 if kind.is_third else 28
    video = usual_video_pixels(tile, tokens)
    if kind.is_third:  # whose fewest pixels are those of all frames
        video = dataclasses.replace(video, least=tile**2)
    settings = qwen_vl_videos.bounds_of(video, tile**2, kind)
    processor = processor_of_transformers(kind)(settings["max_video_tokens"])
    size = SizeDict(**settings["size"])
    rng = random.Random(tokens)
    grids = set()
    for _ in range(3000):
        width, height = (int(2 ** rng.uniform(5, 11.5)) for _ in range(2))
        frames = 2 * int(2 ** rng.uniform(0, 8.5))
        clip = torch.empty(1, frames, 3, height, width, device="meta")
        made = processor.resize(clip, size, None, tile, 2, settings["cap_pixels_per_frame"])
        columns, rows = frame_grid(width, height, frames, tile, video)
        assert made == (columns * tile, rows * tile), (width, height, frames)
        grids.add((columns, rows))
    assert len(grids) > 100
