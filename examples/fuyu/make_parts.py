"""Make what Fuyu's try-out starts from: boards of one or two handwritten digits with a question
about each, and a small Fuyu that has learned nothing, with a tokenizer as Fuyu's.

python examples/fuyu/make_parts.py OUT
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import FuyuConfig, FuyuForCausalLM, PersimmonConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "llava"))
from boards import split_scans
from make_data import HELD_OUT_SCANS, write_lines
from make_parts import one_question_each, write_records
from try_out import parse_parts

PATCH = 10  # pixels; boards have two or four columns and rows of them
TOKENS = ("|SPEAKER|", "|NEWLINE|", "|ENDOFTEXT|")
SPACE = "\u2581"
PERSIMMON = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
)


def make_tokenizer(texts: list[str], folder: Path) -> int:
    """Write a tokenizer of words, letters and bytes, and return its number of tokens. As in
    Fuyu's, tokens of images are ordinary pieces, and a text begins with the sign of a space.
    """
    words = sorted({word for text in texts for word in re.findall(r"[A-Za-z]+|\S", text)})
    letters = sorted({letter for word in words for letter in word})
    scores = {token: 0.0 for token in ("<unk>", "<s>", "</s>")}
    scores |= {f"<0x{byte:02X}>": 0.0 for byte in range(256)} | dict.fromkeys(TOKENS, 0.0)
    scores |= dict.fromkeys((SPACE, *letters), -9.0)
    scores |= {mark + word: -3.0 for word in words for mark in (SPACE, "")}
    found = Tokenizer(models.Unigram(list(scores.items()), 0, byte_fallback=True))
    space = normalizers.Replace(" ", SPACE)
    found.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), space])
    found.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(scores)


def make_fuyu(texts: list[str], folder: Path) -> None:
    """Write a fresh Fuyu with its tokenizer and the settings of its images."""
    words = make_tokenizer(texts, folder)
    text = PersimmonConfig(vocab_size=words, **PERSIMMON).to_dict()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    image = tokenizer.convert_tokens_to_ids(TOKENS[0])
    torch.manual_seed(1)
    config = FuyuConfig(text_config=text, patch_size=PATCH, image_token_id=image)
    FuyuForCausalLM(config).save_pretrained(folder)
    pixels = {
        "image_processor_type": "FuyuImageProcessor",
        "image_mean": 0.5,
        "image_std": 0.5,
        "patch_size": {"height": PATCH, "width": PATCH},
        "size": {"height": 4 * PATCH, "width": 4 * PATCH},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n")


def main() -> None:
    options = parse_parts(__doc__, records=4000, exam=100)
    images = options.out / "images"
    images.mkdir(parents=True)
    train, held_out = split_scans(HELD_OUT_SCANS, 0)
    texts: list[str] = []
    for name, scans, number in (
        ("train", train, options.records),
        ("exam", held_out, options.exam),
    ):
        records = write_records(np.random.default_rng(len(name)), scans, number, images, name)
        asked = one_question_each(records)
        write_lines(options.out / f"{name}.jsonl", asked)
        texts += [turn["value"] for record in asked for turn in record["conversations"]]
    make_fuyu([text.replace("<image>", "") for text in texts], options.out / "fuyu")
    print(f"{options.records} boards, {options.exam} for the exam")


if __name__ == "__main__":
    main()
