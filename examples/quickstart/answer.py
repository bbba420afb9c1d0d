"""Let transformers answer the held-out questions, with exported models.

python examples/quickstart/answer.py --exam data/exam.jsonl --images data/images --packs
packs/mixed_train --out answers.json 2=exported
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import InternVLForConditionalGeneration

from megavlm.data.images.decode import decode_tiles, read_size
from megavlm.data.images.tiling import Tiling
from megavlm.data.records.record import Turn
from megavlm.data.store.manifest import Manifest, read_manifest
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer

BATCH = 50
LONGEST_ANSWER = 6


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question, ready for the model.

    Args:
        tokens: prompt up to where the answer begins, int64 [T].
        pixels: normalised tiles of its images, float32 [I, 3, S, S].
    """

    tokens: torch.Tensor
    pixels: torch.Tensor


def prepare(
    item: dict[str, Any], images: Path, template: ChatTemplate, manifest: Manifest
) -> Asked:
    """Tiles and prompt of a question, made as the training packs were."""
    tiling = Tiling(
        tile_size=manifest.image_size,
        min_tiles=manifest.min_tiles,
        max_tiles=manifest.max_tiles,
        thumbnail=manifest.thumbnail,
    )
    names = [item["image"]] if isinstance(item["image"], str) else item["image"]
    tiles = []
    for name in names:
        encoded = (images / name).read_bytes()
        columns, rows = tiling.grid(*read_size(encoded), images=len(names))
        tiles.append(decode_tiles(encoded, columns, rows, manifest.image_size, manifest.thumbnail))
    turns = [Turn(role="system", text=item["system"]), Turn(role="human", text=item["question"])]
    tokens = template.prompt(turns, [len(tile) for tile in tiles])
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (manifest.pixel_mean, manifest.pixel_std)
    )
    pixels = (torch.from_numpy(np.concatenate(tiles)).float() / 255 - mean) / std
    return Asked(tokens=torch.from_numpy(tokens.astype(np.int64)), pixels=pixels)


@torch.no_grad()
def answer(
    model: InternVLForConditionalGeneration, asked: list[Asked], template: ChatTemplate
) -> list[str]:
    """Greedy answers, a batch of prompts at a time, padded on the left."""
    answers = []
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        length = max(len(one.tokens) for one in batch)
        tokens, mask = torch.zeros(2, len(batch), length, dtype=torch.long)
        for row, one in enumerate(batch):
            tokens[row, length - len(one.tokens) :] = one.tokens
            mask[row, length - len(one.tokens) :] = 1
        pixels = torch.cat([one.pixels for one in batch])
        made = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            pixel_values=pixels,
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
        )
        answers += [template.text(row).strip() for row in made[:, length:]]
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exam", type=Path, required=True, help="questions, made by make_data.py")
    parser.add_argument("--images", type=Path, required=True, help="folder of their pictures")
    parser.add_argument(
        "--packs", type=Path, required=True, help="a packed dataset: how images become tiles"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "models",
        nargs="+",
        metavar="STAGE=DIR",
        help="exported models by the stage that they come from",
    )
    options = parser.parse_args()
    manifest = read_manifest(options.packs)
    exam = [json.loads(line) for line in options.exam.read_text().splitlines()]
    results = {}
    for stage, folder in (entry.split("=", 1) for entry in options.models):
        template = ChatTemplate(
            load_tokenizer(folder), manifest.features_per_tile, name=manifest.template
        )
        asked = [prepare(item, options.images, template, manifest) for item in exam]
        model = InternVLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
        results[stage] = answer(model, asked, template)
        right = sum(
            given == item["answer"] for given, item in zip(results[stage], exam, strict=True)
        )
        print(f"stage {stage}: {right} of {len(exam)} answers right")
    options.out.write_text(json.dumps({"exam": exam, "answers": results}) + "\n")


if __name__ == "__main__":
    main()
