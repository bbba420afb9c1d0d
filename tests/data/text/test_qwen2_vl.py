"""The samples and tiles of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against their processors of
``transformers``, and texts written down by hand as their chat templates make them.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from megavlm.config.recipes import qwen2_5_vl, qwen3_vl
from megavlm.config.schema import Vision
from megavlm.data.images.decode import decode_tiles
from megavlm.data.images.tiling import Tiling
from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.image_rows import Shown
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import add_special_tokens, load_tokenizer
from tests.data.images.test_anyres import resize_along_rows_first

GOLDEN = Path(__file__).parents[2] / "golden"
START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
ASKS = "<|im_end|>\n<|im_start|>assistant\n"
BOUNDS = (56 * 56, 200 * 28 * 28)
# Smaller than the least size, whole tiles, halves of tiles that are rounded down and up, larger
# than the largest size, and long strips.
SIZES = [(17, 23), (56, 84), (70, 98), (301, 205), (900, 700), (5, 900), (1399, 7)]


class Processor(Qwen2_5_VLProcessor):
    """The processor, which needs no torchvision as long as there is no video."""

    def check_argument_for_proper_class(self, *given: object) -> None:
        pass


class Third(Qwen3VLProcessor):
    """Qwen3-VL's processor, likewise."""

    def check_argument_for_proper_class(self, *given: object) -> None:
        pass


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    assert add_special_tokens(tokenizer, "qwen2_vl") == 4
    return ChatTemplate(tokenizer, 1, name="qwen2_vl")


@pytest.fixture(scope="module")
def processor(template: ChatTemplate) -> Processor:
    least, most = BOUNDS
    images = Qwen2VLImageProcessorPil(min_pixels=least, max_pixels=most)
    return Processor(images, template.tokenizer, None)


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def turns(*texts: str) -> list[Turn]:
    return [
        Turn(role="gpt" if place % 2 else "human", text=text) for place, text in enumerate(texts)
    ]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_and_tiles_are_those_of_the_processor(
    monkeypatch: pytest.MonkeyPatch,
    template: ChatTemplate,
    processor: Processor,
    size: tuple[int, int],
) -> None:
    resize_along_rows_first(monkeypatch)
    compare(template, processor, START, BOUNDS, qwen2_5_vl.ARCHITECTURE.vision, size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_and_tiles_are_those_of_the_processor_of_the_third(
    monkeypatch: pytest.MonkeyPatch, template: ChatTemplate, size: tuple[int, int]
) -> None:
    resize_along_rows_first(monkeypatch)
    vision = qwen3_vl.ARCHITECTURE.vision
    # Of the published image processor, but for the bounds.
    facts = dict(patch_size=16, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    bounds = (64 * 64, 200 * 32 * 32)
    edges = dict(zip(("shortest_edge", "longest_edge"), bounds, strict=True))
    images = Qwen2VLImageProcessorPil(size=edges, merge_size=2, temporal_patch_size=2, **facts)
    processor = Third(images, template.tokenizer, None)
    third = ChatTemplate(template.tokenizer, 1, name="qwen3_vl")
    compare(third, processor, "<|im_start|>user\n", bounds, vision, size)


def compare(
    template: ChatTemplate,
    processor: Processor | Third,
    start: str,
    bounds: tuple[int, int],
    vision: Vision,
    size: tuple[int, int],
) -> None:
    """Compare tokens and tiles of an image of a size and its question with those of a processor."""
    side = vision.image_size
    image = picture(*size)
    text = f"{start}{IMAGE}what is it{ASKS}"
    theirs = processor(images=[image], text=text, return_tensors="pt")
    tiling = Tiling(
        tile_size=side, mode="native", min_pixels=bounds[0], max_pixels=bounds[1], thumbnail=True
    )
    columns, rows = tiling.grid(*size)
    assert theirs["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
    tiles = tiling.count(columns, rows)
    assert tiles == columns * rows
    asked = template.prompt("<image>\nwhat is it", [tiles])
    assert asked.tolist() == theirs["input_ids"][0].tolist()
    file = io.BytesIO()
    image.save(file, "PNG")
    found = torch.from_numpy(decode_tiles(file.getvalue(), columns, rows, side, False))
    mean, std = (torch.tensor(values) for values in (vision.pixel_mean, vision.pixel_std))
    pixels = (found / 255 - mean[:, None, None]) / std[:, None, None]
    # Four patches of a tile, of which each shows an image to both frames.
    patches = pixels.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(0, 2, 4, 1, 3, 5)
    frames = theirs["pixel_values"].view(tiles, 2, 2, 3, 2, side // 2, side // 2)
    for frame in (0, 1):
        torch.testing.assert_close(frames[:, :, :, :, frame], patches, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "colour", "grey", "L", "1", "I;16"])
def test_what_is_transparent_shows_white_as_with_the_processor(
    processor: Processor, kind: str
) -> None:
    """``colour``, ``grey``: one value of a PNG without an alpha channel is transparent."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (56, 84, 4), dtype=np.uint8)
    pixels[:, :, 3] *= rng.integers(0, 2, (56, 84), dtype=np.uint8)
    modes = {"colour": "RGB", "grey": "L"}
    if kind == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16))
    else:
        image = Image.fromarray(pixels).convert(modes.get(kind, kind))
    hidden = {"colour": image.getpixel((3, 5)), "grey": image.getpixel((3, 5)), "P": 7}.get(kind)
    file = io.BytesIO()
    image.save(file, "PNG", **({} if hidden is None else {"transparency": hidden}))
    found = decode_tiles(file.getvalue(), 3, 2, 28, False, on_white=True)
    with Image.open(file) as stored:
        theirs = processor.image_processor(
            images=[stored], do_normalize=False, do_rescale=False, return_tensors="np"
        )["pixel_values"]
    patches = found.reshape(6, 3, 2, 14, 2, 14).transpose(0, 2, 4, 1, 3, 5)
    frames = theirs.reshape(6, 2, 2, 3, 2, 14, 14)
    assert np.array_equal(frames[:, :, :, :, 0], patches)
    plain = decode_tiles(file.getvalue(), 3, 2, 28, False)
    assert np.array_equal(found, plain) == (kind in ("L", "1", "I;16"))


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("<image>\nwhat is it", f"{IMAGE}what is it"),
        ("what is it\n<image>", f"what is it{IMAGE}"),
        ("<image>\n<image>\nwhich", f"{IMAGE}{IMAGE}which"),
        ("one <image> other\n\n<image>\n\n?", f"one {IMAGE} other\n{IMAGE}\n?"),
        (" 2 + 2\n", " 2 + 2\n"),
    ],
)
def test_an_image_stands_in_the_line_of_its_text(
    template: ChatTemplate, processor: Processor, question: str, shown: str
) -> None:
    count = question.count("<image>")
    images = [picture(60, 60 + 28 * number) for number in range(count)]
    tiles = [4 + 2 * number for number in range(count)]
    text = f"{START}{shown}{ASKS}it is a dog<|im_end|>\n"
    theirs = processor(images=images or None, text=text)["input_ids"][0]
    conversation = turns(question, "it is a dog")
    tokens, supervised = template.encode(conversation, tiles)
    assert tokens.tolist() == theirs
    assert template.count(conversation, tiles) == len(tokens)
    learned = len(tokens) - len(template.tokenizer("it is a dog<|im_end|>\n")["input_ids"])
    places = np.arange(len(tokens))
    assert np.array_equal(supervised, (learned <= places) & (places < len(tokens) - 1))
    assert template.prompt(conversation[:1], tiles).tolist() == tokens[:learned].tolist()
    assert template.text(tokens[learned:-2]) == "it is a dog"


def test_a_conversation_goes_on_and_its_system_turn_replaces_the_usual_one(
    template: ChatTemplate,
) -> None:
    conversation = [Turn(role="system", text="be brief"), *turns("a", "b", "<image>\nc", "d")]
    text = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\n"
        f"{IMAGE}c<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    )
    tokens, supervised = template.encode(conversation, [1])
    assert tokens.tolist() == template.tokenizer(text)["input_ids"]
    learned = template.tokenizer.decode(tokens[supervised].tolist())
    assert learned == "b<|im_end|>d<|im_end|>"


def test_the_chat_template_of_an_export_gives_the_same_tokens(template: ChatTemplate) -> None:
    image = {"type": "image"}
    content = [image, {"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]
    text = template.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": "c"}],
        chat_template=chat_format("qwen2_vl").hf_template(video="<|video_pad|>"),
        tokenize=False,
    )
    assert text == f"{START}{IMAGE}a{IMAGE}b{ASKS}c<|im_end|>\n"
    tokens, _ = template.encode(turns("<image>\na<image>\nb", "c"), [1, 1])
    assert tokens.tolist() == template.tokenizer(text)["input_ids"]
    shown = template.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "a"}]}],
        chat_template=chat_format("qwen2_vl").hf_template(video="<|video_pad|>"),
        add_generation_prompt=True,
        tokenize=False,
    )
    assert shown == f"{START}<|vision_start|><|video_pad|><|vision_end|>a{ASKS}"


def test_the_third_has_no_usual_system_message(template: ChatTemplate) -> None:
    third = ChatTemplate(template.tokenizer, 1, name="qwen3_vl")
    conversation = turns("<image>\na", "b", "c", "d")
    text = (
        f"<|im_start|>user\n{IMAGE}a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    )
    tokens, _ = third.encode(conversation, [1])
    assert tokens.tolist() == template.tokenizer(text)["input_ids"]
    told = [Turn(role="system", text="be brief"), *conversation]
    tokens, _ = third.encode(told, [1])
    system = "<|im_start|>system\nbe brief<|im_end|>\n"
    assert tokens.tolist() == template.tokenizer(system + text)["input_ids"]
    image = {"type": "image"}
    asked = [{"role": "user", "content": [image, {"type": "text", "text": "a"}]}]
    shown = template.tokenizer.apply_chat_template(
        asked,
        chat_template=chat_format("qwen3_vl").hf_template(),
        add_generation_prompt=True,
        tokenize=False,
    )
    assert shown == f"<|im_start|>user\n{IMAGE}a{ASKS}"


def test_tokens_of_images_in_a_text_are_refused(template: ChatTemplate) -> None:
    with pytest.raises(RejectError, match=r"holds <\|image_pad\|> 1 times"):
        template.encode(turns("a <|image_pad|>", "b"), [])


def test_images_begin_and_end_with_their_tokens(template: ChatTemplate) -> None:
    shown = [Shown(6, rows=2), Shown(2)]
    tokens, _ = template.encode(turns("<image>\n<image>\nx", "y"), [6, 2], shown)
    starts, ends = template.image_extents(tokens, shown)
    assert (ends - starts).tolist() == [8, 4] and starts[1] == ends[0]
