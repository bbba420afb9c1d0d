#!/usr/bin/env python3
"""Compare an exported model with the checkpoint that it came from: logits of both on the same
packed samples.

python tools/verify_export.py --load runs/stage2 --hf exported --data packs/valid --packs 4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from megavlm.train.verify import compare


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load", required=True, metavar="DIR", help="checkpoint: the folder of a step, or of a run"
    )
    parser.add_argument(
        "--hf", required=True, metavar="DIR", type=Path, help="the exported Hugging Face folder"
    )
    parser.add_argument(
        "--data", required=True, metavar="DIR", type=Path, help="packed dataset to compare on"
    )
    parser.add_argument("--packs", default=4, type=int, help="packs to compare (default: 4)")
    parser.add_argument(
        "--limit",
        default=1e-4,
        type=float,
        help="largest difference between two logits that is well (default: 1e-4)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to a file too")
    options = parser.parse_args()
    try:
        found = compare(options.load, options.hf, options.data, options.packs)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{found.samples} samples, {found.tokens} tokens: largest difference of logits"
        f" {found.max_abs_difference:.2e}"
    )
    print(f"the same token ranks first at {found.equal_choices} of {found.tokens} positions")
    if options.json:
        options.json.write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    return 0 if found.max_abs_difference <= options.limit else 1


if __name__ == "__main__":
    sys.exit(main())
