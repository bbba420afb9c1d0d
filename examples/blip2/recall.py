"""Score pairs with an exported first stage of BLIP-2: against the trainer's model, and by how often
transformers finds the caption of a held-out image, and the image of a caption.

python examples/blip2/recall.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, Blip2ForImageTextRetrieval

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# First that which keeps megatron-core from warning of packages that it could use.
import megavlm.train  # noqa: F401
from megavlm.config.cli import from_yaml
from megavlm.config.schema import Config
from megavlm.convert.hf import convert
from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.model import weights
from megavlm.model.objective.qformer import similarities, texts_of
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel import backend, process_groups
from megavlm.planner.layout import make_layout


def recall(model: Blip2ForImageTextRetrieval, folder: Path, data: Path) -> float:
    """Return the mean of R@1 both ways, where every caption belongs to one image."""
    records = [json.loads(line) for line in (data / "valid.jsonl").open()]
    images = [Image.open(data / "images" / record["image"]) for record in records]
    texts = [record["conversations"][1]["value"] for record in records]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    pixels = AutoProcessor.from_pretrained(folder).image_processor(images, return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(
            pixel_values=pixels["pixel_values"],
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
        scores = torch.stack(
            [(found.image_embeds @ text).max(dim=1).values for text in found.text_embeds], dim=1
        )
    own = torch.arange(len(records))
    right = [scores.argmax(dim=axis).eq(own).float().mean() for axis in (0, 1)]
    return float(torch.stack(right).mean())


@torch.no_grad()
def largest_difference(config: Config, folder: Path, packs: Path) -> float:
    """Return the largest difference between the scores of the trainer's model and of transformers,
    for the pairs of a pack.
    """
    backend.start(5)
    layout = make_layout(config)
    groups = process_groups.create(config.parallel, 0, layout.embedding_chunk)
    ours = VisionLanguageModel(config, layout, groups).eval()
    weights.fill([ours], convert.full_tensors(folder, config.architecture))
    vision = config.architecture.vision
    batch = PackedDataset(packs).batch(0, 0, BatchOptions(vision_layers=vision.num_layers))
    images, texts, _, hidden = ours(batch)
    ids, lengths = texts_of(batch, config.architecture.image_text.text_tokens)
    mean, std = (torch.tensor(x)[:, None, None] for x in (vision.pixel_mean, vision.pixel_std))
    inputs = dict(
        pixel_values=(batch.tiles[: len(ids)] / 255 - mean) / std,
        input_ids=ids,
        attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    )
    theirs = Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32).eval()
    matched = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    contrasted = theirs(**inputs)
    expected = similarities(contrasted.image_embeds, contrasted.text_embeds)
    differences: list[Tensor] = [
        ours.objective._match(ids, lengths, hidden) - matched,
        similarities(images, texts) - expected,
    ]
    process_groups.destroy()
    return max(float(one.abs().max()) for one in differences)


def main(out: Path) -> None:
    folder = out / "exported" / "stage1"
    step = sorted((out / "runs" / "stage1").glob("step_*"))[-1]
    model = Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32)
    after = recall(model, folder, out / "data")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("vision_model.") and parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    found = {
        "recall_before": recall(model, folder, out / "data"),
        "recall_after": after,
        "itc_itm_max_abs_diff": largest_difference(
            from_yaml(step / "config.yaml"), folder, out / "packs" / "stage1"
        ),
    }
    (out / "recall.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
