"""The command line of ``tools/score_dataset.py``."""

from __future__ import annotations

import argparse
from typing import Any

from megavlm.config.option_types import existing
from megavlm.data.packing.command_line import add_files
from megavlm.data.records.meta_file import read_sources

DESCRIPTION = "Write how similar image and text of each record are, by a model of two encoders."
EXAMPLE = """example:
  python tools/score_dataset.py --model clip-vit-large-patch14-336/ --jsonl captions.jsonl \\
      --root images/ --out scores/captions
  python tools/pack_dataset.py --jsonl captions.jsonl --filter scores=scores/captions \\
      min_score=0.28 drop_duplicates=true ...
The folder --out appears when it is complete; its unscored.jsonl lists the records without a score.
docs/data.md says what is in it.
"""


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, and return the fields of the ``Job`` that it asks for.

    Raises:
        ValueError, FileNotFoundError: a meta file or annotation file that cannot be read.
    """
    given = vars(make_parser().parse_args(arguments))
    sources = read_sources(given.pop("meta"), given.pop("jsonl"), given.pop("root"))
    return {"sources": sources, **given}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_files(parser)
    _add_options(parser)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add what is not about the records."""
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR",
        required=True,
        type=existing,
        help=(
            "what scores: a CLIPModel or SiglipModel (a folder, or an id in the hub's cache), or a"
            " checkpoint of such a model"
        ),
    )
    add("--out", metavar="DIR", required=True, help="folder to make; must be missing or empty")
    add(
        "--tokenizer",
        metavar="DIR",
        default="",
        type=existing,
        help="folder of the tokenizer (default: the model's own)",
    )
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add(
        "--batch",
        type=int,
        default=64,
        metavar="N",
        help="most pairs that are embedded at once (default: %(default)s)",
    )
    _add_images(parser)
    _add_workers(parser)


def _add_images(parser: argparse.ArgumentParser) -> None:
    """Add what is asked of the images' embeddings."""
    add = parser.add_argument
    add(
        "--duplicates",
        type=float,
        default=0.98,
        metavar="COSINE",
        help=(
            "cosine from which two images count as the same; 0: do not look (default: %(default)s)"
        ),
    )
    add(
        "--places",
        action="store_true",
        help=(
            "also put all records on a path on which similar images stand side by side, for --near"
            " of tools/pack_dataset.py"
        ),
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    """Add where the work is done."""
    add = parser.add_argument
    add(
        "--workers",
        type=int,
        metavar="N",
        help=(
            "processes, each with a copy of the model, which share the GPUs of the machine; 0: this"
            " one only (default: two for each GPU, or all cores)"
        ),
    )
    add(
        "--executor",
        choices=("processes", "ray"),
        default="processes",
        help="where workers run (default: %(default)s)",
    )
