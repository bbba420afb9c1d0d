"""Let transformers answer the questions of the exam, with exported LLaVA models, and write
summary.json.

python examples/llava/answer.py OUT --seconds 300
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from try_out import Exam, compare, read_exam

from megavlm.convert.hf.reference import load_reference
from megavlm.evaluate.by_transformers import generate
from megavlm.evaluate.packs import prepare
from megavlm.evaluate.task import read_tasks


def share_right(
    out: Path,
    name: str,
    exam: Exam,
    packs: str = "packs/stage2",
    frames: int = 3,
    max_new_tokens: int = 4,
) -> float:
    """Return the share of first questions that an exported model answers right; prompts and pixels
    are made as for packs.

    Args:
        out: folder of try.sh.
        name: of the export.
        exam: records of boards or videos.
        packs: in ``out``.
        frames: that are shown of a video.
        max_new_tokens: longest answer.
    """
    rows = []
    for record in exam:
        question, answer = (turn["value"] for turn in record["conversations"][:2])
        media: dict[str, Any] = {
            key: str((out / "data" / "images" / record[key]).resolve())
            for key in ("image", "video")
            if key in record
        }
        if "video" in media:
            media["frames"] = frames
        rows.append({"question": question, "answer": answer, **media})
    path = out / "exam.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [task] = read_tasks((str(path),))
    asked = prepare(task, out / packs)
    given = generate(load_reference(out / "exported" / name), asked, max_new_tokens)
    right = [asked.text(tokens) == row["answer"] for tokens, row in zip(given, rows, strict=True)]
    return sum(right) / len(exam)


def about_videos(out: Path) -> dict[str, Any]:
    """Return the share of first questions about held-out videos that are answered right, before and
    after stage 3; nothing if there are no videos. One that guesses digits has a tenth.
    """
    exam = read_exam(out, "video_exam")
    return {
        f"metric_{when}_of_videos": share_right(out, name, exam)
        for when, name in (("before", "stage2"), ("after", "stage3"))
        if exam
    }


if __name__ == "__main__":
    compare(__doc__, share_right, "stage1", "stage2", about_videos)
