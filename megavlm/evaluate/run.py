"""Let pretrain_vlm.py, or transformers, answer tasks with a checkpoint or a Hugging Face folder,
and read what was written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megavlm.checkpoint import step_folder
from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.config import yaml_file
from megavlm.config.cli import to_yaml
from megavlm.config.evaluation import Eval
from megavlm.config.hub_cache import file_name
from megavlm.config.objectives import needs_of
from megavlm.config.option_types import named
from megavlm.config.recipes import recipe, recipe_of
from megavlm.config.schema import (
    BadSteps,
    Config,
    Ema,
    Experts,
    Fp8,
    Health,
    Init,
    Logging,
    Optimizer,
    Parallel,
    Profile,
    Training,
)
from megavlm.config.schema import Checkpoint as Saving
from megavlm.convert.hf.hub_formats import dialect_of
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.data.store.manifest import FILE_NAME as MANIFEST
from megavlm.evaluate.by_transformers import answer_tasks
from megavlm.evaluate.graded import ANSWERS
from megavlm.evaluate.page import Answered, read_rows
from megavlm.evaluate.task import Task, read_tasks
from megavlm.io import atomic
from megavlm.io.remote import is_remote
from megavlm.io.storage import file_states, size_and_time

_PROGRAM = Path(__file__).parents[2] / "pretrain_vlm.py"
_DONE = "evaluated.json"
_RUN = "run"
_SETTINGS = "evaluation.yaml"


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How models are to answer.

    Args:
        packs: packed dataset whose template, tokenizer and tiles are used; none: the checkpoint's.
        max_new_tokens: longest answer.
        ranks: processes.
        others: options of pretrain_vlm.py, such as the layout.
        is_quiet: show what pretrain_vlm.py prints only if it fails.
        by_transformers: let transformers answer with a Hugging Face folder, not the trainer.
    """

    packs: Path | None
    max_new_tokens: int
    ranks: int
    others: Sequence[str] = ()
    is_quiet: bool = False
    by_transformers: bool = False


def answer_with_all(
    models: Sequence[str], tasks: Sequence[Path], out: Path, options: AnswerOptions
) -> list[Answered]:
    """Answer tasks with one model after the other, as ``answer_with``; one that cannot answer is
    refused before the first has answered.
    """
    for model in models:
        _checkpoint(named(model)[1], options.packs)
    return [answer_with(model, tasks, out, options) for model in models]


def answer_with(model: str, tasks: Sequence[Path], out: Path, options: AnswerOptions) -> Answered:
    """Answer tasks with a model, unless the folder holds its answers already.

    Args:
        model: a checkpoint or a save folder, or a Hugging Face folder; ``NAME=DIR`` names it.
        tasks: files of questions.
        out: folder of all models; this one gets a folder in it.
        options: how it answers.

    Raises:
        ValueError: nothing to evaluate there, a task that cannot be read, or a run that failed.
    """
    found = read_tasks(tuple(map(str, tasks)))
    name, folder = named(model)
    saved = _checkpoint(folder, options.packs)
    by_transformers = options.by_transformers and saved is None
    if by_transformers and (options.others or options.ranks > 1):
        raise ValueError(
            f"{folder}: transformers answers in one process, and options of pretrain_vlm.py do not"
            " reach it; leave out --transformers, or --ranks and what is behind --"
        )
    source = saved.folder if saved else folder
    name = _noted_name(name, source, out)
    target = out / name
    asked = {
        "model": file_states(source),
        "packs": str(options.packs),
        "settings": [options.max_new_tokens, by_transformers, *options.others],
        "files": _files(found, _manifest(options.packs, saved), options.others),
    }
    if not _is_done(target, asked):
        _forget(target)
        if by_transformers:
            answer_tasks(folder, found, options.packs, target / _RUN, options.max_new_tokens)
        else:
            evaluation = Eval(
                tasks=tuple(str(task.path) for task in found),
                max_new_tokens=options.max_new_tokens,
                only=True,
            )
            arguments = _arguments(saved, folder, evaluation, target, options.packs)
            arguments += ["--training.global_batch_size", str(options.ranks), *options.others]
            _run(arguments, options.ranks, folder, is_quiet=options.is_quiet)
        atomic.write_text(target / _DONE, json.dumps(asked) + "\n")
    return _read(name, target / _RUN)


def is_hub_folder(model: str) -> bool:
    """Tell whether a model, ``NAME=DIR`` or not, is a Hugging Face folder."""
    return _has_config(named(model)[1])


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _checkpoint(model: Path, packs: Path | None) -> Checkpoint | None:
    """Return the checkpoint to evaluate; none: the folder is Hugging Face's."""
    saved = None if _has_config(model) else step_folder.find(model)
    if saved is None and not _has_config(model):
        hint = step_folder.runs_inside(model)
        raise ValueError(f"{model}: neither a checkpoint nor a Hugging Face folder{hint}")
    if packs is None and not (saved and saved.config.data.train):
        kind = "checkpoint that was not trained" if saved else "Hugging Face folder"
        raise ValueError(
            f"{model}: a {kind} does not say how questions are packed; name a packed dataset of its"
            " template and tiles with --packs"
        )
    folders = saved.config.data.train_folders if saved and packs is None else ()
    gone = [folder for folder in folders if not is_remote(folder) and not Path(folder).exists()]
    if gone:
        raise ValueError(
            f"{model}: the packs that it was trained on, whose template and tiles questions need,"
            f" are not there ({', '.join(gone)}, seen from {Path.cwd()}); name them, or others of"
            " the same kind, with --packs"
        )
    return saved


def _noted_name(name: str, folder: Path, out: Path) -> str:
    """Return the name of a model, and note it, so that no other model gets it."""
    path = folder.resolve()
    if not name:
        is_step = path.name.startswith("step_")
        name = f"{path.parent.name}-{path.name}" if is_step else file_name(path)
    note = out / name / "model"
    if note.is_file() and note.read_text(encoding="utf-8").strip() != str(path):
        raise ValueError(
            f"{folder}: {out / name} holds the answers of another model of that name,"
            f" {note.read_text(encoding='utf-8').strip()}; give this one a name: NAME={folder}"
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(note, f"{path}\n")
    return name


def _images(tasks: Sequence[Task]) -> str:
    """Return a hash of the states of the tasks' images and videos."""
    questions = [question for task in tasks for question in task.questions]
    files = {image for one in questions for image in one.images}
    for path in {Path(each.video.file.path) for one in questions for each in one.videos}:
        files |= set(path.iterdir()) if path.is_dir() else {path}
    states = [[str(file), *size_and_time(file)] for file in sorted(files)]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def _manifest(packs: Path | None, saved: Checkpoint | None) -> list[Path]:
    """Return the manifests of the packs whose template, tokenizer and tiles may be used, if they
    are on this machine.
    """
    folders = [packs] if packs else saved.config.data.train_folders if saved else []
    return [path for folder in folders if (path := Path(folder) / MANIFEST).is_file()]


def _files(tasks: Sequence[Task], packs: Sequence[Path], others: Sequence[str]) -> dict[str, str]:
    """Return what tasks and manifests of packs hold, and the files that options name: examples of
    few-shot prompts, settings, and the examples that these name; and a hash for the tasks' images.
    """
    words = [word.partition("=")[2] if word.startswith("--") else word for word in others]
    files = [Path(word) for word in words if os.path.isfile(word)]  # Path's refuses long words
    for file in tuple(files):
        if file.suffix in (".yaml", ".yml"):
            settings = dict(yaml_file.flat(yaml_file.read(file, f"--config {file}").content))
            examples = Path(settings.get("eval.examples", ""))
            files += [examples] if examples.is_file() else []
    paths = (*(task.path for task in tasks), *packs, *files)
    texts = {str(path): path.read_text(encoding="utf-8", errors="replace") for path in paths}
    return texts | {"images": _images(tasks)}


def _is_done(target: Path, asked: dict) -> bool:
    note = target / _DONE
    return note.is_file() and json.loads(note.read_text(encoding="utf-8")) == asked


def _forget(target: Path) -> None:
    """Remove what a model answered before, the note that it is done first."""
    (target / _DONE).unlink(missing_ok=True)
    shutil.rmtree(target / _RUN, ignore_errors=True)


def _arguments(
    saved: Checkpoint | None, model: Path, evaluation: Eval, target: Path, packs: Path | None
) -> list[str]:
    """Return the command line of the run that answers, and write the settings that it names.

    Args:
        saved: the checkpoint; none: ``model`` is a Hugging Face folder.
        model: its folder.
        evaluation: what is asked.
        target: folder of its answers.
        packs: packed dataset; none: the checkpoint's.
    """
    if saved is not None:
        settings = to_yaml(_settings(saved, evaluation))
    else:
        asked = dataclasses.asdict(evaluation) | {"tasks": list(evaluation.tasks)}
        settings = yaml.safe_dump({"eval": asked}, allow_unicode=True)
    atomic.write_text(target / _SETTINGS, settings)
    return [
        *([] if saved else _of_folder(model)),
        *("--config", str(target / _SETTINGS), "--checkpoint.save", str(target / _RUN)),
        *(["--data.train", str(packs)] if packs else []),
    ]


def _settings(saved: Checkpoint, evaluation: Eval) -> Config:
    """Return the settings that answer with a checkpoint's model and data, on one rank. Little is
    trained, so that the optimizer, which is not used, is small; FP8 would need scales that training
    finds.
    """
    found = saved.config if saved.config.stage else _as_trained(saved.config)
    return replace(
        found,
        init=Init(),
        data=replace(
            found.data,
            valid="",
            weights=(),
            batch_shares=False,
            loss_weights=(),
            curriculum=False,
            max_unreadable_packs=0,
        ),
        parallel=Parallel(),
        optimizer=Optimizer(),
        training=Training(
            trainable=("connector",),
            precision=saved.config.training.precision,
            kernels=saved.config.training.kernels,
        ),
        experts=Experts(),
        ema=Ema(),
        profile=Profile(),
        bad_steps=BadSteps(),
        fp8=Fp8(),
        checkpoint=Saving(load=str(saved.folder), weights_only=True),
        logging=Logging(),
        health=replace(found.health, lost_machine_seconds=Health().lost_machine_seconds),
        eval=evaluation,
    )


def _as_trained(config: Config) -> Config:
    """Return the configuration of an imported model as if its recipe's last stage of the same
    objective had trained it.
    """
    row = recipe(config.recipe)
    objective = config.architecture.objective
    stage = [name for name, one in row.stages.items() if one.objective == objective][-1]
    return replace(config, stage=stage, data=row.data(stage))


def _of_folder(model: Path) -> list[str]:
    """Return the arguments that give the model of a Hugging Face folder, also if the recipe's last
    stage trains at another image size.
    """
    row = recipe_of(dialect_of(model))
    # Preferences are trained on, and nothing else is measured on them.
    last = [n for n, one in row.stages.items() if not needs_of(one.objective).is_of_preferences][-1]
    arguments = ["--recipe", row.name, "--stage", last, "--model", str(model)]
    if row.stages[last].image_size:
        size = architecture_from_hf(model).vision.image_size
        arguments += ["--architecture.vision.image_size", str(size)]
    small = ["--training.trainable", "connector", "--training.drop_path", "0"]
    return [*arguments, *small, "--checkpoint.load", str(model)]


def _run(arguments: Sequence[str], ranks: int, model: Path, *, is_quiet: bool) -> None:
    """Run pretrain_vlm.py, whose own output says what went wrong."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launcher = torchrun if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(_PROGRAM), *arguments],
        check=False,
        stdout=subprocess.PIPE if is_quiet else None,
        stderr=subprocess.STDOUT if is_quiet else None,
    )
    if done.returncode:
        if is_quiet:
            sys.stderr.buffer.write(done.stdout)
        raise ValueError(f"{model}: the run that should answer ended with status {done.returncode}")


def _read(name: str, target: Path) -> Answered:
    """Read the figures and answers that a run has written, of every task that it answered: with
    ``--eval.shots`` their names are others than those of the files.
    """
    (folder,) = (target / ANSWERS).iterdir()
    lines = (target / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    figures = {
        figure: value
        for figure, value in json.loads(lines[-1]).items()
        if "/" in figure and (folder / f"{figure.partition('/')[0]}.jsonl").is_file()
    }
    tasks = dict.fromkeys(figure.partition("/")[0] for figure in figures)
    rows = {task: read_rows(folder / f"{task}.jsonl") for task in tasks}
    return Answered(model=name, figures=figures, rows=rows)
