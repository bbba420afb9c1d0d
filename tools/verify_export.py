#!/usr/bin/env python3
"""Compare an exported model with the checkpoint that it came from: logits of both on the same
packed samples. Prints PASS or FAIL; the exit status is 0, 1 if they differ, 2 if the inputs cannot
be compared.

python tools/verify_export.py --load runs/stage2 --hf exported --data packs/valid --packs 4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.config.option_types import count_from, existing, new_file
from tools.verification.agreement import LIMITS, Agreement


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    load = "checkpoint: the folder of a step, or of a run"
    parser.add_argument("--load", required=True, metavar="DIR", type=existing, help=load)
    hf = "the exported Hugging Face folder, in the native dialect"
    parser.add_argument("--hf", required=True, metavar="DIR", type=existing, help=hf)
    data = "packed dataset of the same tokenizer and tiles"
    parser.add_argument("--data", required=True, metavar="DIR", type=existing, help=data)
    packs = "packs to compare, spread over all (default: %(default)s)"
    parser.add_argument("--packs", default=4, type=count_from(1), metavar="N", help=packs)
    dtype = "dtype of both models (default: float32)"
    parser.add_argument("--dtype", choices=LIMITS, default="float32", help=dtype)
    shares = ", ".join(f"{share:g} in {name}" for name, share in LIMITS.items())
    limit = f"largest accepted difference of two logits (default, of the largest logit: {shares})"
    parser.add_argument("--limit", type=float, help=limit)
    ema = "the export has the moving averages (--ema.export true, or export --ema)"
    parser.add_argument("--ema", action="store_true", help=ema)
    parser.add_argument(
        "--json", metavar="FILE", type=new_file, help="write the figures to a file too"
    )
    return parser.parse_args(arguments)


def report(found: Agreement, limit: float | None) -> int:
    """Print the figures and the verdict; return the exit status."""
    print(f"checkpoint: {found.checkpoint}")
    print(
        f"{found.samples} samples, {found.tokens} tokens, computed in {found.dtype}: largest"
        f" difference of logits {found.max_abs_difference:.2e}"
    )
    print(f"the same token ranks first at {found.equal_choices} of {found.tokens} positions")
    if found.choices:
        print(
            f"{found.other_choices} of {found.choices} choices of experts differ, by scores of at"
            f" most {found.largest_shortfall:.2e} of the highest; both models take those of"
            " transformers"
        )
    failures = found.failures(limit)
    for failure in failures:
        print(f"FAIL: {failure}")
    if not failures:
        print("PASS: the exported model computes what the checkpoint does")
    return int(bool(failures))


def main() -> int:
    """Run the tool."""
    options = parse()
    # Only now: help and mistakes on the command line should not wait for torch. First that which
    # keeps megatron-core from warning of packages that it could use.
    import megavlm.train  # noqa: F401
    from tools.verification.logits import compare

    try:
        found = compare(
            options.load,
            Path(options.hf),
            Path(options.data),
            options.packs,
            options.dtype,
            averages=options.ema,
        )
    except (ValueError, OSError) as error:
        print(f"verify_export: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        content = dataclasses.asdict(found) | {"failures": found.failures(options.limit)}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return report(found, options.limit)


if __name__ == "__main__":
    sys.exit(main())
