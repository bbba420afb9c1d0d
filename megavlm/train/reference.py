"""Whose probabilities of answers a run compares its own with: those of the weights that it starts
from, which ``reference_pass`` computes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from megavlm.checkpoint import checksums
from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.config.schema import Config, Init
from megavlm.data.store.manifest import read_manifest
from megavlm.data.store.reference import Reference, ReferenceFacts, reference_folder
from megavlm.io.storage import size_and_time
from megavlm.train import resume
from megavlm.train.resume import Start


class ReferenceError(ValueError):
    """Probabilities that are missing, damaged, or of other weights, or that are no numbers."""


def folders_of(config: Config) -> list[str]:
    """Return the datasets whose answers a run compares, each once: what is only evaluated has
    training packs for their template and tokenizer.
    """
    train = () if config.eval.only else config.data.train_folders
    named = [*train, *filter(None, [config.data.valid])]
    return list(dict.fromkeys(named)) if config.reference else []


def check(config: Config, start: Start) -> None:
    """Look, before anything is built, at what there is of the probabilities that a run needs.

    Raises:
        ReferenceError: they are of other weights, or missing and cannot be computed.
        ReadError: they are damaged, as far as small files tell.
    """
    folders = folders_of(config)
    weights = weights_of(config, start) if folders else ""
    for folder in folders:
        place = reference_folder(config.reference, folder, read_manifest(folder))
        find(config, start, place, facts_of(weights, folder), reads_all=False)


def find(
    config: Config, start: Start, place: Path, facts: ReferenceFacts, *, reads_all: bool = True
) -> ReferenceFacts | None:
    """Return what the probabilities of a dataset are of; none if they have to be computed.

    Args:
        config: the run.
        start: what it starts from.
        place: where they lie.
        facts: what they are to be of.
        reads_all: whether to compare their checksum.

    Raises:
        ReferenceError: they are of other weights, or missing and cannot be computed.
        ReadError: they are damaged.
    """
    is_fresh = not (config.eval.only or resume.resumes(config, start))
    flag = f"--data.reference {config.reference}"
    reference = Reference(place)
    if not reference.is_complete:
        if not is_fresh:
            why = (
                "an evaluation computes none"
                if config.eval.only
                else "this run does not start from the reference's weights and cannot compute them"
            )
            raise ReferenceError(
                f"{flag}: lacks the probabilities of {facts.dataset} ({place}), and {why}; name the"
                " folder that has them, or fill this one by a run of one step that starts from the"
                " reference's weights (--data.reference, another --checkpoint.save)"
            )
        return None
    if reads_all:
        reference.check()
    found = reference.facts
    if is_fresh and not found.is_of(facts):
        raise ReferenceError(
            f"{flag}: the probabilities of {facts.dataset} are of another reference model"
            f" ({found.weights}) than the one that the run starts from ({facts.weights}); name"
            " another folder"
        )
    return found


def of_another(config: Config, start: Start, found: ReferenceFacts) -> str:
    """Return a warning if a run that is resumed began with another reference model; empty if not. A
    folder of Hugging Face that was moved has another name, so this is no error.
    """
    began_with = start.state.reference if resume.resumes(config, start) else ""
    if began_with in ("", found.weights):
        return ""
    return (
        f"WARNING: --data.reference {config.reference}: the run began with another reference model"
        f" ({began_with}); if these are not the same weights, its rewards and losses jump"
    )


def facts_of(weights: str, folder: str) -> ReferenceFacts:
    """Return what the probabilities of a dataset are to be of.

    Args:
        weights: names them, see ``weights_of``.
        folder: of the dataset.
    """
    manifest = read_manifest(folder)
    return ReferenceFacts(
        weights=weights,
        dataset=folder,
        idx_crc32=manifest.idx_crc32,
        packs=manifest.totals.packs,
        pairs=manifest.totals.samples // 2,
    )


def weights_of(config: Config, start: Start) -> str:
    """Name the weights that a run starts from, in the same way wherever they lie, if they are a
    checkpoint.
    """
    rounded = config.architecture.lora.nf4
    return _given(config, start) + (f", in 4 bits: {', '.join(rounded)}" if rounded else "")


def _given(config: Config, start: Start) -> str:
    """Name the weights as they lie on the disk."""
    if isinstance(start, Checkpoint):
        sums = start.folder / checksums.FILE_NAME
        if not sums.is_file():
            return _of_files([start.folder])
        state = start.state
        checksum = zlib.crc32(sums.read_bytes())
        return f"stage {state.stage or '-'}, step {state.step}, checksum {checksum:08x}"
    if isinstance(start, Path):
        return _of_files([start])
    seed = config.training.seed
    if isinstance(start, Init):
        given = _of_files([Path(folder) for folder in start.parts.values()])
        return f"{given}, other parts random, of seed {seed}"
    return f"random weights of seed {seed}"


def _of_files(folders: Sequence[Path]) -> str:
    """Name what lies in folders. Not what lies deeper, which may be the run's own."""
    states = [
        {path.name: size_and_time(path) for path in sorted(folder.iterdir()) if path.is_file()}
        for folder in folders
    ]
    named = ", ".join(str(folder.resolve()) for folder in folders)
    return f"{named}, files {zlib.crc32(repr(states).encode()):08x}"
