"""Types of options that name a folder or a file, or count something, so that a wrong value is
refused as soon as the command line is parsed, before anything slow is imported or computed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from megavlm.config.hub_cache import cached, find_folder


def existing(name: str) -> str:
    """Return the folder ``name``, or the cached snapshot of the hub id ``name``; a URL as it is.

    Raises:
        argparse.ArgumentTypeError: no such folder exists, and the cache has no such model.
    """
    if not name or "://" in name:  # argparse checks a default too
        return name
    try:
        return str(find_folder(name))
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def named(text: str) -> tuple[str, Path]:
    """Split ``NAME=DIR``, of which DIR may be a hub id in the cache, into both; the name is empty
    if there is none, as in a path that exists, whatever it is called.
    """
    name, sign, folder = text.partition("=")
    if sign and not Path(text).exists():
        return name, Path(cached(folder))
    return "", Path(cached(text))


def existing_named(text: str) -> str:
    """Return ``NAME=DIR`` or ``DIR`` as it is.

    Raises:
        argparse.ArgumentTypeError: there is no such folder, and the cache has no such model.
    """
    existing(str(named(text)[1]))
    return text


def existing_file(name: str) -> Path:
    """Return the path of a file; raises ArgumentTypeError if there is none."""
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"{name}: no such file")
    return Path(name)


def existing_path(name: str) -> Path:
    """Return the path of a file or folder; raises ArgumentTypeError if there is none."""
    if not Path(name).exists():
        raise argparse.ArgumentTypeError(f"{name}: no such file or folder")
    return Path(name)


def new_file(name: str) -> Path:
    """Return the path of a file to write; one that exists is replaced.

    Raises:
        argparse.ArgumentTypeError: it is a folder, or no file can be written there.
    """
    path = Path(name)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{name}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name}: no permission to write there")
    return path


def new_picture(name: str) -> Path:
    """Return the path of a picture to write with matplotlib.

    Raises:
        argparse.ArgumentTypeError: as for ``new_file``, or matplotlib is not installed, or does
            not write this kind of file.
    """
    path = new_file(name)
    if not find_spec("matplotlib"):
        raise argparse.ArgumentTypeError(
            "pictures are drawn with matplotlib, which is not installed: pip install"
            " 'megavlm[quickstart]'"
        )
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise argparse.ArgumentTypeError(f"{name}: must end with .{', .'.join(sorted(kinds))}")
    return path


def count_from(least: int) -> Callable[[str], int]:
    """Return the type of a whole number that is not below ``least``."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    return number


def refuse_unwritable(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the command if the value of an option is no text that a file or its name can hold."""
    for name, value in vars(options).items():
        if isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
            parser.error(f"argument --{name}: {value!a:.200}: not UTF-8, or with a zero byte")


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
