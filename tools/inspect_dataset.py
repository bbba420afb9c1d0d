"""Show what is in a packed dataset: counts, fill, spreads, sources, rejects, and an image of
packs.

python tools/inspect_dataset.py packs/train
python tools/inspect_dataset.py packs/train --check --json overview.json --picture packs.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.config.option_types import count_from, new_file, new_picture
from megavlm.data.inspect.statistics import overview_of, to_text
from megavlm.data.store.reader import Reader
from megavlm.io.early_end import allow_early_end


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of a packed dataset")
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="write the same figures as JSON"
    )
    parser.add_argument(
        "--check", action="store_true", help="read every byte and verify all checksums"
    )
    parser.add_argument(
        "--picture",
        type=new_picture,
        metavar="FILE",
        help="draw packs: tiles, text with the supervised part marked, mask",
    )
    parser.add_argument(
        "--packs",
        type=count_from(0),
        nargs="+",
        metavar="ID",
        help="packs to draw (default: three, spread over the dataset)",
    )
    options = parser.parse_args(arguments)
    if options.packs and not options.picture:
        parser.error("argument --packs: no effect without --picture; leave it out")
    try:
        text = show(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


def show(options: argparse.Namespace) -> str:
    """Write and draw what the options ask for, and return the figures as text."""
    reader = Reader(options.folder)
    for number in options.packs or ():
        if number >= len(reader):
            raise ValueError(f"--packs {number}: the packs are 0 to {len(reader) - 1}")
    overview = overview_of(reader, check=options.check)
    text = to_text(overview)
    if options.json:
        options.json.write_text(overview.to_json(), encoding="utf-8")
    if options.picture:
        from megavlm.data.inspect.draw import draw
        from megavlm.data.loading.dataset import PackedDataset

        ids = options.packs or sorted({0, len(reader) // 2, len(reader) - 1})
        draw(PackedDataset(options.folder), ids, options.picture)
        text += f"\n\n  drew packs {', '.join(map(str, ids))} to {options.picture}"
    return text


if __name__ == "__main__":
    with allow_early_end():
        sys.exit(main())
