"""Let transformers caption held-out images with an exported BLIP-2 model, and write summary.json.

python examples/blip2/answer.py OUT --seconds 300
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, Blip2ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from try_out import forget_qformer, parse, write_summary

END = "\n"


@torch.no_grad()
def share_right(model: Blip2ForConditionalGeneration, folder: Path, data: Path) -> float:
    """Return the share of held-out images whose caption is right, word for word."""
    processor = AutoProcessor.from_pretrained(folder)
    records = [json.loads(line) for line in (data / "valid.jsonl").open()]
    images = [Image.open(data / "images" / record["image"]) for record in records]
    inputs = processor(images=images, text=[""] * len(images), return_tensors="pt")
    made = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
    texts = processor.batch_decode(made, skip_special_tokens=True)
    said = [text.partition(END)[0].strip() for text in texts]
    wanted = [record["conversations"][1]["value"] for record in records]
    return sum(one == other for one, other in zip(said, wanted, strict=True)) / len(records)


def main() -> None:
    options = parse(__doc__)
    out = options.out
    folder = out / "exported" / "stage2"
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    after = share_right(model, folder, out / "data")
    forget_qformer(model)
    facts = {
        **json.loads((out / "recall.json").read_text()),
        "metric": "share of held-out images that transformers captions right, word for word",
        "metric_before": share_right(model, folder, out / "data"),
        "metric_after": after,
    }
    write_summary(options, facts)


if __name__ == "__main__":
    main()
