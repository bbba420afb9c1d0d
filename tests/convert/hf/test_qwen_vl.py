"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL models, there and back, and in the hands of transformers."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedModel

from megavlm.config.recipes import RECIPES
from megavlm.config.schema import Architecture, Config, Init, Training
from megavlm.convert.hf import convert, from_parts, preprocessing, qwen_vl_config
from megavlm.convert.hf.hub_formats import hub_format_of
from megavlm.convert.hf.json_files import read_json, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.weights.tables import qwen_vl_name_on_disk, rows
from megavlm.data.images.native import QWEN2_VL_PIXELS, native_grid
from megavlm.data.records.record import Turn
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS, load_tokenizer
from tests.convert.card import counted_parts, run_example
from tests.convert.models import ids_with, load_all
from tests.convert.part_folders import make_language, make_tokenizer
from tests.convert.qwen_vl_models import (
    KINDS,
    MARKS,
    SMALL,
    SMALL_2,
    SMALL_3,
    SMALL_3_MOE,
    kind_of,
    make_qwen_vl,
    refuse,
)
from tests.convert.round_trip import assert_round_trip
from tests.data.native_packs import write_native

_OF_ALL = pytest.mark.parametrize(
    "architecture", [SMALL, SMALL_2, SMALL_3, SMALL_3_MOE], ids=["2.5", "2", "3", "experts"]
)
# A wide one, a tall one, a square one, one that is made smaller and one that is made larger.
SIZES = ((90, 30), (20, 75), (48, 48), (300, 200), (5, 9))
BOUNDS = (1024, 8192)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    make_tokenizer(folder, IMAGE_TOKEN_SETS["qwen2_vl"].added)
    return folder


def image_token(words: Path) -> int:
    return load_tokenizer(words).convert_tokens_to_ids("<|image_pad|>")


def load(folder: Path) -> PreTrainedModel:
    """Load a folder in its class, and see that no weight was missing or left over."""
    form: Any = getattr(transformers, hub_format_of(folder).class_name)
    model, info = form.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info.values())
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_is_bit_identical(tmp_path: Path, words: Path, kind: str) -> None:
    architecture = KINDS[kind]
    source = make_qwen_vl(tmp_path / "hf", architecture, image_token_id=image_token(words))
    bound(source)
    recipe = architecture.vision.family
    template = kind_of(architecture).template
    tensors = assert_round_trip(source, tmp_path, words, architecture, recipe)
    assert ("lm_head.weight" in tensors) != architecture.language.tied_head
    for found in (
        hub_format_of(tmp_path / "out").read_usage(tmp_path / "out"),
        preprocessing.of_checkpoint(tmp_path / "checkpoint"),
    ):
        assert (found.template, found.tiling) == (template, "native")
        assert (found.min_pixels, found.max_pixels) == BOUNDS
    assert not any(part.changed for part in convert.check(source))


def bound(folder: Path) -> None:
    """Write bounds of the pixels of images into a folder."""
    path = folder / "preprocessor_config.json"
    size = {"shortest_edge": BOUNDS[0], "longest_edge": BOUNDS[1]}
    write_json(path, read_json(path) | {"size": size})


@pytest.mark.parametrize("architecture", [SMALL, SMALL_2], ids=["2.5", "2"])
def test_names_as_transformers_has_them_in_memory_are_read(
    tmp_path: Path, architecture: Architecture
) -> None:
    source = make_qwen_vl(tmp_path / "hf", architecture)
    weights = load_file(source / "model.safetensors")
    model = load(source)
    assert {qwen_vl_name_on_disk(name) for name in model.state_dict()} == weights.keys()
    inside = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert inside.keys().isdisjoint(weights.keys() - {"lm_head.weight"})
    save_file(inside, source / "model.safetensors", {"format": "pt"})
    assert architecture_from_hf(source) == architecture
    assert not any(part.changed for part in convert.check(source))


@pytest.mark.parametrize("architecture", [SMALL, SMALL_2], ids=["2.5", "2"])
def test_a_flat_config_as_published_is_read(tmp_path: Path, architecture: Architecture) -> None:
    source = make_qwen_vl(tmp_path / "hf", architecture)
    settings = read_json(source / "config.json")
    text = settings.pop("text_config")
    rotary = text.pop("rope_parameters")
    for name in ("layer_types", "model_type"):
        del text[name]
    sections = {"type": "mrope", "mrope_section": rotary["mrope_section"]}
    text |= {"rope_theta": rotary["rope_theta"], "rope_scaling": sections}
    vision = settings["vision_config"]
    vision["in_chans"] = vision.pop("in_channels")
    for name in ("rope_parameters", "hidden_act", "temporal_patch_size", "spatial_merge_size"):
        del vision[name]  # as some published ones leave them out
    write_json(source / "config.json", settings | text | {"vision_config": vision})
    assert architecture_from_hf(source) == architecture


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_and_writes_the_same_settings(tmp_path: Path, kind: str) -> None:
    architecture = KINDS[kind]
    row = kind_of(architecture)
    ours = qwen_vl_config.write(row, architecture, MARKS, ids_with(7), torch.bfloat16)
    getattr(transformers, row.form).from_dict(ours).save_pretrained(tmp_path)
    theirs = read_json(tmp_path / "config.json")
    if architecture.language.num_experts:
        theirs["text_config"]["num_experts"] = theirs["text_config"].pop("num_local_experts")
    pixels = {"image_mean": list(architecture.vision.pixel_mean), "image_std": [0.5, 0.5, 0.5]}
    write_json(tmp_path / "preprocessor_config.json", pixels)
    found = architecture_from_hf(tmp_path)
    vision = dataclasses.replace(found.vision, pixel_std=architecture.vision.pixel_std)
    assert dataclasses.replace(found, vision=vision) == architecture
    # The one is for transformers 4; rope_parameters has it too.
    for name in ("rope_theta", "rope_scaling"):
        del ours["text_config"][name]
    for section in ("vision_config", "text_config"):
        inside = ours.pop(section)
        assert inside == {name: theirs[section].get(name) for name in inside}
    assert ours == {name: theirs.get(name) for name in ours}


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("vision_config", {"in_channels": 4}, "vision_config.in_channels is 4, must be 3"),
        ("vision_config", {"out_hidden_size": 40}, "out_hidden_size is 40, must be that of the"),
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu', must be one of silu"),
        ("vision_config", {"num_heads": 4}, "hidden_size is 24, must be a multiple of 4 num_heads"),
        ("vision_config", {"window_size": 7}, "window_size is 7, must be at least a tile, 8"),
        ("vision_config", {"patch_size": 0}, "patch_size is 0, must be a whole number"),
        (
            "vision_config",
            {"rope_parameters": {"rope_type": "axial", "rope_theta": 5e3}},
            "rope_parameters.rope_theta is 5000.0, must be 10000.0",
        ),
        ("text_config", {"use_sliding_window": True}, "use_sliding_window is True, must be False"),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2]}},
            r"mrope_section is \[2, 2\], must be three whole numbers",
        ),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_parameters.rope_type is 'dynamic', must be 'default'",
        ),
    ],
)
def test_other_models_are_refused(tmp_path: Path, section: str, change: dict, told: str) -> None:
    refuse(tmp_path / "hf", SMALL, section, change, told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"merge_size": 1}, "merge_size is 1, must be 2, as in config.json"),
        ({"patch_size": 14}, "patch_size is 14, must be 4, as in config.json"),
        ({"do_resize": False}, "do_resize is False, must be True"),
        ({"min_pixels": 100, "max_pixels": 50}, "at least 100 pixels and at most 50"),
        ({"size": {"longest_edge": "a"}}, "size.longest_edge is 'a', must be a whole number"),
        ({"size": 384}, "size is 384, must be an object"),
    ],
)
def test_other_images_are_refused(tmp_path: Path, change: dict, told: str) -> None:
    source = make_qwen_vl(tmp_path / "hf", SMALL)
    write_json(source / "preprocessor_config.json", change)
    with pytest.raises(ValueError, match=told):
        architecture_from_hf(source)


def test_bounds_of_the_pixels_are_read_by_their_former_names(tmp_path: Path) -> None:
    source = make_qwen_vl(tmp_path / "hf", SMALL_2)
    usage = hub_format_of(source).read_usage(source)
    assert (usage.min_pixels, usage.max_pixels) == QWEN2_VL_PIXELS
    write_json(source / "preprocessor_config.json", {"min_pixels": 99, "max_pixels": 12845056})
    usage = hub_format_of(source).read_usage(source)
    assert (usage.min_pixels, usage.max_pixels) == (99, 12845056)


def test_an_export_has_the_bounds_of_its_packs(tmp_path: Path, words: Path) -> None:
    source = make_qwen_vl(tmp_path / "hf", SMALL, image_token_id=image_token(words))
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    manifest = write_native(tmp_path / "packs", [((8, 8),)], tile_size=SMALL.vision.image_size)
    least, most = BOUNDS
    facts = dict(template="qwen2_vl", system_message="", min_pixels=least, max_pixels=most)
    dataclasses.replace(manifest, **facts).write(start)
    out = convert.export(start, tmp_path / "out")
    settings = read_json(out / "preprocessor_config.json")
    assert settings["size"] == {"shortest_edge": least, "longest_edge": most}
    assert (settings["min_pixels"], settings["max_pixels"]) == BOUNDS
    assert hub_format_of(out).read_usage(out).max_pixels == most


def load_processor(folder: Path) -> Any:
    """Load the processor; without torchvision, which transformers wants for videos alone, put it
    together from the parts that the folder names.
    """
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if find_spec("torchvision"):
        processor = AutoProcessor.from_pretrained(folder)
        processor.image_processor = image_processor
        return processor
    form = getattr(transformers, read_json(folder / "processor_config.json")["processor_class"])

    class WithoutVideos(form):
        """The processor without the check of its video processor."""

        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> None:
            """Accept every part."""

    template = (folder / "chat_template.jinja").read_text()
    words = AutoTokenizer.from_pretrained(folder)
    return WithoutVideos(image_processor, words, chat_template=template)


@_OF_ALL
def test_transformers_loads_an_export_and_its_processor(
    tmp_path: Path,
    words: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    architecture: Architecture,
) -> None:
    source = make_qwen_vl(tmp_path / "hf", architecture, image_token_id=image_token(words))
    bound(source)
    start = convert.import_(source, tmp_path / "start", tokenizer=words)
    out = convert.export(start, tmp_path / "out", dtype=torch.float32)
    model = load(out)
    assert model.dtype == torch.float32
    expected = load(source).float().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    known = load_tokenizer(out).get_vocab()
    for name, token in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        assert getattr(model.config, name) == known[token]
    assert model.generation_config.eos_token_id == known["<|im_end|>"]
    processor = load_processor(out)
    template = ChatTemplate(load_tokenizer(out), 1, name=kind_of(architecture).template)
    side = architecture.vision.image_size
    for size in SIZES:
        columns, rows = native_grid(*size, side, *BOUNDS)
        picture = Image.fromarray(np.full((size[1], size[0], 3), 99, np.uint8))
        content = [{"type": "image"}, {"type": "text", "text": "what is it"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(images=[picture], text=[text], return_tensors="pt")
        asked = template.prompt([Turn(role="human", text="<image>\nwhat is it")], [columns * rows])
        assert inputs["input_ids"][0].tolist() == asked.tolist(), size
        grid = architecture.vision.grid
        assert inputs["image_grid_thw"].tolist() == [[1, rows * grid, columns * grid]]
        pixel = (99 / 255 - np.array(architecture.vision.pixel_mean)) / np.array(
            architecture.vision.pixel_std
        )
        colours = inputs["pixel_values"].unflatten(1, (3, -1))
        assert np.allclose(colours, pixel[:, None], atol=1e-5)
        made = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert made.shape[1] > inputs["input_ids"].shape[1]
    if find_spec("torchvision"):
        assert run_example(out, monkeypatch, capsys)
    card = (out / "README.md").read_text()
    assert "as many as are near its size, from 1,024 to 8,192 pixels" in card
    assert "limit of the image processor" not in card
    counted = counted_parts(out)
    assert sum(counted.values()) == sum(tensor.numel() for tensor in load_all(out).values())


@pytest.mark.parametrize("architecture", [SMALL, SMALL_2, SMALL_3], ids=["2.5", "2", "3"])
def test_parts_are_those_of_their_folders(tmp_path: Path, architecture: Architecture) -> None:
    vision = make_qwen_vl(tmp_path / "vision", architecture)
    language = make_language(tmp_path / "language", kind=architecture.language.family)
    init = Init(vision=str(vision), language=str(language))
    default = RECIPES[architecture.vision.family].architecture
    positions = dict(rotary_sections=(1, 2, 1))
    default = dataclasses.replace(
        default, language=dataclasses.replace(default.language, **positions)
    )
    found = from_parts.read_model("", init, default)
    assert found.vision == architecture.vision
    assert found.connector == default.connector and found.image_tokens == "qwen2_vl"
    assert found.language.rotary_sections == (1, 2, 1) and found.language.num_layers == 2
    assert found.language.rotary_interleaved == (architecture is SMALL_3)
    words = load_tokenizer(language).get_vocab()
    added = IMAGE_TOKEN_SETS["qwen2_vl"].added
    assert found.language.vocab_size == len(words) + len(added)

    def drawn(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.full(shape, 7.0)

    config = Config(
        stage="2", model="parts", architecture=found, init=init, training=Training(seed=4)
    )
    served = from_parts.full_tensors(config, drawn)
    whole = convert.full_tensors(vision, architecture)
    everything = (slice(None),)
    for row in rows(found, architecture.vision.family):
        tensor = served(row.key, row.shape)[everything]
        assert tuple(tensor.shape) == row.shape
        if row.key.startswith("vision."):
            assert torch.equal(tensor, whole(row.key, row.shape)[everything]), row.key
        elif row.key.startswith("connector."):
            assert torch.equal(tensor, drawn(row.key, row.shape))
    layer = "language.decoder.layers.1.mlp.linear_fc2.weight"
    down = load_all(language)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(served(layer, down.shape)[everything], down)


def test_a_vision_encoder_without_its_recipe_is_refused(tmp_path: Path) -> None:
    init = Init(
        vision=str(make_qwen_vl(tmp_path / "vision", SMALL)),
        language=str(make_language(tmp_path / "language")),
    )
    with pytest.raises(ValueError, match="which only --recipe qwen2_5_vl goes with"):
        from_parts.read_model("", init)
