"""Make what the try-out of Qwen2.5-VL starts from: boards of one or two handwritten digits with a
question about each, videos of three moving digits, one after the other, and a small
Qwen2.5-VL that has learned nothing, with a tokenizer as Qwen's.

python examples/qwen2_5_vl/make_parts.py OUT
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
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
from make_parts import one_question_each, write_records, write_videos
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
    tokens_per_second=2,
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
FILM_SIZE = (30, 20)  # of videos, in pixels
GROUND = (128, 128, 128)
RATE = 4  # frames a second
FRAMES = 6  # that are shown of the three seconds of a video: a pair of each digit
LEAST_PIXELS = 4 * (MERGE * PATCH) ** 2
MOST_PIXELS = 64 * (MERGE * PATCH) ** 2


def save_film(rng: np.random.Generator, pictures: list[Image.Image], path: Path) -> Path:
    """Save a video in which each picture moves a little to the right for a second, from one of two
    places: an MP4 file, or a GIF without PyAV.
    """
    frames = []
    for picture in pictures:
        left = PATCH * int(rng.integers(2))
        for step in range(RATE):
            frame = Image.new("RGB", FILM_SIZE, GROUND)
            frame.paste(picture, (left + 2 * step // RATE, 0))
            frames.append(frame)
    try:
        import av
    except ModuleNotFoundError:
        path = path.with_suffix(".gif")
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // RATE)
        return path
    path = path.with_suffix(".mp4")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height = FILM_SIZE
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 400_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path


def as_questions(records: list[dict[str, Any]], frames: int) -> list[dict[str, Any]]:
    """Return the first question of each record as the trainer's evaluation reads it, with so many
    frames of a video.
    """
    asked = []
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"][:2])
        row = {"question": question.strip(), "answer": answer}
        for key in ("image", "video"):
            if key in record:
                row[key] = f"images/{record[key]}"
        asked.append(row | ({"frames": frames} if "video" in record else {}))
    return asked


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
    options = parse_parts(__doc__, records=4000, exam=100, videos=2500, video_exam=200)
    images = options.out / "images"
    images.mkdir(parents=True)
    train, held_out = split_scans(HELD_OUT_SCANS, 0)
    learned = write_records(np.random.default_rng(5), train, options.records, images, "train")
    exam = write_records(np.random.default_rng(4), held_out, options.exam, images, "exam")
    rng = np.random.default_rng(1)
    save = partial(save_film, rng)
    watched = write_videos(rng, train, options.videos, images, "video", save)
    unseen = write_videos(rng, held_out, options.video_exam, images, "unseen", save)
    asked = one_question_each(exam)
    read = one_question_each(learned)
    write_lines(options.out / "stage2.jsonl", read)
    write_lines(options.out / "stage3.jsonl", watched + read[: options.videos // 2])
    write_lines(options.out / "exam.jsonl", asked)
    write_lines(options.out / "video_exam.jsonl", unseen)
    # The same exams, for the trainer.
    write_lines(options.out / "boards.jsonl", as_questions(asked, 0))
    write_lines(options.out / "films.jsonl", as_questions(unseen, FRAMES))
    turns = [turn for record in learned + watched for turn in record["conversations"]]
    texts = [re.sub("<(image|video)>", "", turn["value"]) for turn in turns]
    make_qwen(texts, options.out / "qwen")
    print(
        f"{len(learned)} boards and {len(watched)} videos, {len(asked)} and {len(unseen)} questions"
    )


if __name__ == "__main__":
    main()
