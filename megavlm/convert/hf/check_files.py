"""Check the files beside the weights: import and export them, and compare what is read of both."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from megavlm.config.schema import Architecture
from megavlm.convert.hf import named_tokens, preprocessing
from megavlm.convert.hf.copied_tokenizer import copy_qformer_tokenizer, copy_tokenizer
from megavlm.convert.hf.hub_formats import HUB_FORMATS, dialect_of
from megavlm.convert.hf.model_config import architecture_from_hf, differences
from megavlm.convert.weights.families import written_as
from megavlm.convert.weights.tables import Dialect
from megavlm.data.text.tokenizer import fingerprint, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """What became of the content of files.

    Args:
        name: what was compared: ``config``, ``tokenizer`` or ``usage``.
        changes: each difference after import and export.
        note: why nothing was compared; empty: it was.
    """

    name: str
    changes: tuple[str, ...] = ()
    note: str = ""


def check_files(folder: str | Path) -> list[FileCheck]:
    """Import and export config, tokenizer, conversation template and tile limits of a folder, and
    compare what is read of both.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: the model cannot be trained here.
    """
    folder = Path(folder)
    architecture = architecture_from_hf(folder)
    dialect = dialect_of(folder)
    form = HUB_FORMATS[dialect]
    usage = form.read_usage(folder)
    with TemporaryDirectory() as scratch:
        kept = Path(scratch) / "tokenizer"
        out = Path(scratch) / "out"
        out.mkdir()
        before = copy_tokenizer(folder, kept)
        copy_qformer_tokenizer([folder], kept)
        if before is None:
            reason = "the folder has no tokenizer, and none is exported without one"
            return [FileCheck(name=name, note=reason) for name in ("config", "tokenizer", "usage")]
        named_tokens.check(folder, kept, architecture.image_tokens)
        try:
            form.write_files(out, kept, architecture, usage, torch.bfloat16)
        except ValueError as error:
            return [FileCheck(name="export", changes=(str(error),))]
        after = fingerprint(load_tokenizer(out))
        expected = _as_written(architecture, dialect)
        other = [] if after == before else [f"fingerprint {before}, {after} once exported"]
        return [
            FileCheck(
                name="config", changes=tuple(differences(architecture_from_hf(out), expected))
            ),
            FileCheck(name="tokenizer", changes=tuple(other)),
            FileCheck(name="usage", changes=_changed(usage, form.read_usage(out))),
        ]


def _as_written(architecture: Architecture, dialect: Dialect) -> Architecture:
    """Return the architecture as the dialect states it: chat unties heads, and either dialect
    writes some families as another.
    """
    language = architecture.language
    if language.is_encoder:
        return architecture
    family = written_as(language, dialect).name
    tied = language.tied_head and dialect != "chat"
    return dataclasses.replace(
        architecture, language=dataclasses.replace(language, family=family, tied_head=tied)
    )


def _changed(before: preprocessing.Usage, after: preprocessing.Usage) -> tuple[str, ...]:
    """Return the settings that differ."""
    old = dataclasses.asdict(before)
    new = dataclasses.asdict(after)
    return tuple(
        f"{name}: {value!r}, {new[name]!r} once exported"
        for name, value in old.items()
        if new[name] != value
    )
