"""The quickstart's table and OUT/summary.json, of what its other steps have written.

python examples/quickstart/summary.py OUT --seconds 500
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STAGES = {"0": "stage0", "1": "stage1", "1.5": "stage1_5", "2": "stage2"}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def summarise(out: Path, seconds: int) -> dict[str, Any]:
    """Collect what OUT/summary.json holds."""
    answered = json.loads((out / "evaluated" / "summary.json").read_text())
    runs = {
        stage: read_lines(out / "runs" / name / "metrics.jsonl") for stage, name in STAGES.items()
    }
    losses = {
        stage: [record["valid_loss"] for record in run if "valid_loss" in record]
        for stage, run in runs.items()
    }
    start = "exam/accuracy/"
    trained, exported = (
        read_lines(max((folder / "answers").glob("step-*")) / "exam.jsonl")
        for folder in (out / "runs" / STAGES["2"], out / "evaluated" / "2" / "run")
    )
    return {
        "accuracy": answered["2"]["exam/accuracy"],
        "accuracy_by_question": {
            name.removeprefix(start): value
            for name, value in answered["2"].items()
            if name.startswith(start)
        },
        "accuracy_by_stage": {stage: found["exam/accuracy"] for stage, found in answered.items()},
        "questions": len(exported),
        "same_answers": sum(map(dict.__eq__, trained, exported)),
        "loss_by_stage": {
            stage: {"before": found[0], "after": found[-1]} for stage, found in losses.items()
        },
        "trained_parameters_by_stage": {
            stage: run[0]["trainable_parameters"] for stage, run in runs.items()
        },
        "hf_max_abs_diff": json.loads((out / "verify.json").read_text())["max_abs_difference"],
        "seconds": seconds,
    }


def print_table(summary: dict[str, Any]) -> None:
    """Print a line for each stage, and what transformers makes of the exported model."""
    print(
        f"{'stage':>5} {'trained parameters':>19} {'validation loss before':>21} {'after':>7}"
        f" {'accuracy':>9}"
    )
    for stage, loss in summary["loss_by_stage"].items():
        share = summary["accuracy_by_stage"].get(stage)
        shown = f"{share:9.1%}" if share is not None else f"{'':>9}"
        print(
            f"{stage:>5} {summary['trained_parameters_by_stage'][stage]:>19,}"
            f" {loss['before']:>21.4f} {loss['after']:>7.4f} {shown}"
        )
    kinds = ", ".join(
        f"{kind} {share:.1%}" for kind, share in summary["accuracy_by_question"].items()
    )
    print(
        f"after stage 2, {summary['accuracy']:.1%} of {summary['questions']} held-out questions are"
        f" answered right: {kinds}"
    )
    print(
        f"transformers answers {summary['same_answers']} of {summary['questions']} questions token"
        " for token as the trainer does; the largest difference between their logits is"
        f" {summary['hf_max_abs_diff']:.1e}"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the quickstart")
    parser.add_argument("--seconds", type=int, required=True, help="how long everything took")
    options = parser.parse_args()
    summary = summarise(options.out, options.seconds)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_table(summary)


if __name__ == "__main__":
    main()
