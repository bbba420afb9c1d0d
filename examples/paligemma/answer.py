"""Let transformers answer the questions of the exam, with exported PaliGemma models and their own
processors, and write summary.json.

python examples/paligemma/answer.py OUT --seconds 300
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from try_out import Exam, compare


@torch.no_grad()
def share_right(out: Path, name: str, exam: Exam) -> float:
    """Return the share of questions that an exported model answers right."""
    folder = out / "exported" / name
    images = out / "data" / "images"
    processor = AutoProcessor.from_pretrained(folder)
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    right = 0
    for record in exam:
        question, answer = (turn["value"] for turn in record["conversations"])
        text = "<image>" + question.replace("<image>", "").strip()
        image = Image.open(images / record["image"]).convert("RGB")
        inputs = processor(images=image, text=text, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        told = processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += told.strip() == answer
    return right / len(exam)


if __name__ == "__main__":
    compare(__doc__, share_right, "stage1", "stage2")
