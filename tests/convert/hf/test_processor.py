"""Compare what the processor of an export makes of images with what training sees."""

from __future__ import annotations

import dataclasses
import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    InternVLProcessor,
)

from megavlm.convert.hf import convert, preprocessing
from megavlm.convert.hf.json_files import read_json
from megavlm.convert.hf.preprocessing import Usage
from megavlm.data.images.decode import decode_tiles
from megavlm.data.images.tiling import Tiling
from megavlm.data.records.record import Turn
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.templates import FORMATS
from megavlm.data.text.tokenizer import load_tokenizer
from tests.convert.models import SMALL, language, make_hf
from tests.data.text.test_templates import bytes_with_bos, bytes_without_bos

SIZES = ((60, 90), (200, 31), (28, 28))


class _WithoutVideos(InternVLProcessor):
    """The processor without the check of its video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> None:
        """Accept every part, since ``get_possibly_dynamic_module`` of transformers imports
        torchvision to look up the class of a video processor.
        """


def load_processor(folder: Path) -> InternVLProcessor:
    """Load the processor; without torchvision, which transformers wants for videos alone, put it
    together from the parts that the folder names. Torchvision's own resizing, which transformers
    takes if it may, rounds some pixels to the next level.
    """
    if find_spec("torchvision"):
        processor = AutoProcessor.from_pretrained(folder)
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        return processor
    settings = read_json(folder / "processor_config.json")
    return _WithoutVideos(
        AutoImageProcessor.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        image_seq_length=settings["image_seq_length"],
        chat_template=(folder / "chat_template.jinja").read_text(),
    )


def export_with(folder: Path, name: str, *, begins: bool, message: str | None = None) -> Path:
    """Export a random model whose packs had the template."""
    tokenizer = (bytes_with_bos if begins else bytes_without_bos)()
    tokenizer.save_pretrained(folder / "tokenizer")
    source = make_hf(folder / "hf", language(vocab_size=480), dtype=torch.float32)
    start = convert.import_(source, folder / "start", tokenizer=folder / "tokenizer")
    own = FORMATS[name].system_message if message is None else message
    usage = Usage(template=name, system_message=own, max_tiles=4, is_trained=True)
    preprocessing.write(usage, start)
    return convert.export(start, folder / "out")


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize(
    "name", [name for name, row in FORMATS.items() if row.image_tokens == "internvl"]
)
def test_the_processor_and_the_model_answer_as_in_training(
    tmp_path: Path, name: str, begins: bool
) -> None:
    out = export_with(tmp_path, name, begins=begins)
    processor = load_processor(out)
    model = AutoModelForImageTextToText.from_pretrained(out).eval()
    template = ChatTemplate(load_tokenizer(out), SMALL.features_per_tile, name=name)
    tiling = Tiling(tile_size=28, max_tiles=4)
    mean, std = (torch.tensor(values)[:, None, None] for values in _pixels())
    for number, (width, height) in enumerate(SIZES):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        image = Image.fromarray(noise)
        file = io.BytesIO()
        image.save(file, "PNG")
        columns, rows = tiling.grid(width, height)
        tiles = torch.from_numpy(decode_tiles(file.getvalue(), columns, rows, 28, True))
        ours = template.prompt(
            [Turn(role="human", text="<image>\nWhat is it?")], [tiling.count(columns, rows)]
        )
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
        theirs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert theirs["input_ids"][0].tolist() == ours.tolist()
        pixels = (tiles / 255 - mean) / std
        assert theirs["pixel_values"].shape == pixels.shape
        assert (theirs["pixel_values"] - pixels).abs().max() < 2e-6
        with torch.no_grad():
            expected = model(input_ids=torch.from_numpy(ours)[None].long(), pixel_values=pixels)
            found = model(**theirs)
        assert (found.logits - expected.logits).abs().max() < 1e-4 * expected.logits.abs().max()


def _pixels() -> tuple[tuple[float, ...], tuple[float, ...]]:
    return SMALL.vision.pixel_mean, SMALL.vision.pixel_std


def test_images_that_training_padded_are_not_cropped(tmp_path: Path) -> None:
    tokenizer = bytes_without_bos()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = make_hf(tmp_path / "hf", language(vocab_size=480))
    start = convert.import_(source, tmp_path / "start", tokenizer=tmp_path / "tokenizer")
    usage = Usage(tiling="pad", max_tiles=6, is_trained=True)
    preprocessing.write(usage, start)
    native = convert.export(start, tmp_path / "native")
    assert AutoImageProcessor.from_pretrained(native).crop_to_patches is False
    chat = convert.export(start, tmp_path / "chat", dialect="chat")
    settings = read_json(chat / "config.json")
    assert settings["pad2square"] and not settings["dynamic_image_size"]
    again = convert.import_(chat, tmp_path / "again")
    assert preprocessing.of_checkpoint(again) == dataclasses.replace(usage, is_trained=False)


def test_generation_settings_stop_at_the_end_of_an_answer(tmp_path: Path) -> None:
    out = export_with(tmp_path, "phi3-chat", begins=True)
    settings = GenerationConfig.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_ids_to_tokens(settings.eos_token_id) == "<|end|>"
    assert tokenizer.convert_ids_to_tokens(settings.bos_token_id) == "<s>"
