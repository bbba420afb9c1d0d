"""Measure an exported CLIPModel by transformers alone, and what its encoders did; write
summary.json.

python examples/contrastive/measure.py OUT --seconds 300
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from try_out import parse, write_summary


@torch.no_grad()
def similarities(model: CLIPModel, out: Path, name: str) -> Tensor:
    """Return the cosines of all images of an annotation file with all its texts [I, T]."""
    folder = out / "exported"
    records = [json.loads(line) for line in (out / "data" / f"{name}.jsonl").open()]
    images = [Image.open(out / "data" / "images" / record["image"]) for record in records]
    texts = [record["conversations"][1]["value"] for record in records]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    found = model.eval()(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        pixel_values=pixels["pixel_values"],
    )
    return found.image_embeds @ found.text_embeds.T


def recall(model: CLIPModel, out: Path) -> float:
    """Return the mean of R@1 both ways, if every caption belongs to one image."""
    found = similarities(model, out, "valid")
    own = torch.arange(len(found))
    right = [found.argmax(dim=axis).eq(own).float().mean() for axis in (0, 1)]
    return float(torch.stack(right).mean())


def auc(wrong: np.ndarray, right: np.ndarray) -> float:
    """Return the share of pairs of a wrong and a right caption of which the wrong one has the lower
    score; a tie counts half.
    """
    lower = (wrong[:, None] < right).mean()
    return float(lower + (wrong[:, None] == right).mean() / 2)


def losses(out: Path) -> dict[str, float]:
    """Return the held-out losses of stage 1."""
    lines = (out / "internvl" / "stage_1" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "valid_loss" in row]
    return {
        "stage1_loss_before": rows[0]["valid_loss"],
        "stage1_loss_after": rows[-1]["valid_loss"],
        "stage1_loss_without_images": rows[-1]["valid_loss_without_images"],
    }


def main() -> None:
    options = parse(__doc__)
    out = options.out
    trained = CLIPModel.from_pretrained(out / "exported")
    torch.manual_seed(0)
    fresh = CLIPModel(trained.config)
    scores = np.load(out / "scores" / "00000.scores.npy")
    theirs = similarities(trained, out, "mixed").diagonal().numpy()
    is_wrong = np.zeros(len(scores), bool)
    is_wrong[json.loads((out / "data" / "mixed_wrong.json").read_text())] = True
    verified = {"max_abs_difference": float(np.abs(scores - theirs).max())}
    (out / "verify.json").write_text(json.dumps(verified) + "\n")
    facts = {
        "recall_before": recall(fresh, out),
        "recall_after": recall(trained, out),
        "mismatch_auc": auc(scores[is_wrong], scores[~is_wrong]),
        **losses(out),
    }
    write_summary(options, facts)


if __name__ == "__main__":
    main()
