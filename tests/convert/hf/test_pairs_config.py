"""Folders of CLIP and SigLIP say how training saw images and texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, CLIPConfig, PreTrainedTokenizerFast

from megavlm.config.recipes import recipe
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import pairs_config, processor
from megavlm.convert.hf.json_files import FILE_NAME, IMAGE_PROCESSOR_NAME, write_json
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.preprocessing import Usage
from tests.data.pair_tokenizer import make_pair_tokenizer


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_pixels_are_those_of_transformers(kind: str) -> None:
    """Packs of ``--pixels clip`` are refused if a published CLIP's differ from them."""
    usual = getattr(transformers, f"{kind}ImageProcessor")
    assert PIXELS[kind.lower()] == (tuple(usual.image_mean), tuple(usual.image_std))


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "SiglipImageProcessor"])
@pytest.mark.parametrize("tiling", ["crop", "pad", "dynamic"])
def test_images_are_cut_as_in_training(tmp_path: Path, kind: str, tiling: str) -> None:
    architecture = recipe("clip").architecture
    usage = Usage(template="clip", system_message="", max_tiles=1, tiling=tiling)
    settings = processor.tile_processor(architecture, usage, kind)
    write_json(tmp_path / IMAGE_PROCESSOR_NAME, settings)
    seen_by = AutoImageProcessor.from_pretrained(tmp_path)
    # White on the left, black on the right: 300 x 100.
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, :150] = 255
    made = seen_by(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    side = architecture.vision.image_size
    assert made.shape == (3, side, side)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (architecture.vision.pixel_mean, architecture.vision.pixel_std)
    )
    seen = made * std + mean
    edges = (seen[:, 0, 0].mean(), seen[:, side // 2, 0].mean(), seen[:, side // 2, -1].mean())
    assert edges[1] > 0.9 and edges[2] < 0.1
    # Above the image stands the mean if it was padded, and the image itself if it was not.
    if tiling == "pad":
        assert torch.allclose(seen[:, 0, 0], mean[:, 0, 0], atol=0.01)
    else:
        assert edges[0] > 0.9


def test_a_tokenizer_that_does_not_end_texts_is_refused(tmp_path: Path) -> None:
    make_pair_tokenizer(tmp_path / "ends", ("a", "b"))
    pairs_config.check_clip_tokenizer(tmp_path / "ends")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "ends")
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path / "goes_on")
    with pytest.raises(ValueError, match="does not end a text with its eos_token"):
        pairs_config.check_clip_tokenizer(tmp_path / "goes_on")


def test_a_clip_whose_tokens_see_later_ones_is_refused(tmp_path: Path) -> None:
    settings = CLIPConfig().to_dict()
    settings["text_config"] |= {"is_causal": False}
    write_json(tmp_path / FILE_NAME, settings)
    with pytest.raises(ValueError, match=r"text_config.is_causal is False, must be True"):
        architecture_from_hf(tmp_path)


def test_a_clip_whose_texts_have_no_end_is_refused(tmp_path: Path) -> None:
    settings = CLIPConfig().to_dict()
    settings["text_config"]["vocab_size"] = 1000  # and the end is 49407, as usual
    write_json(tmp_path / FILE_NAME, settings)
    with pytest.raises(ValueError, match=r"config.json.*\n.*text_config.eos_token_id is 49407"):
        architecture_from_hf(tmp_path)
