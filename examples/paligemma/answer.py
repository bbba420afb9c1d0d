"""Let transformers answer the questions of the exam, with exported PaliGemma models and their own
processors, and write summary.json.

python examples/paligemma/answer.py OUT --seconds 300
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration


@torch.no_grad()
def share_right(folder: Path, exam: list[dict[str, Any]], images: Path) -> float:
    """Return the share of questions that an exported model answers right."""
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
        stage: share_right(out / "exported" / stage, exam, out / "data" / "images")
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
