"""The command line of a training run, and a configuration as YAML.

Values come from, the later winning: the schema's defaults, the rows of the tables of models and
stages, YAML files, the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from megavlm.config import stages
from megavlm.config.models import MODELS, ReadModel, architecture
from megavlm.config.options import Parser, make_parser, nearest, options, to_config
from megavlm.config.schema import Architecture, Config, Init
from megavlm.config.stages import STAGES

PROGRAM = "pretrain_vlm.py"
_PATIENCE_SECONDS = 3.0
_NO_NAMES = Config(stage="", model="")


def parse(arguments: Sequence[str] | None = None, read_model: ReadModel | None = None) -> Config:
    """The configuration that a command line asks for; wrong input ends the process with status 2
    and a short message.

    Args:
        arguments: the command line without the program's name; this process's own where there is
            none.
        read_model: reads a ``--model`` that is a folder, and the model that two parts give; none:
            only the table of models is known.
    """
    try:
        config, is_shown = _parse(
            sys.argv[1:] if arguments is None else list(arguments), read_model
        )
    except (argparse.ArgumentError, ValueError, OSError) as error:
        _tell(error)
        raise SystemExit(2) from None
    if is_shown:
        if _is_first_rank():
            print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; ``from_yaml`` gives exactly ``config`` back."""
    return yaml.safe_dump(
        _plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True, width=140
    )


def from_yaml(source: str | Path) -> Config:
    """The configuration that ``to_yaml`` wrote; fields that are missing get the schema's defaults,
    not the tables'.

    Args:
        source: the text, or the path of a file with it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, unknown keys, or values of the wrong type.
    """
    where = str(source) if isinstance(source, Path) else "configuration"
    parser = make_parser(_NO_NAMES, PROGRAM)
    return to_config(_apply(parser, _read(source, where), where, parser.get_defaults()))


def _parse(arguments: list[str], read_model: ReadModel | None) -> tuple[Config, bool]:
    """The configuration, and whether to print it instead of running it."""
    chosen, others = _first_pass().parse_known_args(arguments)
    files = {f"--config {path}": _read(Path(path), f"--config {path}") for path in chosen.config}
    names = {name: vars(chosen)[name] or _last_named(files, name) for name in ("stage", "model")}
    init = Init(
        **{
            name: vars(chosen)[f"init.{name}"] or _last_named(files, "init", name) or ""
            for name in vars(_NO_NAMES.init)
        }
    )
    others += [
        word for name, folder in vars(init).items() if folder for word in (f"--init.{name}", folder)
    ]
    wants_help = any(word in others for word in ("-h", "--help"))
    defaults = (
        _NO_NAMES
        if wants_help and not all(names.values())
        else _from_tables(**names, init=init, read_model=read_model)
    )
    parser = make_parser(defaults, PROGRAM, _description())
    values = parser.get_defaults()
    for where, content in files.items():
        values = _apply(
            parser,
            {key: value for key, value in content.items() if key not in names},
            where,
            values,
        )
    return to_config(parser.parse_args(_normal(others), namespace=values)), chosen.print_config


def _first_pass() -> argparse.ArgumentParser:
    """Finds what is no value of the configuration, and the names that every default depends on."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--stage")
    parser.add_argument("--model")
    for name in vars(_NO_NAMES.init):
        parser.add_argument(f"--init.{name}")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--print_config", action="store_true")
    return parser


def _last_named(files: dict[str, dict[str, Any]], *path: str) -> str | None:
    """The value, at a path such as ``init``, ``vision``, of the last file that has one; YAML reads
    a stage of 1 as a number.
    """
    found = None
    for content in files.values():
        value: Any = content
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        found = found if value is None else str(value)
    return found


def _from_tables(
    *, stage: str | None, model: str | None, init: Init, read_model: ReadModel | None
) -> Config:
    """The schema's defaults under the rows of both tables."""
    wanted = ("stage", stage, STAGES), ("model", model or init.is_whole, MODELS)
    missing = [
        f"--{name} (one of {', '.join(table)})" for name, given, table in wanted if not given
    ]
    if missing:
        raise ValueError(f"missing {' and '.join(missing)}")
    row = stages.stage(stage)
    built = architecture(model or "", init, read_model)
    name = model or "+".join(Path(folder).resolve().name for folder in init.parts.values())
    return Config(
        stage=stage,
        model=name,
        architecture=built,
        data=row.data,
        optimizer=row.optimizer,
        training=row.training,
    )


def _read(source: str | Path, where: str) -> dict[str, Any]:
    """The mapping in a YAML text or file; all its keys are known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, no mapping, or unknown keys.
    """
    try:
        content = yaml.safe_load(
            source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        )
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not YAML: {error}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected keys and values, such as 'stage: 1', got {content!r}")
    known = options()
    headings = {key.rpartition(".")[0] for key in known} - {""}
    unknown = [
        (
            f"{key} (a section: its options go below it)"
            if key in headings
            else f"{key}{nearest(key, [*headings, *known])}"
        )
        for key in _keys(content)
        if key not in known
    ]
    if unknown:
        raise ValueError(f"{where}: unknown key " + ", ".join(unknown))
    return content


def _keys(content: dict[str, Any], path: str = "") -> Iterator[str]:
    """Dotted paths of the values in nested mappings."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def _apply(parser: Parser, content: dict[str, Any], where: str, values: Any) -> Any:
    """What a parser makes of a mapping, over the values so far."""
    try:
        return parser.parse_object(content, namespace=values)
    except argparse.ArgumentError as error:
        raise ValueError(f"{where}: {error}") from None


def _normal(arguments: list[str]) -> list[str]:
    """Arguments with ``true`` after each bare switch.

    Raises:
        ValueError: unknown options.
    """
    by_flag = {flag: option for option in options().values() for flag in option.flags}
    known = {*by_flag, "--help", "--config", "--print_config"}
    given = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
    unknown = [f"{flag}{nearest(flag, known)}" for flag in given if flag not in known]
    if unknown:
        raise ValueError("unknown option " + ", ".join(unknown))
    normal = []
    for argument, after in zip_longest(arguments, arguments[1:], fillvalue="--"):
        normal.append(argument)
        if argument in by_flag and by_flag[argument].kind is bool and after.startswith("--"):
            normal.append("true")
    return normal


def _plain(value: Any) -> Any:
    """Tuples as lists, at every depth; YAML knows no tuples."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _tell(error: Exception) -> None:
    """Say what is wrong, once: another rank than the first speaks only where the first, and
    torchrun with it, has not ended the job.
    """
    where = ""
    if not _is_first_rank():
        time.sleep(_PATIENCE_SECONDS)
        where = f" on rank {os.environ['RANK']} ({socket.gethostname()})"
    print(
        f"{PROGRAM}: error{where}: {error}\n--help lists every option", file=sys.stderr, flush=True
    )


def _is_first_rank() -> bool:
    """Whether this process is the first of its job, by torchrun's environment; one without it is
    alone.
    """
    return os.environ.get("RANK", "0") == "0"


def _description() -> str:
    """What ``--help`` says above the options."""
    stage_lines = "\n".join(f"  {name:<15} {row.description}" for name, row in STAGES.items())
    model_lines = "\n".join(f"  {name:<15} {_size(row)}" for name, row in MODELS.items())
    return f"""Trains a vision-language model.

example, on a machine with 8 GPUs:
  torchrun --nproc_per_node 8 {PROGRAM} --stage 1 --model internvl2_5-1b --load InternVL2_5-1B/ \\
      --data.train packs/captions --save runs/stage1 --tensor-model-parallel-size 2

Every option is also a key of the YAML files that --config FILE names; it may be given several
times, later files win, and the command line wins over all. --print_config prints the whole
configuration as YAML instead of training. The defaults below are those of the stage and the model,
if both are given.

stages:
{stage_lines}

models:
{model_lines}"""


def _size(row: Architecture) -> str:
    vision = row.vision
    language = row.language
    return (
        f"vision {vision.num_layers} layers of {vision.hidden_size}, {vision.image_size} pixels;"
        f" language {language.num_layers} layers of {language.hidden_size}, {language.vocab_size}"
        " words"
    )
