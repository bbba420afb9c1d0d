"""What a model is asked during training."""

from __future__ import annotations

from dataclasses import dataclass

VALID_LOSS = "valid_loss"
"""Name of the loss on ``data.valid``; figures of tasks are called ``TASK/FIGURE``."""


def shots_name(task: str, shots: int) -> str:
    """Return the name of a task that is asked behind so many examples."""
    return f"{task}_{shots}_shots" if shots else task


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Tasks that the model answers at each evaluation.

    Args:
        tasks: JSONL files of questions, images and answers (of images and texts, for a model of two
            encoders), whose metrics are logged beside the validation loss.
        examples: JSONL file of questions and answers, in the format of a task, that examples in
            front of questions are taken from.
        shots: numbers of examples, such as ``0,4,8``: every task is asked once with each, and its
            figures are called ``TASK_4_shots/FIGURE``; empty: without examples.
        max_new_tokens: longest answer.
        cache_gib: memory of each rank for the keys and values of the questions that are answered at
            once, in GiB: as many packs of questions as fit, at least one.
        without_images: also measure the validation loss with every image in one colour, the mean
            of the pixels. A model that is not worse without images ignores them.
        control_interval: every so many steps, also measure the loss of the step's packs with every
            image in one colour, before the step: ``loss_without_images``; 0: never.
        only: answer the tasks and measure the validation loss with the weights that are loaded,
            and do not train.
    """

    tasks: tuple[str, ...] = ()
    examples: str = ""
    shots: tuple[int, ...] = ()
    max_new_tokens: int = 16
    cache_gib: float = 2.0
    without_images: bool = False
    control_interval: int = 0
    only: bool = False
