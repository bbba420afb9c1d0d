"""Measure retrieval of held-out pairs with an exported CLIPModel, by transformers alone.

python examples/contrastive/recall.py DATA MODEL OUT.json SECONDS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel


def recall(model: CLIPModel, data: Path, folder: Path) -> dict[str, float]:
    """Return R@1 both ways, where every caption belongs to one image."""
    records = [json.loads(line) for line in (data / "valid.jsonl").open()]
    images = [Image.open(data / "images" / record["image"]) for record in records]
    texts = [record["conversations"][1]["value"] for record in records]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=pixels["pixel_values"],
        ).logits_per_image
    right = torch.arange(len(records))
    return {
        "text_recall_at_1": float((found.argmax(dim=1) == right).float().mean()),
        "image_recall_at_1": float((found.argmax(dim=0) == right).float().mean()),
    }


if __name__ == "__main__":
    data = Path(sys.argv[1])
    folder = Path(sys.argv[2])
    trained = CLIPModel.from_pretrained(folder)
    torch.manual_seed(0)
    results = {
        "before": recall(CLIPModel(trained.config), data, folder),
        "after": recall(trained, data, folder),
        "seconds": int(sys.argv[4]),
    }
    Path(sys.argv[3]).write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
