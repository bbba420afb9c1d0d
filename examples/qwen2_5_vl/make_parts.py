"""Make what the try-out of Qwen2.5-VL starts from: boards of one or two handwritten digits with a
question about each, and a small Qwen2.5-VL that has learned nothing, with a tokenizer as Qwen's.

python examples/qwen2_5_vl/make_parts.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "llava"))
from boards import split_scans
from make_data import HELD_OUT_SCANS, train_tokenizer, write_lines
from make_parts import one_question_each, write_records
from try_out import parse_parts

PATCH = 5  # pixels; boards have two or four columns and rows of tiles of two by two patches
MERGE = 2
TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VISION = dict(
    depth=4,
    hidden_size=96,
    intermediate_size=256,
    num_heads=4,
    patch_size=PATCH,
    spatial_merge_size=MERGE,
    window_size=4 * PATCH,
    fullatt_block_indexes=[1, 3],
    out_hidden_size=128,
)
LANGUAGE = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
)
LEAST_PIXELS = 4 * (MERGE * PATCH) ** 2
MOST_PIXELS = 64 * (MERGE * PATCH) ** 2


def make_qwen(texts: list[str], folder: Path) -> None:
    """Write a fresh Qwen2.5-VL with its tokenizer and the settings of its images."""
    train_tokenizer(texts, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    tokenizer.save_pretrained(folder)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(TOKENS)), strict=True))
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(1)
    config = Qwen2_5_VLConfig(
        vision_config=VISION,
        text_config=LANGUAGE | ends | {"vocab_size": len(tokenizer)},
        tie_word_embeddings=False,
        **ids,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    pixels = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "temporal_patch_size": config.vision_config.temporal_patch_size,
        "merge_size": MERGE,
        "size": {"shortest_edge": LEAST_PIXELS, "longest_edge": MOST_PIXELS},
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
    # The same exam, for the trainer.
    questions = [
        {
            "image": f"images/{record['image']}",
            "question": record["conversations"][0]["value"].strip(),
            "answer": record["conversations"][1]["value"],
        }
        for record in asked
    ]
    write_lines(options.out / "questions.jsonl", questions)
    make_qwen([text.replace("<image>", "") for text in texts], options.out / "qwen")
    print(f"{options.records} boards, {options.exam} for the exam")


if __name__ == "__main__":
    main()
