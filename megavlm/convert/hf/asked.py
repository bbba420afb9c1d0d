"""What a command line of ``tools/convert_checkpoint.py`` asks for; apart from the parsing, which
waits for no torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megavlm.convert.hf import convert, dropout, model_card, peft_export, push
from megavlm.convert.hf.check_files import FileCheck, check_files
from megavlm.convert.hf.command_line import read_size
from megavlm.convert.weights.upcycle import Upcycling


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for, and return the exit status: 1 where a check found a
    difference.

    Raises:
        ValueError, OSError: the input is at fault.
    """
    if args.command == "check":
        return _report(check_files(args.hf), convert.check(args.hf))
    if args.command == "export":
        _export(args)
        return 0
    made = convert.import_(
        args.hf,
        args.out,
        tokenizer=args.tokenizer,
        adapters=args.peft,
        upcycling=_upcycling(args),
    )
    print(f"checkpoint written to {made}")
    for note in dropout.notes_on_model(Path(args.hf)):
        print(f"note: {note}")
    return 0


def _report(files: list[FileCheck], parts: list[convert.PartCheck]) -> int:
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


def _upcycling(args: argparse.Namespace) -> Upcycling | None:
    """Return what an import is to make of a dense model; none: leave it dense."""
    if args.upcycle_experts is None:
        return None
    given = {
        name: vars(args)[f"upcycle_{name}"]
        for name in ("topk", "seed")
        if vars(args)[f"upcycle_{name}"] is not None
    }
    return Upcycling(experts=args.upcycle_experts, **{"topk": 2} | given)


def _export(args: argparse.Namespace) -> None:
    """Export a checkpoint, and upload the folder if the command line says so."""
    if args.push_to_hub:
        made = push.make_repository(args.push_to_hub, is_private=args.private)
        print(f"repository {made}")
    if args.peft:
        made = peft_export.export(args.load, args.out, base=args.peft, averages=args.ema)
        print(f"LoRA adapters written to {made}")
    else:
        made = convert.export(
            args.load,
            args.out,
            dialect=args.dialect,
            dtype=vars(torch)[args.dtype] if args.dtype else None,
            tokenizer=args.tokenizer,
            vision=args.vision,
            licenses=model_card.read_licenses(args.license),
            shard_bytes=read_size(args.max_shard_size),
            averages=args.ema,
        )
        print(f"Hugging Face model written to {made}")
    if args.push_to_hub:
        print(f"uploaded: {push.push(made, args.push_to_hub)}")
