"""What the programs of the try-outs share: command lines, the exam and the summary."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

Exam = list[dict[str, Any]]


def parse(description: str) -> argparse.Namespace:
    """Parse the command line of an answer.py."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of try.sh")
    parser.add_argument("--seconds", type=int, required=True, help="that try.sh took so far")
    return parser.parse_args()


def parse_parts(description: str, **counts: int) -> argparse.Namespace:
    """Parse the command line of a make_parts.py.

    Args:
        description: of the program.
        counts: options that are numbers, with what they are if they are left out.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    return parser.parse_args()


def forget_qformer(model: PreTrainedModel) -> None:
    """Draw the weights of a model's Q-Former, as before training."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_matrix = parameter.dim() > 1
            if name.startswith(("query_tokens", "qformer.", "language_projection.")) and is_matrix:
                parameter.normal_(0, 0.02)


def write_summary(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Write and print OUT/summary.json: facts, what the comparison with transformers has found, and
    the time.
    """
    verified = json.loads((options.out / "verify.json").read_text())
    summary = {
        "hf_max_abs_diff": verified["max_abs_difference"],
        **facts,
        "seconds": options.seconds,
    }
    text = json.dumps(summary, indent=2)
    (options.out / "summary.json").write_text(text + "\n")
    print(text)


def read_exam(out: Path, name: str) -> Exam:
    """Read an exam that make_parts.py has written, by its name."""
    lines = (out / "data" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def compare(
    description: str,
    share_right: Callable[[Path, str, Exam], float],
    before: str,
    after: str,
    more: Callable[[Path], dict[str, Any]] = lambda out: {},
) -> None:
    """Let two exported models answer the exam, and write the summary.

    Args:
        description: of the program.
        share_right: the share of the exam that a model in OUT answers right, by OUT and the name of
            the export.
        before, after: names of the exports.
        more: further facts, by OUT.
    """
    options = parse(description)
    exam = read_exam(options.out, "exam")
    facts = {
        "metric": "share of right answers to held-out questions, by transformers",
        "metric_before": share_right(options.out, before, exam),
        "metric_after": share_right(options.out, after, exam),
        **more(options.out),
    }
    write_summary(options, facts)
