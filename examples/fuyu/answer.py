"""Let transformers answer the questions of the exam, with exported Fuyu models and their own
processors, and write summary.json.

python examples/fuyu/answer.py OUT --seconds 300
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, FuyuForCausalLM, FuyuProcessor
from transformers.utils import is_torchvision_available

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from try_out import Exam, compare


def load_processor(folder: Path) -> FuyuProcessor:
    """Load a processor. Without torchvision its image processor takes arrays, and is given tensors
    (transformers 5.23).
    """
    processor = AutoProcessor.from_pretrained(folder)
    if not is_torchvision_available():
        cut = processor.image_processor.patchify_image

        def cut_tensor(image: Tensor, patch_size: Any = None) -> Tensor:
            return torch.from_numpy(cut(image.numpy(), patch_size))[None]

        processor.image_processor.patchify_image = cut_tensor
    return processor


@torch.no_grad()
def share_right(out: Path, name: str, exam: Exam) -> float:
    """Return the share of questions that an exported model answers right."""
    folder = out / "exported" / name
    images = out / "data" / "images"
    processor = load_processor(folder)
    model = FuyuForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    right = 0
    for record in exam:
        question, answer = (turn["value"] for turn in record["conversations"])
        text = question.replace("<image>", "").strip() + "\n"
        image = Image.open(images / record["image"]).convert("RGB")
        inputs = processor(
            images=image, text=text, return_tensors="pt", return_legacy_image_output=False
        )
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        told = processor.decode(made[0, inputs["input_ids"].shape[1] :])
        right += told.partition("|ENDOFTEXT|")[0].strip() == answer
    return right / len(exam)


if __name__ == "__main__":
    compare(__doc__, share_right, "start", "whole")
