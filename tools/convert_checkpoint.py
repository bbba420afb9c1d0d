"""Move a model between Hugging Face folders and the checkpoints of training. `COMMAND --help` tells
how.
"""

from __future__ import annotations

import argparse
import sys

from megavlm.convert.hf import convert
from megavlm.convert.weights.tables import DIALECTS

EXAMPLE = """examples:
  python tools/convert_checkpoint.py import --hf InternVL2_5-1B-hf/ --out checkpoints/start
  python tools/convert_checkpoint.py export --load checkpoints/stage2 --out my-model-hf/ --dtype
  bfloat16
  python tools/convert_checkpoint.py export --load checkpoints/stage2 --out my-model/ --dialect chat
  python tools/convert_checkpoint.py check --hf InternVL2_5-1B-hf/

Training also starts from a Hugging Face folder itself: --checkpoint.load DIR.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    bring = commands.add_parser("import", help="make a checkpoint of a Hugging Face folder")
    bring.add_argument(
        "--hf", metavar="DIR", required=True, help="Hugging Face folder, in either dialect"
    )
    bring.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="folder of the checkpoint to make; must be missing or empty",
    )
    bring.add_argument(
        "--tokenizer",
        metavar="DIR",
        default="",
        help="folder of the tokenizer, if the model's own is Python code",
    )
    send = commands.add_parser("export", help="make a Hugging Face folder of a checkpoint")
    send.add_argument(
        "--load",
        metavar="DIR",
        required=True,
        help="folder of one step, or a run's save folder (then its newest)",
    )
    send.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="Hugging Face folder to make; must be missing or empty",
    )
    send.add_argument(
        "--dialect",
        choices=DIALECTS,
        default="native",
        help="transformers' own format, or OpenGVLab's InternVLChatModel (default: native)",
    )
    send.add_argument(
        "--dtype",
        choices=sorted(convert.DTYPES),
        help="dtype of the weights (default: as in the checkpoint)",
    )
    send.add_argument(
        "--tokenizer",
        metavar="DIR",
        default="",
        help="folder of the tokenizer, if the checkpoint has none",
    )
    look = commands.add_parser(
        "check", help="convert a Hugging Face folder there and back in memory, and compare"
    )
    look.add_argument("--hf", metavar="DIR", required=True, help="Hugging Face folder")
    return parser.parse_args(arguments)


def report(parts: list[convert.PartCheck]) -> int:
    """Print what the check found; 1 where a tensor changed."""
    print(f"{'part':24} {'tensors':>8} {'bytes':>16}  equal")
    for part in parts:
        print(
            f"{part.part:24} {part.tensors:8,} {part.nbytes:16,}  {'no' if part.changed else 'yes'}"
        )
        for name in part.changed:
            print(f"    changed: {name}")
        for name in part.widened:
            print(f"    same values in a wider dtype: {name}")
    return int(any(part.changed for part in parts))


def main() -> int:
    """Run the tool; 0 where it went well, 1 where a check found a difference, 2 with a message
    where the input is at fault.
    """
    args = parse()
    try:
        if args.command == "check":
            return report(convert.check(args.hf))
        if args.command == "import":
            print(
                "checkpoint written to"
                f" {convert.import_(args.hf, args.out, tokenizer=args.tokenizer)}"
            )
        else:
            made = convert.export(
                args.load,
                args.out,
                dialect=args.dialect,
                dtype=convert.DTYPES.get(args.dtype),
                tokenizer=args.tokenizer,
            )
            print(f"Hugging Face model written to {made}")
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
