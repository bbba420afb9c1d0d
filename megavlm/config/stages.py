"""Several stages in one command: ``--stage 1,1.5,2``, each with a folder of its own in the save
folder, and each from the checkpoint of the one before.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from megavlm.config import cli, torchrun, verdict
from megavlm.config.cli import FindProblems
from megavlm.config.gone_folders import has_steps
from megavlm.config.models import ReadModel
from megavlm.config.schema import Config, Init
from megavlm.config.verdict import FindStart

_OWN = ("--checkpoint.save", "--save", "--checkpoint.load", "--load", "--stage", "--recipe")
_SWITCHES = ("--print_config", "--check", "--help", "-h")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line, taken apart.

    Args:
        stages: names of the stages.
        options: of all stages.
        of_stage: options of one stage alone, by its name.
        asked: what is asked for instead of training: ``--print_config``, ``--check``, ``--help``.
    """

    stages: tuple[str, ...]
    options: list[str]
    of_stage: dict[str, list[str]]
    asked: list[str]


def parse_stages(
    arguments: Sequence[str],
    read_model: ReadModel,
    find_problems: FindProblems,
    find_start: FindStart | None = None,
) -> list[Config]:
    """Return the runs that a command line asks for, in order; as ``cli.parse``, which reads a
    command of one stage.

    Wrong input ends the process with status 2, with the problems of all stages together.
    """
    try:
        command = _take_apart(list(arguments))
    except ValueError as error:
        verdict.print_error(str(error))
        raise SystemExit(2) from None
    if len(command.stages) < 2 or "--help" in command.asked or "-h" in command.asked:
        first = ["--stage", command.stages[0]] if command.stages else []
        plain = [*command.options, *first, *command.asked]
        return [cli.parse(plain, read_model, find_problems, find_start)]
    runs: list[Config] = []
    for number, stage in enumerate(command.stages):
        given = [*command.options, "--stage", stage, *command.of_stage.get(stage, ())]
        run = cli.parse(given, read_model)
        if not run.checkpoint.save:
            verdict.print_error(
                "--stage: several stages need --checkpoint.save, the folder for all of them"
            )
            raise SystemExit(2)
        is_last = number == len(command.stages) - 1
        runs.append(_placed(run, runs[-1] if runs else None, exports=is_last, command=command))
    try:
        found = list(_problems(runs, command, find_problems))
    except ValueError as error:
        verdict.print_error(str(error))
        raise SystemExit(2) from None
    if any(run.eval.only for run in runs):
        found.append("--eval.only true measures the weights of one stage; --stage names several")
    if "--print_config" in command.asked:
        cli.show(runs, found)
        raise SystemExit(0)
    if found:
        verdict.print_problems(found)
        raise SystemExit(2)
    if "--check" in command.asked:
        verdict.end_check(runs, _ranks(command), find_start)
    return runs


def _take_apart(arguments: list[str]) -> Command:
    """Return the parts of a command line.

    Raises:
        ValueError: ``--for`` names no stage, or options that are not one stage's.
    """
    stages: tuple[str, ...] = ()
    options: list[str] = []
    asked: list[str] = []
    of_stage: dict[str, list[str]] = {}
    words = iter(arguments)
    previous = ""
    for word in words:
        is_ranks = previous == "--check" and word.isdecimal()
        is_section = previous in ("--help", "-h") and not word.startswith("--")
        previous = word
        flag, has_value, value = word.partition("=")
        if flag == "--stage":
            text = value if has_value else next(words, "")
            stages = tuple(name.strip() for name in text.split(",") if name.strip())
        elif flag == "--for":
            name = value if has_value else next(words, "")
            of_stage[name] = of_stage.get(name, []) + shlex.split(next(words, ""))
        elif flag in _SWITCHES:
            asked += [flag, value] if has_value else [flag]
        elif is_ranks or is_section:
            asked.append(word)
        else:
            options.append(word)
    for name, given in of_stage.items():
        if len(stages) < 2 or name not in stages:
            raise ValueError(
                f"--for {name}: --stage names no such stage among several; write"
                " --stage 1,2 --for 1 '--data.train packs'"
            )
        if not given:
            raise ValueError(
                f"--for {name}: its options follow, in quotes: --for {name} '--lr 1e-5'"
            )
        for flag in (word.partition("=")[0] for word in given):
            if flag in (*_OWN, *_SWITCHES):
                raise ValueError(f"--for {name}: {flag} is for all stages together")
    if len(set(stages)) < len(stages):
        raise ValueError(f"--stage {','.join(stages)}: names a stage twice")
    return Command(stages=stages, options=options, of_stage=of_stage, asked=asked)


def _placed(run: Config, before: Config | None, *, exports: bool, command: Command) -> Config:
    """Return the run of a stage with its own folder, and the checkpoint that it starts from.

    Args:
        run: as all options give it.
        before: the run of the stage before; none for the first.
        exports: whether ``--checkpoint.export_hf`` of all stages is meant for this one.
        command: which options are of this stage alone.
    """
    files = run.checkpoint
    own = cli.where_given(command.of_stage.get(run.stage, []))
    if not exports and "checkpoint.export_hf" not in own:
        files = replace(files, export_hf="")
        if "ema.export" not in own:
            run = replace(run, ema=replace(run.ema, export=False))
    files = replace(files, save=str(Path(files.save) / f"stage_{run.stage}"))
    if before is None:
        return replace(run, checkpoint=files)
    weights_only = files.weights_only and "checkpoint.weights_only" in own
    files = replace(files, load=before.checkpoint.save, weights_only=weights_only)
    return replace(run, checkpoint=files, init=Init())


def starting_like(run: Config, first: Config) -> Config:
    """Return the run of a later stage as if it started from what the first one starts from, which
    is there before the command begins.
    """
    files = replace(run.checkpoint, load=first.checkpoint.load)
    return replace(run, checkpoint=files, init=first.init)


def is_of_start(problem: str) -> bool:
    """Tell whether a problem of ``starting_like`` is one of what the first stage starts from."""
    return problem.startswith(
        (
            "--checkpoint.load ",
            "--init.",
            "--checkpoint.moments keep needs",
            "--checkpoint.weights_only needs",
        )
    )


def _problems(
    runs: Sequence[Config], command: Command, find_problems: FindProblems
) -> Iterator[str]:
    """Yield the problems of all stages; what a later stage starts from is not there yet, and what
    the first one starts from may be gone if a later one has begun.
    """
    for before, run in pairwise(runs):
        objective = run.architecture.objective
        if not run.architecture.needs.trains_model_of(before.architecture.needs):
            yield (
                f"stage {run.stage}: its model, of --architecture.objective {objective}, is another"
                f" one than that of stage {before.stage}, of {before.architecture.objective}; train"
                " it in a command of its own"
            )
    yield from _export_problems(runs)
    needs_start = not any(has_steps(run.checkpoint.save) for run in runs[1:])
    for number, run in enumerate(runs):
        yield from _own_problems(run, number, runs, command)
        for problem in find_problems(starting_like(run, runs[0]), _ranks(command)):
            if (number == 0 and needs_start) or not is_of_start(problem):
                yield f"stage {run.stage}: {problem}"


def _export_problems(runs: Sequence[Config]) -> Iterator[str]:
    exports: dict[Path, str] = {}
    for run in runs:
        if name := run.checkpoint.export_hf:
            taken = exports.setdefault(Path(name).resolve(), run.stage)
            if taken != run.stage:
                yield (
                    f"stage {run.stage}: --checkpoint.export_hf {name}: stage {taken} exports to"
                    " the same folder; name another"
                )


def _own_problems(
    run: Config, number: int, runs: Sequence[Config], command: Command
) -> Iterator[str]:
    """Yield the options of one stage alone that would not count.

    Args:
        run: of the stage.
        number: of the stage.
        runs: of all stages.
        command: which options are whose.
    """
    own = cli.where_given(command.of_stage.get(run.stage, []))
    everyone = cli.where_given(command.options)
    root = str(Path(run.checkpoint.save).parent)
    counts = {"stage": (run.stage,), "recipe": (runs[0].recipe,)}
    counts["checkpoint.save"] = (run.checkpoint.save, root)
    reasons = {"checkpoint.save": f"all stages together have {root}"}
    if number:
        counts |= {"checkpoint.load": (run.checkpoint.load,)}
        counts |= {f"init.{name}": () for name in vars(Init())}
        start = f"it starts from stage {runs[number - 1].stage}"
        reasons |= dict.fromkeys(("checkpoint.load", *(f"init.{n}" for n in vars(Init()))), start)
    for key, given in own.items():
        if given.text in ("", "empty"):
            continue
        where = f"stage {run.stage}: {given.file or '--for'}: {key} {given.text}"
        other = everyone.get(key)
        if key in counts:
            if given.text not in counts[key]:
                reason = reasons.get(key) or f"it is {counts[key][0]}, as the command says"
                yield f"{where}: {reason}; leave it out"
        elif given.file and other and not other.file and other.text != given.text:
            yield (
                f"{where}: --{key} {other.text} of all stages comes before files; give it by"
                f" --for {run.stage} '--{key} {given.text}', or leave one out"
            )


def _ranks(command: Command) -> int:
    """Return the ranks that ``--check`` names, else those that torchrun starts."""
    named = [int(word) for word in command.asked if word.isdecimal()]
    return named[0] if named else torchrun.world_size()
