"""Types of options that name a folder, so that a wrong one is refused as soon as the command line
is parsed, before anything slow is imported.
"""

from __future__ import annotations

import argparse
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
