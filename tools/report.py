"""Write one page about runs: curves side by side, different settings, events, example answers.

python tools/report.py checkpoints/stage2 --out report.html
python tools/report.py full=checkpoints/full lora=checkpoints/lora --out report.html --answers 50
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.config.option_types import count_from, existing_named, named, new_file


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]DIR", type=existing_named, help="save folders of runs"
    )
    parser.add_argument(
        "--out",
        type=new_file,
        default="report.html",
        metavar="FILE",
        help="page to write (default: %(default)s)",
    )
    parser.add_argument(
        "--answers",
        type=count_from(0),
        default=20,
        metavar="N",
        help="answers shown of a task (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    # Only now: help and mistakes on the command line should not wait for torch.
    from megavlm.report.page import write_report
    from megavlm.report.run_log import read_run

    try:
        runs = [read_run(folder, name) for name, folder in map(named, options.runs)]
        twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
        if twice:
            raise ValueError(f"two runs are called {twice[0]}; name them: NAME=DIR")
        write_report(options.out, runs, options.answers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
