"""Say what the stage mpo has learned, of what its run and the comparison with transformers have
written; fail if that is nothing.

python examples/preference/measure.py OUT --seconds 300
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from try_out import parse, read_exam, write_summary

FIGURES = ("valid_loss", "valid_reward_accuracy", "valid_reward_chosen", "valid_reward_rejected")
ACCURACY = "exam/accuracy"


def read_figures(out: Path) -> dict[str, list[float]]:
    """Return the figures of held-out pairs and questions, from the first evaluation to the last."""
    lines = (out / "runs" / "mpo" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "valid_loss" in row]
    return {name: [row[name] for row in rows] for name in (*FIGURES, ACCURACY)}


def problems(found: dict[str, list[float]], difference: float) -> list[str]:
    """Return what a model that has learned does not show."""
    right = found[ACCURACY]
    return [
        text
        for text, is_wrong in (
            (
                "the right answer has the higher reward in less than 85% of the pairs",
                found["valid_reward_accuracy"][-1] < 0.85,
            ),
            ("the share of right answers has not grown by a tenth", right[-1] < right[0] + 0.1),
            (f"transformers has other logits (by {difference:.1e})", difference > 1e-3),
        )
        if is_wrong
    ]


def main() -> None:
    """Run the command line."""
    options = parse(__doc__)
    found = read_figures(options.out)
    difference = json.loads((options.out / "verify.json").read_text())["max_abs_difference"]
    facts: dict[str, Any] = {"questions": len(read_exam(options.out, "exam"))}
    for name, values in found.items():
        facts |= {f"{name}_before": values[0], f"{name}_after": values[-1]}
    write_summary(options, facts)
    print(
        f"before, {found[ACCURACY][0]:.1%} of {facts['questions']} held-out questions are answered"
        f" right; after, {found[ACCURACY][-1]:.1%}, and the right answer has the higher reward in"
        f" {found['valid_reward_accuracy'][-1]:.1%} of the held-out pairs (in none before: every"
        " reward is 0)"
    )
    if wrong := problems(found, difference):
        sys.exit(f"it has not learned what it should: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
