"""LLaVA's templates against the tokens and masks of LLaVA's own functions."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megavlm.data.images.frame_sampling import show_frames
from megavlm.data.packing.shorten import cut_windows
from megavlm.data.packing.windows import Windows
from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.sample import Image, Sample
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.image_rows import Shown, extents
from megavlm.data.text.tokenizer import ImageTokens, add_special_tokens, load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
KINDS = ("plain", "v1", "mistral")
IMAGE = -200
"""What the reference puts in the place of an image."""


@pytest.fixture(scope="module")
def templates() -> dict[str, ChatTemplate]:
    tokenizer = load_tokenizer(GOLDEN / "llava_tokenizer")
    add_special_tokens(tokenizer, "llava")
    return {name: ChatTemplate(tokenizer, 3, name=f"llava_{name}") for name in KINDS}


def turns_of(conversation: dict) -> list[Turn]:
    return [Turn(role=turn["from"], text=turn["value"]) for turn in conversation["conversations"]]


def test_tokens_and_masks_are_those_of_llava(templates: dict[str, ChatTemplate]) -> None:
    conversations = golden("llava_chat")
    assert len(conversations) == 200
    kinds = set()
    for conversation in conversations:
        template = templates[conversation["template"]]
        tokens, supervised, expected, mask = both(template, conversation)
        assert tokens == expected, conversation
        assert supervised == mask, conversation
        images = conversation["input_ids"].count(IMAGE)
        kinds.add((conversation["template"], images, len(conversation["conversations"])))
    assert kinds >= {("plain", 1, 2), ("v1", 0, 2), ("v1", 1, 2), ("v1", 1, 8)}


def test_tokens_of_mistrals_instructions_are_those_of_llava_next(
    templates: dict[str, ChatTemplate],
) -> None:
    learned = 0
    for conversation in golden("llava_mistral"):
        tokens, supervised, expected, mask = both(templates["mistral"], conversation)
        assert tokens == expected, conversation
        # LLaVA-NeXT's lengths often do not add up; it then learns nothing of the conversation.
        learned += any(mask)
        assert supervised == mask or not any(mask), conversation
        assert any(supervised)
    assert learned == 40


def test_a_sentencepiece_model_beside_a_mistral_starts_texts_with_a_space(tmp_path: Path) -> None:
    expected = load_tokenizer(GOLDEN / "llava_tokenizer")
    folder = Path(shutil.copytree(GOLDEN / "llava_tokenizer", tmp_path / "mistral"))
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    text = "what is this</s>a red fox"
    tokens = load_tokenizer(folder)(text)["input_ids"]
    assert tokens == expected(text)["input_ids"]
    assert expected.convert_ids_to_tokens(tokens)[1].startswith("▁")


def golden(name: str) -> list[dict]:
    """Return conversations with the tokens and masks of LLaVA's own functions."""
    with gzip.open(GOLDEN / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def both(template: ChatTemplate, conversation: dict) -> tuple[list, list, list, list]:
    """Return our tokens and mask of a golden conversation, and LLaVA's, with three tokens for each
    image.
    """
    images = conversation["input_ids"].count(IMAGE)
    tokens, supervised = template.encode(turns_of(conversation), [1] * images)
    expected = []
    mask = []
    for token, learned in zip(conversation["input_ids"], conversation["supervised"], strict=True):
        repeats = 3 if token == IMAGE else 1
        expected += [template.context_token_id if token == IMAGE else token] * repeats
        mask += [bool(learned)] * repeats
    return tokens.tolist(), supervised.tolist(), expected, mask


def test_an_image_token_in_an_answer_is_refused(templates: dict[str, ChatTemplate]) -> None:
    turns = [Turn(role="human", text="<image>\nwhat"), Turn(role="gpt", text="an <image>")]
    with pytest.raises(RejectError, match="a gpt turn holds <image> 1 times"):
        templates["v1"].encode(turns, [1])


def test_several_images_of_a_turn_stay_where_they_are(templates: dict[str, ChatTemplate]) -> None:
    template = templates["v1"]
    turns = [Turn(role="human", text="left <image>\nright <image>?"), Turn(role="gpt", text="yes")]
    tokens, _ = template.encode(turns, [1, 2])
    starts, ends = template.image_extents(tokens, [Shown(3), Shown(6)])
    assert (ends - starts).tolist() == [3, 6]
    text = template.tokenizer.decode(tokens[ends[0] : starts[1]].tolist())
    assert text.strip() == "right"


@pytest.mark.parametrize("frames", [1, 2])
def test_the_line_of_a_frame_stays_whole(templates: dict[str, ChatTemplate], frames: int) -> None:
    (turn,) = show_frames([Turn(role="human", text="what is <video>this?")], [[0.0] * frames])
    prompt = templates["v1"].prompt([turn], [1] * frames).tolist()
    text = templates["v1"].tokenizer.decode(prompt).replace("<image><image><image>", "<image>")
    told = "".join(f"Frame-{number}: <image> \n" for number in range(1, frames + 1))
    assert told in text


def test_windows_keep_each_of_several_images_side_by_side(
    templates: dict[str, ChatTemplate],
) -> None:
    template = templates["plain"]
    turn = Turn(role="pretrain", text="a fox <image><image> and a dog <image> run away")
    tokens, supervised = template.encode([turn], [1, 2, 1])
    images = [Image(encoded=b"", width=1, height=1, columns=1, rows=1, tiles=n) for n in (1, 2, 1)]
    whole = Sample(tokens=tokens, supervised=supervised, images=tuple(images), source=0, line=1)
    shown = [Shown(3 * image.tiles) for image in images]
    for windows in (Windows(images=1), Windows(images=2), Windows(tokens=11)):
        found = list(cut_windows(whole, windows, template, shown))
        assert len(found) > 1
        for one in found:
            count = int((one.tokens == template.context_token_id).sum())
            assert count == 3 * sum(image.tiles for image in one.images), windows


@pytest.mark.parametrize(
    ("images", "tokens", "starts", "ends"),
    [
        (ImageTokens(start="s", context="c", end="e", added=()), "asccesceb", [1, 5], [5, 8]),
        (ImageTokens(start="s", context="c", end="s", added=()), "asccscsb", [1, 4], [5, 7]),
        (ImageTokens(context="c", added=()), "acccb", [1, 3], [3, 4]),
    ],
    ids=["start and end", "one token between", "neither"],
)
def test_an_image_begins_and_ends_with_its_tokens(
    images: ImageTokens, tokens: str, starts: list[int], ends: list[int]
) -> None:
    ids = np.array([*map(ord, tokens)], np.int32)
    found = extents(ids, images, [Shown(2), Shown(1)], ord("c"))
    assert [places.tolist() for places in found] == [starts, ends]


def test_windows_of_a_text_without_images(templates: dict[str, ChatTemplate]) -> None:
    template = templates["plain"]
    turn = Turn(role="pretrain", text="a fox and a dog run away and a fox runs after the dog")
    tokens, supervised = template.encode([turn], [])
    whole = Sample(tokens=tokens, supervised=supervised, images=(), source=0, line=1)
    found = list(cut_windows(whole, Windows(tokens=6), template, []))
    assert len(found) > 1 and not any(one.images for one in found)
    first = len(template.first_tokens)
    rest = [token for one in found for token in one.tokens[first:].tolist()]
    assert [*template.first_tokens, *rest] == tokens.tolist()


def test_a_prompt_is_what_the_sample_begins_with(templates: dict[str, ChatTemplate]) -> None:
    template = templates["v1"]
    turns = [Turn(role="human", text="what is this <image>"), Turn(role="gpt", text="a red fox")]
    tokens, supervised = template.encode(turns, [1])
    prompt = template.prompt(turns[:1], [1])
    assert prompt.tolist() == tokens[: len(prompt)].tolist()
    assert supervised[len(prompt) :].all() and not supervised[: len(prompt)].any()
    assert template.prompt("what is this", [1]).tolist() == prompt.tolist()


@pytest.mark.parametrize("name", ["llava_v1", "llava_chatml", "llava_plain", "llava_mistral"])
def test_hugging_face_renders_the_same_tokens(name: str) -> None:
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    tokenizer.add_tokens(["</s>"], special_tokens=True)
    add_special_tokens(tokenizer, "llava")
    template = ChatTemplate(tokenizer, 1, name=name)
    turns = [Turn(role="human", text="what is this <image>"), Turn(role="gpt", text="a red fox")]
    content = [{"type": "image"}, {"type": "text", "text": "what is this"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a red fox"}]
    text = tokenizer.apply_chat_template(
        messages, chat_template=template.format.hf_template(), tokenize=False
    )
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found == template.encode(turns, [1])[0].tolist()
