"""Write how similar image and text of each record of a dataset are, by a CLIP or SigLIP."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.io.early_end import allow_early_end
from megavlm.score.command_line import parse


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        settings = parse(arguments)
        # Only now: help and mistakes on the command line should not wait for torch.
        from megavlm.score.job import score_dataset
        from megavlm.score.settings import Job

        report = score_dataset(Job(**settings))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"score_dataset: error: {error}", file=sys.stderr)
        return 2
    print(report.text())
    return 0


if __name__ == "__main__":
    with allow_early_end():
        sys.exit(main())
