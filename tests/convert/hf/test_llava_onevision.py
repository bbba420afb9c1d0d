"""LLaVA-OneVision models, there and back, and in the hands of transformers."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)

from megavlm.config.connectors import LLAVA
from megavlm.config.recipes.llava_onevision import MODELS, RECIPE
from megavlm.config.schema import Architecture
from megavlm.convert.hf import convert, llava_onevision_config, preprocessing
from megavlm.convert.hf.hub_formats import hub_format_of
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.llava_next_config import pinpoints
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.reference import refuse_other_tiles
from megavlm.convert.hf.reference_videos import with_videos
from megavlm.convert.weights.tables import llava_name_on_disk, rows, unused_rows
from megavlm.data.images.anyres import ONEVISION_GRIDS
from megavlm.data.images.decode import decode_pixels
from megavlm.data.images.feature_layout import feature_layout, sizes_in_text
from megavlm.data.records.record import Turn
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer
from megavlm.planner.flops import pieces
from tests.convert.card import run_example
from tests.convert.llava_next_models import (
    LARGE_SIZES,
    ONEVISION,
    SMALL,
    make_frames,
    make_image,
    make_llava_onevision,
    make_onevision_packs,
)
from tests.convert.models import ids_with
from tests.convert.round_trip import assert_round_trip
from tests.ranks.model_checks import sizes_of

KINDS = {
    "siglip": ONEVISION,
    "siglip with its head": dataclasses.replace(
        ONEVISION,
        vision=dataclasses.replace(ONEVISION.vision, unused_layers=1, unused_head=True),
        language=dataclasses.replace(ONEVISION.language, tied_head=True),
    ),
    "clip": SMALL,
}
# The words of the test's tokenizer are those of a Llama.
SEEING = dataclasses.replace(ONEVISION, language=SMALL.language)


@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_is_bit_identical(tmp_path: Path, words: Path, kind: str) -> None:
    grids = ((3, 2), (1, 2))
    source = make_llava_onevision(tmp_path / "hf", KINDS[kind], grids=grids)
    tensors = assert_round_trip(
        source, tmp_path, words, KINDS[kind], "llava_onevision", llava_name_on_disk
    )
    assert tensors["image_newline"].shape == (48,)
    for found in (
        hub_format_of(tmp_path / "out").read_usage(tmp_path / "out"),
        preprocessing.of_checkpoint(tmp_path / "checkpoint"),
    ):
        assert (found.tiling, found.grids) == ("anyres_max_9", grids)
    assert not any(part.changed for part in convert.check(source))


class _WithoutVideos(LlavaOnevisionProcessor):
    """The processor without the check of its video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> None:
        """Accept every part."""


def load_processor(folder: Path) -> LlavaOnevisionProcessor:
    """Load the processor; without torchvision, which transformers wants for videos alone, put it
    together from the parts that the folder names.
    """
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if find_spec("torchvision"):
        processor = AutoProcessor.from_pretrained(folder)
        processor.image_processor = image_processor
        return processor
    settings = read_json(folder / "processor_config.json")
    assert settings.pop("processor_class") == LlavaOnevisionProcessor.__name__
    template = (folder / "chat_template.jinja").read_text()
    words = AutoTokenizer.from_pretrained(folder)
    return _WithoutVideos(image_processor, words, chat_template=template, **settings)


@pytest.mark.parametrize("architecture", [SEEING, SMALL], ids=["siglip", "clip"])
def test_transformers_loads_an_export_and_its_processor(
    tmp_path: Path,
    words: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    architecture: Architecture,
) -> None:
    source = make_llava_onevision(tmp_path / "hf", architecture)
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    model, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
        out, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()) and model.dtype == torch.float32
    processor = load_processor(out)
    name = hub_format_of(out).read_usage(out).template
    template = ChatTemplate(load_tokenizer(out), architecture.features_per_tile, name=name)
    layout = feature_layout("anyres_max_9", architecture.features_per_tile)
    rng = np.random.default_rng(2)
    side = architecture.vision.image_size
    for sizes in [(size,) for size in LARGE_SIZES] + [LARGE_SIZES[:2]]:
        stored = [make_image(rng, size, side, "anyres_max_9", len(sizes)) for size in sizes]
        pictures = [
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)) for size in sizes
        ]
        content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": "what is it"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(images=[pictures], text=[text], return_tensors="pt")
        turns = [Turn(role="human", text="<image>\n" * len(sizes) + "what is it")]
        tokens = template.prompt(turns, *sizes_in_text(stored, layout))
        context = template.context_token_id
        count = int((inputs["input_ids"] == context).sum())
        assert count == int((tokens == context).sum()) == sum(map(layout.count, stored)), sizes
        assert inputs["pixel_values"].shape[1] == stored[0].tiles
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert made.shape[1] > inputs["input_ids"].shape[1]
    if find_spec("torchvision"):
        assert run_example(out, monkeypatch, capsys)
    with pytest.raises(Exception, match="the tokenizer has no token for videos"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize("video", [-1, 0])
def test_the_token_of_videos_stands_for_nothing_else_in_any_sample(video: int) -> None:
    model = torch.nn.Module()
    model.config = LlavaOnevisionConfig(image_token_index=7, video_token_index=video)
    layout = feature_layout("anyres_max_9", SEEING.features_per_tile)
    frames = make_frames(np.random.default_rng(2), 3, (40, 30))
    features = sum(map(layout.count, frames))
    side = SEEING.vision.image_size
    # The first lacks the token that the second holds.
    for words in ([1, 2], [0, 2]):
        tokens = torch.tensor([[*words, *[7] * features]])
        inputs = {"input_ids": tokens, "pixel_values": torch.zeros(3, 3, side, side)}
        found = with_videos(model, inputs, frames, layout)
        is_video = found["input_ids"] == model.config.video_token_id
        assert torch.equal(is_video, tokens == 7)


@pytest.mark.parametrize("token", ["<video>", "<|video_pad|>"])
def test_transformers_reads_videos_with_an_export_whose_tokenizer_has_a_token_for_them(
    tmp_path: Path, words: Path, token: str
) -> None:
    tokenizer = load_tokenizer(words)
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "words")
    source = make_llava_onevision(tmp_path / "hf", SEEING)
    start = convert.import_(source, tmp_path / "start", tokenizer=tmp_path / "words")
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert read_json(out / "config.json")["video_token_index"] == token_id
    processor = load_processor(out)
    content = [{"type": "video"}, {"type": "text", "text": "what is it"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert text.count(f"{token}\nwhat is it") == 1
    layout = feature_layout("anyres_max_9", SEEING.features_per_tile)
    frames = make_frames(np.random.default_rng(2), 3, (40, 30))
    _, [shown] = sizes_in_text(frames, layout)
    clip = np.stack([decode_pixels(frame.encoded) for frame in frames])
    made = processor.replace_video_token({"pixel_values_videos": clip[None]}, 0)
    assert made == token * shown.features
    if not find_spec("torchvision"):  # without it the class that resizes frames cannot
        return
    inputs = processor(videos=[clip], text=[text], return_tensors="pt")
    assert int((inputs["input_ids"] == token_id).sum()) == shown.features
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(out)
    answer = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vision_aspect_ratio": "anyres_max_4"}, "vision_aspect_ratio is 'anyres_max_4', must be"),
        ({"image_grid_pinpoints": [[16, 24]]}, "must be multiples of vision_config.image_size 18"),
        ({"vision_feature_layer": [-2, -1]}, "must be one layer"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, change: dict, told: str) -> None:
    source = make_llava_onevision(tmp_path / "hf")
    write_json(source / "config.json", read_json(source / "config.json") | change)
    with pytest.raises(ValueError, match=told):
        architecture_from_hf(source)


def test_transformers_is_given_packs_of_its_tiles_alone(tmp_path: Path) -> None:
    packs = make_onevision_packs(tmp_path / "packs", 1, 384, **sizes_of(ONEVISION))
    model = make_llava_onevision(tmp_path / "hf")
    refuse_other_tiles("--data", packs, model)
    other = dataclasses.replace(packs, tiling="anyres")
    with pytest.raises(
        ValueError, match="packs of --tiling anyres --grids .*--tiling anyres_max_9"
    ):
        refuse_other_tiles("--data", other, model)


def test_presets_are_the_published_models() -> None:
    # Parameters of Qwen2 with 152,000 and 152,128 rows: https://huggingface.co/llava-hf.
    widths = {
        "llava-onevision-qwen2-0.5b": 896,
        "llava-onevision-qwen2-7b": 3584,
        "llava-onevision-qwen2-72b": 8192,
    }
    assert widths.keys() == MODELS.keys()
    for name, width in widths.items():
        architecture = MODELS[name]
        count = sum(piece.elements for piece in pieces(architecture) if piece.part == "connector")
        assert count == (1152 + 1) * width + (width + 1) * width + width
        assert architecture.features_per_tile == 729 and architecture.connector == (
            dataclasses.replace(LLAVA, newline=True)
        )
        settings = llava_onevision_config.write(
            architecture, ONEVISION_GRIDS, 151647, ids_with(151646), torch.float16
        )
        with torch.device("meta"):
            model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig.from_dict(settings))
        expected_shapes = {
            llava_name_on_disk(key): tuple(tensor.shape)
            for key, tensor in model.state_dict().items()
        }
        if architecture.language.tied_head:
            del expected_shapes["language_model.lm_head.weight"]
        found = {
            key: shape
            for row in rows(architecture, "llava_onevision")
            for key, shape in zip(row.names, row.part_shapes, strict=True)
        }
        unused = unused_rows(architecture, "llava_onevision")
        found |= {row.names[0]: row.shape for row in unused}
        assert found == expected_shapes, name
    assert LlavaOnevisionConfig().image_grid_pinpoints == pinpoints(ONEVISION_GRIDS, 384)
    found = {name: stage.optimizer.lr for name, stage in RECIPE.stages.items()}
    assert found == {"1": 1e-3, "1.5": 1e-5, "2": 1e-5, "3": 1e-5}
