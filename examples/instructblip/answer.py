"""Let transformers answer questions about held-out images with an exported InstructBLIP, and write
summary.json.

python examples/instructblip/answer.py OUT --seconds 300
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, InstructBlipForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from try_out import Exam, forget_qformer, parse, read_exam, write_summary


def question_of(record: dict) -> str:
    """Return the question of a record, without the image."""
    return record["conversations"][0]["value"].removeprefix("<image>")


@torch.no_grad()
def share_right(
    model: InstructBlipForConditionalGeneration, out: Path, exam: Exam, shift: int = 0
) -> float:
    """Return the share of questions that are answered right.

    Args:
        model: the exported model.
        out: folder of try.sh.
        exam: the questions, all about an image behind each other; each kind has equally many words.
        shift: let the Q-Former read the question so many records later, which is about another
            fact, while the language model reads the right one.
    """
    processor = AutoProcessor.from_pretrained(out / "exported" / "stage1")
    images = [Image.open(out / "data" / "images" / record["image"]) for record in exam]
    questions = [question_of(record) for record in exam]
    others = questions[shift:] + questions[:shift]
    inputs = processor(images=images, text=questions, return_tensors="pt")
    read = processor(images=images, text=others, return_tensors="pt")
    inputs |= {name: read[name] for name in ("qformer_input_ids", "qformer_attention_mask")}
    made = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False)
    texts = processor.batch_decode(made, skip_special_tokens=True)
    wanted = [record["conversations"][1]["value"] for record in exam]
    said = [text.rpartition(" this")[2].strip() for text in texts]
    return sum(one == other for one, other in zip(said, wanted, strict=True)) / len(exam)


def main() -> None:
    options = parse(__doc__)
    out = options.out
    exam = read_exam(out, "exam")
    folder = out / "exported" / "stage1"
    model = InstructBlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    facts = {
        "metric": "share of questions about held-out images that transformers answers right",
        "metric_after": share_right(model, out, exam),
        "metric_if_the_qformer_reads_another_question": share_right(model, out, exam, shift=1),
    }
    forget_qformer(model)
    write_summary(options, facts | {"metric_before": share_right(model, out, exam)})


if __name__ == "__main__":
    main()
