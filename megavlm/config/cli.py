"""The command line of a training run, and a configuration as YAML.

Values come from, the later winning: the schema's defaults, the rows of the tables of models and
stages, YAML files, the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from megavlm.config import torchrun, verdict, yaml_file
from megavlm.config.gone_folders import gone_folders, own_configs
from megavlm.config.help_text import help_text
from megavlm.config.hub_cache import cached, is_same, short_name
from megavlm.config.layer_ranges import with_layers
from megavlm.config.lora import Lora
from megavlm.config.models import MODELS, ReadModel, architecture, for_objective
from megavlm.config.not_offered import NOT_OFFERED, meant
from megavlm.config.options import (
    is_ready,
    make_parser,
    options,
    reader,
    shown_value,
    to_config,
    to_namespace,
)
from megavlm.config.recipes import recipe
from megavlm.config.recipes.recipe import Recipe
from megavlm.config.schema import Architecture, Config, Data, Init
from megavlm.config.verdict import PROGRAM, FindStart
from megavlm.config.yaml_file import Settings

FindProblems = Callable[[Config, int], Sequence[str]]
"""Finds what keeps a configuration from running on a number of ranks."""

_NO_NAMES = Config(stage="", model="")


@dataclass(frozen=True, kw_only=True)
class Given:
    """An option as someone wrote it.

    Args:
        text: the value.
        file: file and line; empty for the command line.
    """

    text: str
    file: str = ""


def parse(
    arguments: Sequence[str] | None = None,
    read_model: ReadModel | None = None,
    find_problems: FindProblems | None = None,
    find_start: FindStart | None = None,
) -> Config:
    """Return the configuration that a command line asks for; wrong input ends the process with
    status 2 and a short message.

    Args:
        arguments: the command line without the program's name; none: this process's own.
        read_model: reads a ``--model`` that is a folder, and the model that parts give; none:
            only the table of models is known.
        find_problems: checks the configuration, for ``--check`` and ``--print_config`` too; none:
            it is not checked.
        find_start: looks, for ``--check``, at what the run would start from; none: nothing does.
    """
    try:
        if wrong := torchrun.problems():
            raise ValueError("\n  ".join(wrong))
        config, asked = _parse(sys.argv[1:] if arguments is None else list(arguments), read_model)
        ranks = asked.check or torchrun.world_size()
        found = list(find_problems(config, ranks)) if find_problems else []
    except (argparse.ArgumentError, ValueError, OSError) as error:
        verdict.print_error(str(error))
        raise SystemExit(2) from None
    if asked.print_config:
        show([config], found)
        raise SystemExit(0)
    if found:
        verdict.print_problems(found)
        raise SystemExit(2)
    if asked.check is not None:
        verdict.end_check([config], ranks, find_start)
    return config


def show(runs: Sequence[Config], found: Sequence[str]) -> None:
    """Print configurations, and beside them, on the error output, why they would be refused."""
    if verdict.is_first_rank():
        print("---\n".join(map(to_yaml, runs)), end="", flush=True)
        if found:
            counted = verdict.counted(found)
            note = f"{PROGRAM}: as it stands the run would be refused, for {counted}:"
            print("\n  ".join([note, *found]), file=sys.stderr, flush=True)


def to_yaml(config: Config) -> str:
    """Write the whole configuration as YAML; ``from_yaml`` gives exactly ``config`` back."""
    return yaml.safe_dump(to_settings(config), sort_keys=False, allow_unicode=True, width=140)


def to_settings(config: Config) -> dict[str, Any]:
    """Return the whole configuration as nested mappings, as YAML has it: lists for tuples."""
    return _plain(dataclasses.asdict(config))


def from_yaml(source: str | Path) -> Config:
    """Read a configuration that ``to_yaml`` wrote, of this version or an earlier one; missing
    fields get the schema's defaults, not those of the tables, or what stood in their place.

    Args:
        source: the text, or the path of a file with it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, unknown keys, or values of the wrong type.
    """
    where = str(source) if isinstance(source, Path) else "configuration"
    settings = yaml_file.read(source, where)
    before = dataclasses.replace(_NO_NAMES, data=Data(strata=1))  # there was nothing else
    return to_config(_apply(settings, to_namespace(before)))


def _parse(arguments: list[str], read_model: ReadModel | None) -> tuple[Config, argparse.Namespace]:
    """Return the configuration, and what is asked for beside it."""
    chosen, others = _first_pass().parse_known_args(arguments)
    if chosen.check is not None and chosen.check < 0:
        raise ValueError(f"--check {chosen.check}: must be the number of ranks")
    files = [yaml_file.read(Path(path), f"--config {path}") for path in chosen.config]
    names = {name: vars(chosen)[name] or _last_named(files, name) for name in ("stage", "model")}
    chosen_recipe = recipe(chosen.recipe or _last_named(files, "recipe") or _NO_NAMES.recipe)
    if names["model"] and names["model"] not in MODELS:
        names["model"] = cached(names["model"])
    given = {name: vars(chosen)[f"init.{name}"] for name in vars(_NO_NAMES.init)}
    init = Init(
        **{
            name: cached((_last_named(files, "init", name) or "") if folder is None else folder)
            for name, folder in given.items()
        }
    )
    defaults = (
        _NO_NAMES
        if chosen.help is not None and not all(names.values())
        else _from_tables(
            **names,
            chosen=chosen_recipe,
            init=init,
            read_model=read_model,
            sets_vision=_sets_vision(others, files),
            is_stated=chosen.model is None and _state_architecture(files),
            known=_model_of_checkpoint(arguments, **names, init=init),
        )
    )
    if chosen.help is not None:
        text = help_text(chosen.help, defaults, chosen_recipe)
        if verdict.is_first_rank():
            print(text, end="")
        raise SystemExit(0)
    values = to_namespace(defaults)
    for settings in files:
        content = {
            key: value for key, value in settings.content.items() if key not in (*names, "recipe")
        }
        values = _apply(dataclasses.replace(settings, content=content), values)
    words = _normal(others)
    parser = make_parser(defaults, PROGRAM, only=_given(words))
    values.update(parser.parse_args(words, defaults=False))
    config = to_config(values)
    checkpoint = dataclasses.replace(config.checkpoint, load=cached(config.checkpoint.load))
    return with_layers(dataclasses.replace(config, init=init, checkpoint=checkpoint)), chosen


def _model_of_checkpoint(
    arguments: Sequence[str], *, stage: str | None, model: str | None, init: Init
) -> Architecture | None:
    """Return the model that the checkpoints of a run know, without adapters, which options give; if
    a folder is gone that the run was made of. None: all are there, or it has no checkpoints.
    """
    gone = gone_folders(model or "", init)
    save = where_given(arguments).get("checkpoint.save") if gone else None
    for path in own_configs(save.text, stage or "") if save and save.text else ():
        try:
            run = from_yaml(path)
        except (ValueError, OSError):  # told when its checkpoint is looked at
            continue
        is_made_of_them = run.init == Init() or all(
            is_same(noted, vars(init)[part]) for part, noted in vars(run.init).items()
        )
        if is_made_of_them and (model is None or is_same(run.model, model)):
            verdict.warn(
                f"{', '.join(gone)}: no such folder; the model is that of {path}, with which what"
                " was there cannot be compared"
            )
            return dataclasses.replace(run.architecture, lora=Lora())
    return None


def of_presets(config: Config, read_model: ReadModel | None) -> Config:
    """Return the configuration that a run's recipe, stage, model and parts alone give.

    Raises:
        ValueError: the model is neither in the table nor a folder, nor made of parts.
        OSError: a folder cannot be read.
    """
    named = config.model if config.model in MODELS or Path(config.model).is_dir() else ""
    usual = _from_tables(
        chosen=recipe(config.recipe),
        stage=config.stage,
        model=named,
        init=config.init,
        read_model=read_model,
        sets_vision=not config.init.vision,
    )
    return with_layers(usual)


def where_given(arguments: Sequence[str]) -> dict[str, Given]:
    """Return the options that a command line and its files give, by key; the command line wins.

    Raises:
        ValueError: a file cannot be read.
    """
    by_flag = {flag: option.key for option in options().values() for flag in option.flags}
    files, _ = _first_pass().parse_known_args(list(arguments))
    found = {}
    for path in files.config:
        settings = yaml_file.read(Path(path), f"--config {path}")
        for key, value in yaml_file.flat(settings.content):
            text = shown_value(tuple(value) if isinstance(value, list) else value)
            found[key] = Given(text=text, file=f"{settings.where}, line {settings.lines[key]}")
    for word, after in zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, has_value, value = word.partition("=")
        if flag in by_flag:
            found[by_flag[flag]] = Given(text=value if has_value else after)
    return found


def _first_pass() -> argparse.ArgumentParser:
    """Make a parser of what is no value of the configuration, and of the names that every default
    depends on.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--recipe")
    parser.add_argument("--stage")
    parser.add_argument("--model")
    for name in vars(_NO_NAMES.init):
        parser.add_argument(f"--init.{name}")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--print_config", action="store_true")
    parser.add_argument("--check", nargs="?", type=int, const=0)
    parser.add_argument("-h", "--help", nargs="?", const="")
    return parser


def _last_named(files: Sequence[Settings], *path: str) -> str | None:
    """Return the value, at a path such as ``init``, ``vision``, of the last file that has one; YAML
    reads a stage of 1 as a number.
    """
    found = None
    for settings in files:
        value: Any = settings.content
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        found = found if value is None else str(value)
    return found


def _sets_vision(arguments: list[str], files: Sequence[Settings]) -> bool:
    """Return whether a command line says what the vision encoder is, option by option."""
    prefix = "architecture.vision."
    return any(word.startswith(f"--{prefix}") for word in arguments) or any(
        path.startswith(prefix) for settings in files for path in settings.lines
    )


def _state_architecture(files: Sequence[Settings]) -> bool:
    """Return whether files say all of what a model is, as ``to_yaml`` does: the name in them is
    then that of a model that may be a row of no table and a folder of another machine.
    """
    given = {path for settings in files for path in settings.lines}
    return all(key in given for key in options() if key.startswith("architecture."))


def _from_tables(
    *,
    chosen: Recipe,
    stage: str | None,
    model: str | None,
    init: Init,
    read_model: ReadModel | None,
    sets_vision: bool,
    is_stated: bool = False,
    known: Architecture | None = None,
) -> Config:
    """Return the schema's defaults under the rows of both tables.

    A language model to start from says what the language part is; the vision part is then that of a
    folder, what ``--architecture.vision`` says, or the recipe's. Nothing is looked up for a model
    that files state in full, or that a checkpoint of the run knows.
    """
    has_model = model or chosen.architecture or init.is_whole or (init.language and sets_vision)
    names = ("a Hugging Face folder", *MODELS)
    wanted = ("stage", stage, chosen.stages), ("model", has_model, names)
    if missing := [
        f"--{name} (one of {', '.join(row)})" for name, given, row in wanted if not given
    ]:
        instead = (
            "; or name the vision encoder, with --init.vision or --architecture.vision options"
            if init.language and not has_model
            else ""
        )
        raise ValueError(f"missing {' and '.join(missing)}{instead}")
    row = chosen.stage(stage)
    built = known or chosen.architecture or Architecture()
    if not is_stated and not known:
        built = architecture(model or "", init, read_model, chosen.architecture)
    parts = [short_name(folder) for folder in init.parts.values()]
    name = model or "+".join(parts) or chosen.name
    return Config(
        recipe=chosen.name,
        stage=stage,
        model=name,
        architecture=for_objective(chosen.resized(stage, built), row.objective),
        data=chosen.data(stage),
        optimizer=row.optimizer,
        training=row.training,
    )


def _apply(settings: Settings, values: Namespace) -> Namespace:
    """Return values with those of a file over them.

    The parser reads only what has another type than its field: for a file that ``to_yaml`` wrote,
    of hundreds of options, it would take half a second.
    """
    known = options()
    others = {}
    for key, value in yaml_file.flat(settings.content):
        if key in known and is_ready(known[key], value):
            values[key] = reader(known[key])(value) if isinstance(value, list) else value
        else:
            others[key] = value
    try:
        parser = make_parser(_NO_NAMES, PROGRAM, only=others)
        values.update(parser.parse_object(others, defaults=False))
    except argparse.ArgumentError as error:
        raise ValueError(f"{settings.location(str(error))}: {error}") from None
    return values


def _given(words: Sequence[str]) -> set[str]:
    """Return the keys of the options that a command line gives."""
    by_flag = {flag: option.key for option in options().values() for flag in option.flags}
    return {by_flag[flag] for word in words if (flag := word.split("=")[0]) in by_flag}


def _normal(arguments: list[str]) -> list[str]:
    """Insert ``true`` after each bare switch.

    Raises:
        ValueError: unknown options.
    """
    by_flag = {flag: option for option in options().values() for flag in option.flags}
    known = {*by_flag, "--help", "--config", "--print_config", "--check"}
    flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
    given = [flag for flag in flags if " " not in flag]  # else a value: --data.packing "--root a"
    if flag := next(filter(NOT_OFFERED.get, given), ""):
        raise ValueError(f"{flag}: {NOT_OFFERED[flag]}")
    unknown = [f"{flag}{meant(flag, known)}" for flag in given if flag not in known]
    if unknown:
        raise ValueError("unknown option " + ", ".join(unknown))
    normal = []
    for argument, after in zip_longest(arguments, arguments[1:], fillvalue="--"):
        normal.append(argument)
        if argument in by_flag and by_flag[argument].kind is bool and after.startswith("--"):
            normal.append("true")
    return normal


def _plain(value: Any) -> Any:
    """Turn tuples into lists, at every depth; YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value
