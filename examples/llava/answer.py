"""Let transformers answer the questions of the exam, with exported LLaVA models, and write
summary.json.

python examples/llava/answer.py OUT --seconds 300
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from try_out import Exam, compare

from megavlm.convert.hf.reference import load_reference
from megavlm.evaluate.by_transformers import generate
from megavlm.evaluate.packs import prepare
from megavlm.evaluate.task import read_tasks


def share_right(out: Path, name: str, exam: Exam) -> float:
    """Return the share of first questions that an exported model answers right; prompts and pixels
    are made as for the packs of stage 2.
    """
    rows = []
    for record in exam:
        question, answer = (turn["value"] for turn in record["conversations"][:2])
        image = str((out / "data" / "images" / record["image"]).resolve())
        rows.append({"question": question, "answer": answer, "image": image})
    path = out / "exam.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [task] = read_tasks((str(path),))
    asked = prepare(task, out / "packs" / "stage2")
    given = generate(load_reference(out / "exported" / name), asked, max_new_tokens=4)
    right = [asked.text(tokens) == row["answer"] for tokens, row in zip(given, rows, strict=True)]
    return sum(right) / len(exam)


if __name__ == "__main__":
    compare(__doc__, share_right, "stage1", "stage2")
