"""Cross checks of what a model is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megavlm.config.parts import Init
from megavlm.config.schema import Config


def evaluation_problems(config: Config) -> Iterator[str]:
    """Everything about evaluation that cannot be, each naming the flag to change."""
    asked = config.eval
    for path in asked.tasks:
        if not Path(path).is_file():
            yield f"--eval.tasks {path}: no such file"
    if asked.max_new_tokens < 1:
        yield f"--eval.max_new_tokens {asked.max_new_tokens}: must be at least 1"
    has_loss = bool(config.data.valid)
    interval = config.training.eval_interval
    if interval > 0 and not (has_loss or asked.tasks):
        yield (
            f"--training.eval_interval {interval} needs --data.valid, the validation set, or"
            " --eval.tasks"
        )
    if config.checkpoint.keep_best > 0 and interval > 0 and not has_loss:
        yield (
            f"--checkpoint.keep_best {config.checkpoint.keep_best} goes by the validation loss, and"
            " needs --data.valid"
        )
    objective = config.architecture.objective
    if asked.tasks and objective != "next_token":
        yield (
            f"--eval.tasks asks for answers, and a model of the objective {objective} gives none;"
            " leave it out"
        )
    if asked.only and not (asked.tasks or config.data.valid):
        yield "--eval.only true needs --eval.tasks or --data.valid: there is nothing to measure"
    if asked.only and not config.checkpoint.load and config.init == Init():
        yield "--eval.only true needs the weights of --checkpoint.load or --init"
