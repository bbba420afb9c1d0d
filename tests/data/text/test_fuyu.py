"""Fuyu's samples and patches against the processor of ``transformers``."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import FuyuProcessor
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from megavlm.config.recipes.fuyu import ARCHITECTURE
from megavlm.data.images.patches import cut_patches, fitted_size
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.transforms import decode_changed
from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.image_rows import Shown
from megavlm.data.text.tokenizer import add_special_tokens, load_tokenizer
from megavlm.model.patches import Patches
from tests.convert.part_folders import make_fuyu_tokenizer
from tests.data.text.test_templates import sentences

PATCH = 30
SIX = [Shown(6, rows=2)]
# Smaller than a patch, whole patches, larger than the limit in one or both ways, and long strips.
SIZES = [(17, 23), (60, 30), (61, 91), (300, 200), (500, 40), (241, 333), (31, 900)]
LIMIT = (240, 180)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("words")
    make_fuyu_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    assert add_special_tokens(tokenizer, "fuyu") == 0
    return ChatTemplate(tokenizer, 1, name="fuyu")


_CUT = FuyuImageProcessorPil.patchify_image


def cut_tensor(images: FuyuImageProcessorPil, image: torch.Tensor, patch_size=None):
    """Cut an image into patches. Without torchvision the image processor of transformers 5.23 takes
    arrays, and is given tensors.
    """
    return torch.from_numpy(_CUT(images, image.numpy(), patch_size))[None]


class Images(FuyuImageProcessorPil):
    """The image processor, which needs no torchvision."""

    patchify_image = cut_tensor


@pytest.fixture(scope="module")
def processor(template: ChatTemplate) -> FuyuProcessor:
    width, height = LIMIT
    images = Images(size={"height": height, "width": width})
    return FuyuProcessor(images, template.tokenizer)


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def turns(question: str, answer: str) -> list[Turn]:
    return [Turn(role="human", text=question), Turn(role="gpt", text=answer)]


class Plain:
    """Kernels that compile nothing."""

    @staticmethod
    def pointwise(function):
        return function


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_and_patches_are_those_of_the_processor(
    template: ChatTemplate, processor: FuyuProcessor, size: tuple[int, int]
) -> None:
    image = picture(*size)
    question = "what is it"
    theirs = processor(
        images=image, text=f"{question}\n", return_tensors="pt", return_legacy_image_output=False
    )
    tiling = Tiling(tile_size=PATCH, mode="patches", limit=LIMIT)
    columns, rows = tiling.grid(*size)
    tiles = tiling.count(columns, rows)
    asked = template.prompt(question, [tiles], [Shown(tiles, rows)])
    assert asked.tolist() == theirs["input_ids"][0].tolist()
    file = io.BytesIO()
    image.save(file, "PNG")
    fits = fitted_size(*size, LIMIT)

    def cut(image: Image.Image, out: np.ndarray | None) -> np.ndarray:
        return cut_patches(image, fits, PATCH, out)

    patches = decode_changed(file.getvalue(), columns, rows, PATCH, False, cut=cut)
    pixels = Patches(ARCHITECTURE.vision, Plain(), torch.float32)(None, torch.tensor(patches), None)
    assert pixels.shape == (1, tiles, 3 * PATCH**2)
    expected = theirs["pixel_values"].float().reshape(tiles, -1)
    torch.testing.assert_close(pixels[0], expected, rtol=0, atol=1e-6)


def test_an_answer_follows_its_token_and_is_learned(template: ChatTemplate) -> None:
    tokens, supervised = template.encode(turns("<image>\nwhat is it", " a dog "), [6], SIX)
    names = template.tokenizer.convert_ids_to_tokens(tokens.tolist())
    row = ["|SPEAKER|"] * 3 + ["|NEWLINE|"]
    assert names[:9] == [*row, *row, "<s>"]
    learned = names.index("<0x04>") + 1
    assert names[-1] == "|ENDOFTEXT|" and learned < len(names) - 1
    assert supervised.tolist() == [place >= learned for place in range(len(names))]
    assert template.prompt("what is it", [6], SIX).tolist() == tokens[:learned].tolist()
    assert template.count(turns("<image>\nwhat is it", "a dog"), [6], SIX) == len(tokens)
    assert template.text(tokens[learned:-1]) == " a dog"
    starts, ends = template.image_extents(tokens, SIX)
    assert (starts.tolist(), ends.tolist()) == ([0], [8])


def test_several_images_stand_one_behind_the_other(template: ChatTemplate) -> None:
    shown = [Shown(2), Shown(3, rows=3)]
    tokens, _ = template.encode(turns("<image> or <image>", "neither"), [2, 3], shown)
    names = template.tokenizer.convert_ids_to_tokens(tokens.tolist())
    line = ["|SPEAKER|", "|NEWLINE|"]
    assert names[:10] == ["|SPEAKER|", *line, *line, *line, *line, "<s>"][:10]


def test_texts_without_an_image_begin_with_their_first_token(template: ChatTemplate) -> None:
    tokens, _ = template.encode(turns("2 + 2", "4"), [])
    assert template.tokenizer.convert_ids_to_tokens(int(tokens[0])) == "<s>"


def test_tokens_of_rows_in_a_text_are_refused(template: ChatTemplate) -> None:
    with pytest.raises(RejectError, match=r"holds \|NEWLINE\| 1 times"):
        template.encode(turns("<image> a |NEWLINE|", "b"), [1])


def test_a_tokenizer_without_fuyus_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = sentences(tmp_path, "LlamaTokenizer", starts_with_space=True)
    with pytest.raises(ValueError, match=r"has no token .* which --template fuyu needs"):
        ChatTemplate(tokenizer, 1, name="fuyu")
