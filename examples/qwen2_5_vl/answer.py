"""Let transformers answer the questions of the exam, with exported Qwen2.5-VL models and their own
processors, and write summary.json.

python examples/qwen2_5_vl/answer.py OUT --seconds 300
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.utils import is_torchvision_available

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "llava"))
from answer import share_right as share_as_packed
from try_out import Exam, compare, read_exam

FRAMES = 6  # of a video
MAX_NEW_TOKENS = 6  # three digits, and what ends them


class WithoutVideos(Qwen2_5_VLProcessor):
    """The processor without its video processor, which needs torchvision (transformers 5.23)."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Check what is there; the processor calls this."""
        if argument is not None:
            return super().check_argument_for_proper_class(argument_name, argument)
        return None


def load_processor(folder: Path) -> Qwen2_5_VLProcessor:
    """Load a processor; without torchvision, one of images and texts."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    words = AutoTokenizer.from_pretrained(folder)
    return WithoutVideos(images, words, chat_template=template)


@torch.no_grad()
def share_right(out: Path, name: str, exam: Exam) -> float:
    """Return the share of questions that an exported model answers right."""
    folder = out / "exported" / name
    processor = load_processor(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    right = 0
    for record in exam:
        question, answer = (turn["value"] for turn in record["conversations"])
        words = {"type": "text", "text": question.replace("<image>", "").strip()}
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, words]}], add_generation_prompt=True
        )
        image = Image.open(out / "data" / "images" / record["image"]).convert("RGB")
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        told = processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += told.strip() == answer
    return right / len(exam)


def about_videos(out: Path) -> dict[str, Any]:
    """Return the share of first questions about held-out videos that are answered right, by
    transformers before and after, whose tokens and pixels are made as for packs, and by the trainer
    itself; and that of boards by the trainer. One that guesses digits has a tenth.
    """
    exam = read_exam(out, "video_exam")
    how = ("packs/stage3", FRAMES, MAX_NEW_TOKENS)
    lines = (out / "runs" / "sft" / "metrics.jsonl").read_text().splitlines()
    told = {name: value for line in lines for name, value in json.loads(line).items()}
    return {
        "metric_after_by_the_trainer": told["boards/accuracy"],
        "metric_before_of_videos": share_as_packed(out, "start", exam, *how),
        "metric_after_of_videos": share_as_packed(out, "sft", exam, *how),
        "metric_after_of_videos_by_the_trainer": told["films/accuracy"],
    }


if __name__ == "__main__":
    compare(__doc__, share_right, "start", "sft", about_videos)
