"""Every template against texts and masks written down here by hand, for tokenizers with and without
a token of the beginning.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers.processors import TemplateProcessing

from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.templates import FORMATS, chat_format
from megavlm.data.text.tokenizer import add_special_tokens, load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
WORDS = (
    "the quick brown fox jumps over a lazy dog what is in picture answer yes no red blue hello"
    " world USER ASSISTANT :"
)
MARKERS = (
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    *FORMATS["internvl3_5_gpt_oss"].markers[:3],
    "<|return|>",
)
OLD_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL,"
    " 是一个有用无害的人工智能助手。"
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHATS = [
    (None, [("what is in the picture", "a red fox")]),
    (
        None,
        [
            ("<image>\nwhat is in the picture", "a lazy dog"),
            ("and <image>?", "你好 <ref>the fox</ref><box>[[1, 2, 3, 4]]</box>\n"),
        ],
    ),
    ("be brief", [("<image> hello", " the world "), ("no\n", "yes"), ("a", "b")]),
]


def bytes_without_bos():
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    tokenizer.add_tokens(
        [token for token in MARKERS if token not in tokenizer.get_vocab()], special_tokens=True
    )
    return tokenizer


def bytes_with_bos():
    """Like Llama 3's tokenizer: cuts bytes, and begins with a token."""
    tokenizer = bytes_without_bos()
    tokenizer.add_tokens(["<s>"], special_tokens=True)
    tokenizer.bos_token = "<s>"
    pieces = [("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=pieces
    )
    return tokenizer


def sentences(folder: Path, class_name: str, *, starts_with_space: bool):
    """Make a sentencepiece tokenizer; ``class_name`` is LlamaTokenizer, or InternLM's, which comes
    with code that must not run.
    """
    rng = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choices(WORDS.split(), k=8)) for _ in range(300)]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=starts_with_space,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    settings = {
        "tokenizer_class": class_name,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    if class_name == "LlamaTokenizer":
        settings["add_bos_token"] = True
    else:
        settings["auto_map"] = {
            "AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(
        [token for token in MARKERS if token not in tokenizer.get_vocab()], special_tokens=True
    )
    add_special_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    llama = tmp_path_factory.mktemp("llama")
    internlm = tmp_path_factory.mktemp("internlm")
    return {
        "bytes": bytes_without_bos(),
        "bytes with a beginning": bytes_with_bos(),
        "llama": sentences(llama, "LlamaTokenizer", starts_with_space=True),
        "internlm": sentences(internlm, "InternLM2Tokenizer", starts_with_space=False),
    }


NAMES = ["bytes", "bytes with a beginning", "llama", "internlm"]
INTERNVL = [name for name, row in FORMATS.items() if row.image_tokens == "internvl"]


def turns_of(system: str | None, rounds: list[tuple[str, str]]) -> list[Turn]:
    start = [Turn(role="system", text=system)] if system else []
    return start + [
        Turn(role=role, text=text)
        for pair in rounds
        for role, text in zip(("human", "gpt"), pair, strict=True)
    ]


def show(text: str, tiles: list[int]) -> str:
    """Replace each image in the text by two features a tile."""
    for count in tiles[: text.count("<image>")]:
        text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * 2 * count}</img>", 1)
    return text


def by_hand(
    name: str, system: str | None, rounds: list[tuple[str, str]], tiles: list[int]
) -> list[tuple[str, str]]:
    """Write a whole conversation in pairs: text without loss, then text with loss."""
    pairs = []
    tiles = list(tiles)
    for place, (question, answer) in enumerate(rounds):
        if name == "internlm2-chat":
            question = question.strip()
            answer = answer.strip()
        shown = show(question, tiles)
        del tiles[: question.count("<image>")]
        if name in ("Hermes-2", "internlm2-chat"):
            start = f"<|im_start|>system\n{system or OLD_SYSTEM}<|im_end|>" if place == 0 else ""
            pairs.append(
                (
                    f"{start}<|im_start|>user\n{shown}<|im_end|><|im_start|>assistant\n",
                    f"{answer}<|im_end|>",
                )
            )
        elif name == "phi3-chat":
            start = f"<|system|>\n{system or OLD_SYSTEM}<|end|>" if place == 0 else ""
            pairs.append((f"{start}<|user|>\n{shown}<|end|><|assistant|>\n", f"{answer}<|end|>"))
        elif name == "vicuna":
            start = f"{system or VICUNA_SYSTEM} " if place == 0 else ""
            pairs.append((f"{start}USER: {shown} ASSISTANT:", f" {answer}</s>"))
    return pairs


@pytest.mark.parametrize("name", ["Hermes-2", "internlm2-chat", "phi3-chat", "vicuna"])
@pytest.mark.parametrize("which", NAMES)
def test_joint_templates_are_the_tokens_of_the_whole_text(tokenizers, name, which):
    tokenizer = tokenizers[which]
    template = ChatTemplate(tokenizer, 2, name=name)
    for system, rounds in CHATS:
        tiles = [1, 3][: sum(question.count("<image>") for question, _ in rounds)]
        pairs = by_hand(name, system, rounds, tiles)
        tokens, supervised = template.encode(turns_of(system, rounds), tiles)
        assert tokens.tolist() == tokenizer("".join(map("".join, pairs)))["input_ids"]
        # As InternVL finds its masks: the number of tokens up to an answer's begin, and up to its
        # end.
        expected = np.zeros(len(tokens), bool)
        text = ""
        for before, answer in pairs:
            # Alone, the space in front of vicuna's answers is a token; with the answer it is a part
            # of the first one.
            begin = (
                len(tokenizer(text + before + " ")["input_ids"]) - 1
                if name == "vicuna"
                else len(tokenizer(text + before)["input_ids"])
            )
            text += before + answer
            expected[begin : len(tokenizer(text)["input_ids"])] = True
        assert supervised.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "name", ["internvl2_5", "Hermes-2", "internlm2-chat", "phi3-chat", "vicuna"]
)
@pytest.mark.parametrize("which", NAMES)
def test_an_answer_that_is_not_learned_changes_the_mask_alone(tokenizers, name, which):
    template = ChatTemplate(tokenizers[which], 2, name=name)
    for system, rounds in CHATS:
        tiles = [1, 3][: sum(question.count("<image>") for question, _ in rounds)]
        turns = turns_of(system, rounds)
        tokens, supervised = template.encode(turns, tiles)
        left = supervised.copy()
        answers = [place for place, turn in enumerate(turns) if turn.role == "gpt"]
        for answer in answers:
            alone = [
                dataclasses.replace(turn, learned=turn.role != "gpt" or place == answer)
                for place, turn in enumerate(turns)
            ]
            same, mask = template.encode(alone, tiles)
            assert same.tolist() == tokens.tolist()
            # The masks of the single answers are parts of the whole one, and do not overlap.
            assert mask.any() and left[mask].all()
            left &= ~mask
            assert turns[answer].text.strip()[:3] in tokenizers[which].decode(tokens[mask])
        assert not left.any()


@pytest.mark.parametrize("which", NAMES)
def test_internvl2_5_joins_turns_that_were_tokenised_apart(tokenizers, which):
    tokenizer = tokenizers[which]
    template = ChatTemplate(tokenizer, 2)
    start = [] if which == "bytes" else [tokenizer.bos_token_id]
    system, rounds = CHATS[1]
    texts = ["<|im_start|>system\n" + chat_format("internvl2_5").system_message + "<|im_end|>\n"]
    tiles = [1, 3]
    for question, answer in rounds:
        texts.append(f"<|im_start|>user\n{show(question, tiles)}<|im_end|>\n")
        tiles = tiles[question.count("<image>") :]
        texts.append(f"<|im_start|>assistant\n{answer}<|im_end|>\n")
    expected = list(start)
    mask = [False] * len(start)
    skipped = len(tokenizer("<|im_start|>assistant\n")["input_ids"]) - len(start)
    for place, text in enumerate(texts):
        tokens = tokenizer(text)["input_ids"][len(start) :]
        learned = place > 0 and place % 2 == 0
        expected += tokens
        mask += [learned and skipped <= number < len(tokens) - 1 for number in range(len(tokens))]
    tokens, supervised = template.encode(turns_of(system, rounds), [1, 3])
    assert (tokens.tolist(), supervised.tolist()) == (expected, mask)


@pytest.mark.parametrize("which", NAMES)
def test_plain_is_images_and_answers(tokenizers, which):
    tokenizer = tokenizers[which]
    tokens, supervised = ChatTemplate(tokenizer, 2, name="plain").encode(
        turns_of(None, [("<image>\nwhat is it", "a red fox")]), [2]
    )
    assert (
        tokens.tolist()
        == tokenizer("<img>" + "<IMG_CONTEXT>" * 4 + "</img>a red fox\n")["input_ids"]
    )
    assert (
        supervised.tolist()
        == [False] * len(tokenizer("<img>" + "<IMG_CONTEXT>" * 4 + "</img>")["input_ids"])
        + [True] * supervised.sum()
    )


@pytest.mark.parametrize("name", INTERNVL)
@pytest.mark.parametrize("which", NAMES)
def test_a_pretrain_text_is_learned_but_for_its_images(tokenizers, name, which):
    tokenizer = tokenizers[which]
    template = ChatTemplate(tokenizer, 2, name=name)
    tokens, supervised = template.encode(
        [Turn(role="pretrain", text="<image>the fox <image> jumps")], [1, 2]
    )
    text = (
        "<img><IMG_CONTEXT><IMG_CONTEXT></img>the fox <img>" + "<IMG_CONTEXT>" * 4 + "</img> jumps"
    )
    assert tokens.tolist() == tokenizer(text)["input_ids"]
    image_tokens = tokenizer.convert_tokens_to_ids(["<img>", "</img>", "<IMG_CONTEXT>"])
    start = 0 if which == "bytes" else 1
    assert supervised[start:].tolist() == [token not in image_tokens for token in tokens[start:]]
    with pytest.raises(RejectError, match="1 <image> placeholders .* 2 images"):
        template.encode([Turn(role="pretrain", text="<image>the fox")], [1, 2])


@pytest.mark.parametrize("name", INTERNVL)
@pytest.mark.parametrize("which", NAMES)
def test_a_prompt_is_where_the_answer_begins(tokenizers, name, which):
    template = ChatTemplate(tokenizers[which], 2, name=name)
    turns = turns_of(None, [("<image>\nthe fox", "yes"), ("hello", "a lazy dog")])
    tokens, supervised = template.encode(turns, [1])
    prompt = template.prompt(turns[:-1], [1])
    assert tokens[: len(prompt)].tolist() == prompt.tolist()
    last = np.flatnonzero(supervised)[-1]
    assert (
        supervised[len(prompt) : last + 1].all() and not supervised[len(prompt) - 1]
    ) or name == "plain"
    assert tokens[last] == template.end_token_id


@pytest.mark.parametrize("name", [name for name in INTERNVL if name != "plain"])
@pytest.mark.parametrize("which", ["bytes", "bytes with a beginning"])
def test_hugging_face_renders_the_same_tokens(tokenizers, name, which):
    tokenizer = tokenizers[which]
    template = ChatTemplate(tokenizer, 1, name=name)
    for system, rounds in CHATS:
        turns = turns_of(system, rounds)
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        messages = [
            {
                "role": roles[turn.role],
                "content": (
                    turn.text.replace("<image>", "<img><IMG_CONTEXT></img>")
                    if turn.role == "human"
                    else turn.text
                ),
            }
            for turn in turns
        ]
        shown = sum(question.count("<image>") for question, _ in rounds)
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=chat_format(name).hf_template(bos=which != "bytes"),
            tokenize=False,
        )
        assert (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            == template.encode(turns, [1] * shown)[0].tolist()
        )


def test_hugging_face_ends_only_a_finished_conversation_with_the_last_end(tokenizers):
    tokenizer = tokenizers["bytes"]
    template = ChatTemplate(tokenizer, 1, name="internvl3_5_gpt_oss")
    turns = turns_of("be brief", [("who", "a fox"), ("and now", "yes")])
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [{"role": roles[turn.role], "content": turn.text} for turn in turns]

    def shown(count: int, prompts: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count],
            chat_template=template.format.hf_template(),
            add_generation_prompt=prompts,
            tokenize=False,
        )

    start = "<|start|>system<|message|>be brief<|end|><|start|>user<|message|>who<|end|>"
    first = f"{start}<|start|>assistant<|channel|>final<|message|>a fox"
    then = "<|end|><|start|>user<|message|>and now<|end|><|start|>assistant"
    assert shown(3, False) == f"{first}<|return|>"
    assert shown(3, True) == f"{first}<|end|><|start|>assistant"
    assert shown(4, True) == f"{first}{then}"
    assert shown(5, False) == f"{first}{then}<|channel|>final<|message|>yes<|return|>"
    ids = tokenizer(shown(4, True), add_special_tokens=False)["input_ids"]
    assert template.prompt(turns[:4]).tolist() == ids


def test_hugging_face_template_refuses_videos(tokenizers):
    content = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    with pytest.raises(Exception, match="pass the frames of a video as images"):
        tokenizers["bytes"].apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=chat_format("internvl2_5").hf_template(),
            tokenize=False,
        )


def test_a_sentencepiece_model_is_read_without_its_code(tokenizers, tmp_path):
    tokenizer = sentences(tmp_path, "InternLM2Tokenizer", starts_with_space=False)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("the fox", "  hello   world\n你好 🙂 ", "USER : yes"):
        assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *reference.encode(text)]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    assert (
        again("  <img>the fox</img> a")["input_ids"]
        == tokenizer("  <img>the fox</img> a")["input_ids"]
    )


def test_unknown_templates_and_missing_markers_are_told(tokenizers):
    with pytest.raises(
        ValueError, match="--template chatml: no such template; known are internvl2_5, Hermes-2"
    ):
        chat_format("chatml")
    with pytest.raises(
        ValueError, match=r"no token <\|system\|>, which --template phi3-chat needs"
    ):
        ChatTemplate(load_tokenizer(GOLDEN / "tokenizer"), 2, name="phi3-chat")
