"""The options of programs that let models answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megavlm.config.option_types import count_from, existing


def add_options(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """Add the options of a program that lets models answer.

    Args:
        parser: of the program.
        max_new_tokens: longest answer, if none is given.
    """
    parser.add_argument(
        "--packs",
        type=lambda name: Path(existing(name)),
        metavar="DIR",
        help="packed dataset whose template, tokenizer and tiles are used (default: that which a"
        " checkpoint was trained on)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=count_from(1),
        default=max_new_tokens,
        metavar="N",
        help="most tokens of an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks",
        type=count_from(1),
        default=1,
        metavar="N",
        help="processes (default: %(default)s)",
    )


def parse_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of a program, and those behind ``--``, which are pretrain_vlm.py's.

    Args:
        parser: of the program.
        arguments: the command line; none: this process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:end]), words[end + 1 :]
