"""List the parameters of a training command by group: tensors, parameters, learning rate, weight
decay, frozen.

python tools/show_parameters.py --model internvl2_5-1b --stage 2 --optimizer.decay matrices
python tools/show_parameters.py --model InternVL2_5-8B/ --stage 1 --json groups.json --names

All options but those below are those of pretrain_vlm.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.config.checks.optimizer import optimizer_problems
from megavlm.config.cli import parse
from megavlm.config.option_types import new_file
from megavlm.config.schema import Config
from megavlm.job_checks import with_parameter_problems
from megavlm.model_source import read_model
from megavlm.planner.parameter_table import parameter_table, table_lines


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write groups with all names")
    parser.add_argument("--names", action="store_true", help="print the names of each group")
    options, others = parser.parse_known_args(arguments)
    config = parse(others, read_model=read_model, find_problems=_problems)
    rows = parameter_table(config)
    lines = table_lines(config, rows)
    print(next(lines))
    for row, line in zip(rows, lines, strict=True):
        print("\n".join([line, *(f"    {name}" for name in row.names if options.names)]))
    trained = sum(row.parameters for row in rows if not row.frozen)
    print(f"trainable: {trained:,} of {sum(row.parameters for row in rows):,} parameters")
    if options.json:
        groups = [
            dataclasses.asdict(row) | {"lr": config.optimizer.lr * row.multiplier} for row in rows
        ]
        try:
            options.json.write_text(json.dumps(groups, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def _problems(config: Config, ranks: int) -> list[str]:
    """Return what is wrong with the groups and their rates; they need no data."""
    wrong = list(optimizer_problems(config.optimizer, config.training))
    return with_parameter_problems(config, wrong)


if __name__ == "__main__":
    sys.exit(main())
