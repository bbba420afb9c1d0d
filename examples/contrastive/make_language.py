"""Make what InternVL's stages 0 and 1 learn from: keywords with captions for the language model,
questions about the images of ``make_data.py``, and a fresh language model with its tokenizer.

python examples/contrastive/make_language.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from make_data import FACTS, caption
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = 2400
ASKED_IMAGES = 2400
HELD_OUT_TEXTS = 192
QUESTION = "\nwhat is it"
CHAT = ("<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant", "\n")


def record(shown: str, said: str) -> dict:
    """Return a record of a question behind what is shown, and of its answer."""
    turns = [("system", "a"), ("human", shown + QUESTION), ("gpt", said)]
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


def write_lines(path: Path, records: list[dict]) -> None:
    """Write an annotation file."""
    path.write_text("".join(json.dumps(one) + "\n" for one in records))


def write_texts(out: Path) -> None:
    """Write captions behind their keywords in any order."""
    rng = np.random.default_rng(7)
    records = []
    for number in rng.integers(0, len(FACTS), TEXTS + HELD_OUT_TEXTS):
        words = rng.permutation(" ".join(FACTS[number]).split())
        records.append(record(" ".join(words), caption(FACTS[number])))
    write_lines(out / "text_valid.jsonl", records[:HELD_OUT_TEXTS])
    write_lines(out / "text_train.jsonl", records[HELD_OUT_TEXTS:])


def write_questions(out: Path) -> None:
    """Write questions about the images that have captions."""
    for name in ("train", "valid"):
        lines = (out / f"{name}.jsonl").read_text().splitlines()[:ASKED_IMAGES]
        pairs = [json.loads(line) for line in lines]
        records = [
            {"image": one["image"], **record("<image>", one["conversations"][1]["value"])}
            for one in pairs
        ]
        write_lines(out / f"asked_{name}.jsonl", records)


def write_language(folder: Path) -> None:
    """Write a fresh language model, and its tokenizer with a token for each word."""
    words = {word for facts in FACTS for word in f"{caption(facts)} {QUESTION}".split()}
    names = (*CHAT, *sorted(words))
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    cuts = [
        pre_tokenizers.Split(" ", "removed"),
        pre_tokenizers.Split("\n", "isolated"),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    ).save_pretrained(folder)
    torch.manual_seed(3)
    sizes = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, vocab_size=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=4)
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    write_texts(out)
    write_questions(out)
    write_language(out / "language")
