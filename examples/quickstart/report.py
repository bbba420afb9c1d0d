"""The quickstart's report: a table, OUT/summary.json and OUT/report.png.

python examples/quickstart/report.py OUT --seconds 500
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STAGES = {"0": "stage0", "1": "stage1", "1.5": "stage1_5", "2": "stage2"}
SHOWN = 24


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the figures of a run by name: (step, value) in order."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name not in ("step", "time"):
                series.setdefault(name, []).append((record["step"], value))
    return series


def shares(exam: list[dict[str, Any]], answers: list[str]) -> dict[str, float]:
    """Share of right answers, of each kind of question and of all."""
    right: dict[str, list[bool]] = {}
    for item, given in zip(exam, answers, strict=True):
        right.setdefault(item["kind"], []).append(given == item["answer"])
        right.setdefault("all", []).append(given == item["answer"])
    return {kind: sum(known) / len(known) for kind, known in sorted(right.items())}


def summarise(out: Path, seconds: int) -> dict[str, Any]:
    """Collect what OUT/summary.json holds."""
    answered = json.loads((out / "answers.json").read_text())
    accuracy = {
        stage: shares(answered["exam"], given) for stage, given in answered["answers"].items()
    }
    runs = {stage: read_metrics(out / "runs" / name) for stage, name in STAGES.items()}
    final = dict(accuracy["2"])
    return {
        "accuracy": final.pop("all"),
        "accuracy_by_question": final,
        "accuracy_by_stage": {stage: found["all"] for stage, found in accuracy.items()},
        "questions": len(answered["exam"]),
        "loss_by_stage": {
            stage: {"before": run["valid_loss"][0][1], "after": run["valid_loss"][-1][1]}
            for stage, run in runs.items()
        },
        "trained_parameters_by_stage": {
            stage: int(run["trainable_parameters"][0][1]) for stage, run in runs.items()
        },
        "hf_max_abs_diff": json.loads((out / "verify.json").read_text())["max_abs_difference"],
        "seconds": seconds,
    }


def print_table(summary: dict[str, Any]) -> None:
    """One line a stage."""
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
        "largest difference between megavlm's logits and those of transformers:"
        f" {summary['hf_max_abs_diff']:.1e}"
    )


def draw_curves(axes: list[plt.Axes], out: Path) -> None:
    """Loss and learning rate over the steps of all stages, one after the other."""
    start = 0
    for number, (stage, name) in enumerate(STAGES.items()):
        run = read_metrics(out / "runs" / name)
        for axis, series, style in (
            (axes[0], "loss", dict(alpha=0.5)),
            (axes[0], "valid_loss", dict(marker="o", markersize=4)),
            (axes[1], "lr", {}),
        ):
            steps, values = np.array(run[series]).T
            axis.plot(start + steps, values, color=f"C{number}", **style)
        end = start + run["loss"][-1][0]
        axes[0].axvspan(start, end, color=f"C{number}", alpha=0.08)
        axes[0].text(
            (start + end) / 2,
            0.96,
            f"stage {stage}",
            transform=axes[0].get_xaxis_transform(),
            ha="center",
            va="top",
        )
        start = end
    axes[0].set(ylabel="loss (dots: validation)", yscale="log")
    axes[1].set(ylabel="learning rate", xlabel="step")


def draw_answers(figure: plt.Figure, grid: Any, out: Path) -> None:
    """Draw a sheet of held-out images with question, answer and truth, wrong answers first."""
    answered = json.loads((out / "answers.json").read_text())
    rows = list(zip(answered["exam"], answered["answers"]["2"], strict=True))
    rows.sort(key=lambda row: row[0]["answer"] == row[1])
    wrong = [row for row in rows if row[0]["answer"] != row[1]][:4]
    right = [row for row in rows if row[0]["answer"] == row[1]]
    for place, (item, given) in zip(grid, [*wrong, *right][:SHOWN], strict=False):
        axis = figure.add_subplot(place)
        names = [item["image"]] if isinstance(item["image"], str) else item["image"]
        pictures = [np.asarray(Image.open(out / "data" / "images" / name)) for name in names]
        gap = np.full((pictures[0].shape[0], 4, 3), 255, np.uint8)
        joined = [part for picture in pictures for part in (picture, gap)][:-1]
        axis.imshow(np.concatenate(joined, axis=1), interpolation="nearest")
        axis.set_axis_off()
        question = item["question"].rsplit("\n", 1)[-1].split(". ", 1)[-1]
        colour = "black" if given == item["answer"] else "crimson"
        axis.set_title(f"{question}\n{given} (truth: {item['answer']})", fontsize=7, color=colour)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the quickstart")
    parser.add_argument("--seconds", type=int, required=True, help="how long everything took")
    options = parser.parse_args()
    summary = summarise(options.out, options.seconds)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    figure = plt.figure(figsize=(13, 11), layout="constrained")
    curves, sheet = figure.subfigures(2, 1, height_ratios=[1, 1.6])
    draw_curves(list(curves.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])), options.out)
    draw_answers(sheet, sheet.add_gridspec(4, SHOWN // 4), options.out)
    figure.suptitle(
        f"megavlm quickstart: {summary['accuracy']:.1%} of {summary['questions']} held-out"
        " questions right"
    )
    figure.savefig(options.out / "report.png", dpi=110)
    print_table(summary)


if __name__ == "__main__":
    main()
