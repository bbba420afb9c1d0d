"""Whether the files of a checkpoint are those that were written.

``checksums.json`` holds the size and the CRC-32 of every other file. It is written last, so that it
speaks of the files as they are to be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from megavlm.checkpoint.metadata import read_description
from megavlm.io import checksum
from megavlm.io.checksum import Sum

FILE_NAME = "checksums.json"
SMALL_FILES = ("state.json", "config.yaml")
_METADATA = "shards/.metadata"


def measure(path: Path) -> Sum:
    """Return size and checksum of a file, which is read in chunks."""
    return checksum.measure(checksum.chunks(path))


def write(folder: Path, known: dict[str, Sum]) -> None:
    """Write the checksums of everything in ``folder``; files that are not in ``known``, by path
    from the folder, are read for it. Those that are may be of other machines, and not yet seen by
    this one in a network file system.
    """
    there = {
        str(Path(inside).relative_to(folder) / name)
        for inside, _, names in os.walk(folder)  # which asks for the kind of no file
        for name in names
    }
    names = sorted(there | known.keys())
    sums = {name: known.get(name) or measure(folder / name) for name in names}
    (folder / FILE_NAME).write_text(
        json.dumps({name: list(found) for name, found in sums.items()}, indent=1) + "\n"
    )


def read(folder: Path) -> dict[str, Sum] | None:
    """Read the checksums of a checkpoint; None for one made by conversion.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / FILE_NAME
    try:
        return {
            name: (int(size), int(crc))
            for name, (size, crc) in json.loads(path.read_text()).items()
        }
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, it does not hold checksums ({error})") from error


def differences(
    folder: Path, sums: dict[str, Sum], names: Iterable[str], *, by_size_only: bool = False
) -> list[str]:
    """Return what is wrong with the files ``names`` of a checkpoint, a line each."""
    found = []
    for name in names:
        path = folder / name
        size, crc = sums[name]
        try:
            there = path.stat().st_size
            if there != size:
                found.append(f"{path}: {there:,} bytes, {size:,} were written")
            elif not by_size_only and measure(path) != (size, crc):
                found.append(
                    f"{path}: its bytes are not those that were written (the checksum differs)"
                )
        except FileNotFoundError:
            found.append(f"{path}: missing")
        except OSError as error:
            found.append(f"{path}: cannot be read ({error.strerror})")
    return found


def check_small_files(folder: Path) -> None:
    """Compare the files that are read before anything is built.

    Raises:
        ValueError: one is damaged.
    """
    sums = read(folder) or {}
    if wrong := differences(folder, sums, [name for name in SMALL_FILES if name in sums]):
        raise ValueError("\n  ".join(wrong))


def damage(folder: Path, *, by_size_only: bool) -> list[str]:
    """Find what is wrong with a checkpoint. Collective: each rank reads a part of the files, and
    every rank gets the whole answer.

    Args:
        folder: of the step.
        by_size_only: compare sizes instead of contents.
    """
    rank = dist.get_rank()
    world = dist.get_world_size()
    try:
        sums = read(folder) or {}
        # Neighbours go to different ranks: the large files are neighbours.
        found = differences(folder, sums, sorted(sums)[rank::world], by_size_only=by_size_only)
    except (ValueError, OSError) as error:  # other ranks wait for this one's answer
        found = [str(error)]
    if rank == 0 and not found:
        found = strangers(folder / _METADATA)
    everywhere: list = [None] * world
    dist.all_gather_object(everywhere, found)
    return list(dict.fromkeys(line for lines in everywhere for line in lines))


def strangers(path: Path) -> list[str]:
    """Why the description of the shards should not be loaded: torch unpickles it, and unpickling
    runs what a file names.
    """
    try:
        read_description(path)
    except FileNotFoundError:
        return [f"{path}: missing"]
    except (ValueError, OSError) as error:
        return [str(error)]
    return []
