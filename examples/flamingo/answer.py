"""Let transformers say what images show behind examples of what is asked, with an exported Flamingo
model, and write summary.json.

python examples/flamingo/answer.py OUT --seconds 300
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, IdeficsForVisionText2Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from try_out import parse, write_summary

SHOTS = (0, 1, 2, 4)


@torch.no_grad()
def share_right(
    model: IdeficsForVisionText2Text,
    processor: Any,
    records: list[dict[str, Any]],
    images: Path,
    shots: int,
) -> float:
    """Return the share of words about the last image of a document that are right, behind so many
    of the images before it with their words.
    """
    prompts = []
    for record in records:
        prompt: list[Any] = []
        for name, said in list(zip(record["image"], record["words"], strict=True))[-1 - shots : -1]:
            prompt += [Image.open(images / name), f"{said} ."]
        prompts.append([*prompt, Image.open(images / record["image"][-1])])
    inputs = processor(text=prompts, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    said = processor.batch_decode(made[:, -1:])
    return sum(
        one.strip() == record["words"][-1] for one, record in zip(said, records, strict=True)
    ) / len(records)


def last_figures(path: Path) -> dict[str, float]:
    """Return the last value of each figure of a run."""
    found: dict[str, float] = {}
    for line in path.read_text().splitlines():
        found |= json.loads(line)
    return found


def main() -> None:
    options = parse(__doc__)
    out = options.out
    folder = out / "exported"
    records = [json.loads(line) for line in (out / "data" / "valid_documents.jsonl").open()]
    model = IdeficsForVisionText2Text.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    images = out / "data" / "images"

    def share(shots: int) -> float:
        return share_right(model, processor, records, images, shots)

    by_shots = {shots: share(shots) for shots in SHOTS}
    for layer in model.model.gated_cross_attn_layers:
        layer.alpha_cross_attn.data.zero_()
        layer.alpha_dense.data.zero_()
    figures = last_figures(out / "run" / "metrics.jsonl")
    facts = {
        "metric": f"share of right words about held-out images behind {SHOTS[-1]} examples, by"
        " transformers; before: with closed gates",
        "metric_before": share(SHOTS[-1]),
        "metric_after": by_shots[SHOTS[-1]],
        "metric_by_shots": by_shots,
        "loss_with_images": figures["valid_loss"],
        "loss_without_images": figures["valid_loss_without_images"],
        "gates": {name: value for name, value in figures.items() if name.startswith("gate/")},
    }
    write_summary(options, facts)


if __name__ == "__main__":
    main()
