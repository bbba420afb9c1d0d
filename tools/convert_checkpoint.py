"""Move a model between Hugging Face folders and the checkpoints of training. `COMMAND --help` tells
how.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.config.hub_cache import find_folder
from megavlm.convert.hf import convert
from megavlm.convert.hf.check_files import FileCheck, check_files
from megavlm.convert.hf.command_line import export, parse, upcycling


def report(files: list[FileCheck], parts: list[convert.PartCheck]) -> int:
    """Print what the check found, and return 1 if anything changed."""
    for file in files:
        print(f"{file.name:24} {file.note or ('changed' if file.changes else 'equal')}")
        for change in file.changes:
            print(f"    {change}")
    print(f"{'part':24} {'tensors':>8} {'bytes':>16}  equal")
    for part in parts:
        print(
            f"{part.part:24} {part.tensors:8,} {part.nbytes:16,}  {'no' if part.changed else 'yes'}"
        )
        for name in part.changed:
            print(f"    changed: {name}")
        for name in part.widened:
            print(f"    same values in a wider dtype: {name}")
    return int(any(part.changed for part in parts) or any(file.changes for file in files))


def main() -> int:
    """Run the tool; 0 where it went well, 1 where a check found a difference, 2 with a message
    where the input is at fault.
    """
    args = parse(__doc__)
    try:
        source = find_folder(args.hf, "--hf") if "hf" in args else None
        if args.command == "check":
            return report(check_files(source), convert.check(source))
        if args.command == "import":
            made = convert.import_(
                source,
                args.out,
                tokenizer=args.tokenizer,
                adapters=args.peft,
                upcycling=upcycling(args),
            )
            print(f"checkpoint written to {made}")
        else:
            export(args)
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
