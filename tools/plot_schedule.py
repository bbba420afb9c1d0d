"""Print learning rate and weight decay of a training command, and draw them.

python tools/plot_schedule.py --stage 2 --lr-decay-style WSD --optimizer.wsd_decay_steps 500
python tools/plot_schedule.py --config examples/quickstart/stage2.yaml --picture rates.png
python tools/plot_schedule.py --stage 1 --json rates.json

All options but those below are those of pretrain_vlm.py; a model is not needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.config.checks.limits import at_least
from megavlm.config.checks.optimizer import optimizer_problems
from megavlm.config.cli import parse
from megavlm.config.option_types import new_file, new_picture
from megavlm.config.schema import Config
from megavlm.model_source import read_model
from megavlm.train.schedule import learning_rate, weight_decay

_ROWS = 20


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="write the rates of every step"
    )
    parser.add_argument("--picture", type=new_picture, metavar="FILE", help="draw the rates")
    options, others = parser.parse_known_args(arguments)
    if not _names_model(others):
        others += ["--model", "tiny"]
    config = parse(others, read_model=read_model, find_problems=_problems)
    settings = config.optimizer
    steps = config.training.steps
    rates = [
        (step, learning_rate(step, settings, steps), weight_decay(step, settings, steps))
        for step in range(steps)
    ]
    print(f"{'update':>10}  {'learning rate':>13}  {'weight decay':>12}")
    shown = sorted({*range(0, steps, -(-steps // _ROWS)), settings.warmup(steps), steps - 1})
    for step, rate, decay in (rates[step] for step in shown if step < steps):
        print(f"{step + 1:>10,}  {rate:>13.6g}  {decay:>12.6g}")
    try:
        if options.json:
            rows = [{"update": step + 1, "lr": rate, "decay": decay} for step, rate, decay in rates]
            options.json.write_text(json.dumps(rows) + "\n", encoding="utf-8")
        if options.picture:
            _draw(rates, settings.schedule, options.picture)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _problems(config: Config, ranks: int) -> list[str]:
    """Return what is wrong with the optimizer's settings; a schedule needs no data."""
    return [
        *at_least(1, "training", config.training, "steps"),
        *optimizer_problems(config.optimizer, config.training),
    ]


def _names_model(words: list[str]) -> bool:
    """Return whether the command line or a file that it names has a model."""
    files = [after for word, after in zip(words, words[1:], strict=False) if word == "--config"]
    files += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    lines = [
        line
        for file in files
        if Path(file).is_file()
        for line in Path(file).read_text(encoding="utf-8").splitlines()
    ]
    return any(word.split("=")[0] == "--model" for word in words) or any(
        line.startswith("model:") for line in lines
    )


def _draw(rates: list[tuple[int, float, float]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, column, name in zip(
        figure.subplots(1, 2), (1, 2), ("learning rate", "weight decay"), strict=True
    ):
        axes.plot([row[0] + 1 for row in rates], [row[column] for row in rates])
        axes.set(xlabel="update", title=f"{name} ({title})" if column == 1 else name)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
