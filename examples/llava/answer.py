"""Let transformers answer the questions of the exam, with exported LLaVA models, and write
summary.json.

python examples/llava/answer.py OUT --seconds 300
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from megavlm.data.images.tiling import pad_colour
from megavlm.data.images.transforms import decode_changed
from megavlm.data.records.record import Turn
from megavlm.data.store.manifest import read_manifest
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer


@torch.no_grad()
def share_right(folder: Path, packs: Path, exam: list[dict[str, Any]], images: Path) -> float:
    """Return the share of first questions that an exported model answers right; prompts and pixels
    are made as for the packs.
    """
    facts = read_manifest(packs)
    template = ChatTemplate(load_tokenizer(folder), facts.features_per_tile, name=facts.template)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in (facts.pixel_mean, facts.pixel_std))
    colour = pad_colour(facts.tiling, facts.pixel_mean)
    right = 0
    for record in exam:
        question, answer = (turn["value"] for turn in record["conversations"][:2])
        encoded = (images / record["image"]).read_bytes()
        tile = decode_changed(
            encoded, 1, 1, facts.image_size, False, pad_colour=colour, crops=facts.tiling == "crop"
        )
        tokens = torch.from_numpy(
            template.prompt([Turn(role="human", text=question)], [1]).astype(np.int64)
        )[None]
        pixels = (torch.from_numpy(tile).float() / 255 - mean) / std
        made = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=pixels,
            max_new_tokens=4,
            do_sample=False,
        )
        right += template.text(made[0, tokens.shape[1] :]).strip() == answer
    return right / len(exam)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of try.sh")
    parser.add_argument("--seconds", type=int, required=True, help="that try.sh took so far")
    options = parser.parse_args()
    out = options.out
    exam = [json.loads(line) for line in (out / "data" / "exam.jsonl").read_text().splitlines()]
    found = {
        stage: share_right(
            out / "exported" / stage, out / "packs" / "stage2", exam, out / "data" / "images"
        )
        for stage in ("stage1", "stage2")
    }
    verified = json.loads((out / "verify.json").read_text())
    summary = {
        "hf_max_abs_diff": verified["max_abs_difference"],
        "metric": "share of right answers to held-out questions, by transformers",
        "metric_before": found["stage1"],
        "metric_after": found["stage2"],
        "seconds": options.seconds,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
