"""Let transformers answer the questions of the exam, with exported LLaVA models, and write
summary.json.

python examples/llava/answer.py OUT --seconds 300
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from try_out import Exam, compare

from megavlm.data.images.tiling import pad_colour
from megavlm.data.images.transforms import decode_changed
from megavlm.data.records.record import Turn
from megavlm.data.store.manifest import read_manifest
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer


@torch.no_grad()
def share_right(out: Path, name: str, exam: Exam) -> float:
    """Return the share of first questions that an exported model answers right; prompts and pixels
    are made as for the packs.
    """
    folder = out / "exported" / name
    images = out / "data" / "images"
    facts = read_manifest(out / "packs" / "stage2")
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


if __name__ == "__main__":
    compare(__doc__, share_right, "stage1", "stage2")
