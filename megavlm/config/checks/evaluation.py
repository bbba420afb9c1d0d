"""Cross checks of what a model is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megavlm.config.evaluation import VALID_LOSS, shots_name
from megavlm.config.gone_folders import has_steps
from megavlm.config.parts import Init
from megavlm.config.schema import Config


def evaluation_problems(config: Config) -> Iterator[str]:
    """Everything about evaluation that cannot be, each naming the flag to change."""
    asked = config.eval
    for path in asked.tasks:
        if not Path(path).is_file():
            yield f"--eval.tasks {path}: no such file"
    yield from _shots(config)
    if asked.max_new_tokens < 1:
        yield f"--eval.max_new_tokens {asked.max_new_tokens}: must be at least 1"
    if asked.cache_gib <= 0:
        yield f"--eval.cache_gib {asked.cache_gib}: must be more than 0"
    has_loss = bool(config.data.valid)
    interval = config.training.eval_interval
    if interval > 0 and not (has_loss or asked.tasks):
        yield (
            f"--training.eval_interval {interval} needs --data.valid, the validation set, or"
            " --eval.tasks"
        )
    yield from _best(config)
    objective = config.architecture.objective
    if asked.shots and objective == "contrastive":
        yield (
            "--eval.shots puts examples in front of questions, and a model of the objective"
            " contrastive answers none; leave it out"
        )
    answers = config.architecture.needs.has_vocabulary_head
    if asked.tasks and not answers and objective != "contrastive":
        yield (
            f"--eval.tasks asks for answers, and a model of the objective {objective} gives none;"
            " leave it out"
        )
    if asked.without_images and not has_loss:
        yield "--eval.without_images true needs --data.valid, the validation set"
    yield from _control(config)
    if asked.only and not (asked.tasks or config.data.valid):
        yield "--eval.only true needs --eval.tasks or --data.valid: there is nothing to measure"
    if asked.only:
        yield from _only(config)


def _control(config: Config) -> Iterator[str]:
    """Report a control pass that cannot be, or whose loss would not be logged."""
    count = config.eval.control_interval
    flag = f"--eval.control_interval {count}"
    interval = config.logging.interval
    arch = config.architecture
    if count < 0:
        yield f"{flag}: must be 0, or a number of steps"
    elif count and interval > 0 and count % interval:
        yield (
            f"{flag}: must be a multiple of --logging.interval {interval}, the steps whose figures"
            " are logged"
        )
    if count and arch.needs.spans_step:
        yield f"{flag}: the objective {arch.objective} is nothing without images; leave it out"


def _shots(config: Config) -> Iterator[str]:
    """Report what is wrong with examples in front of questions."""
    asked = config.eval
    flag = f"--eval.shots {','.join(map(str, asked.shots))}"
    if any(count < 0 for count in asked.shots) or len(set(asked.shots)) < len(asked.shots):
        yield f"{flag}: must be different numbers, each 0 or more"
    if any(asked.shots) and not Path(asked.examples).is_file():
        yield f"{flag} needs --eval.examples, a file of questions; it is {asked.examples!r}"
    if asked.examples and not any(asked.shots):
        yield f"--eval.examples {asked.examples} has no effect without --eval.shots, such as 0,4"
    if asked.shots and not asked.tasks:
        yield f"{flag} needs --eval.tasks"


def _only(config: Config) -> Iterator[str]:
    """Report what does not go with measuring alone."""
    files = config.checkpoint
    if not files.load and config.init == Init():
        yield "--eval.only true needs the weights of --checkpoint.load or --init"
    if has_steps(files.save):
        yield (
            f"--eval.only true: --checkpoint.save {files.save} holds the checkpoints of a run; name"
            " the weights with --checkpoint.load, and another folder for answers and figures"
        )
    if files.export_hf:
        yield "--eval.only true trains no model for --checkpoint.export_hf; leave it out"
    for part in ("vision", "language"):
        if vars(config.fp8)[part] == "delayed":
            yield (
                f"--fp8.{part} delayed finds its scales while it trains, and --eval.only true does"
                " not train; use none"
            )


def _best(config: Config) -> Iterator[str]:
    """Report a figure that the best checkpoints cannot be chosen by."""
    files = config.checkpoint
    task = files.best_by.partition("/")[0]
    if files.best_by == VALID_LOSS:
        if files.keep_best > 0 and config.training.eval_interval > 0 and not config.data.valid:
            yield (
                f"--checkpoint.keep_best {files.keep_best} goes by the validation loss, and needs"
                " --data.valid; or name a figure of a task with --checkpoint.best_by"
            )
    elif files.keep_best < 1:
        yield f"--checkpoint.best_by {files.best_by} has no effect without --checkpoint.keep_best"
    elif task not in {
        shots_name(Path(path).stem, count)
        for path in config.eval.tasks
        for count in config.eval.shots or (0,)
    }:
        yield (
            f"--checkpoint.best_by {files.best_by}: --eval.tasks has no task {task}; it must be"
            f" {VALID_LOSS} or TASK/FIGURE, such as exam/accuracy for exam.jsonl"
        )
