"""What a model is asked during training."""

from __future__ import annotations

from dataclasses import dataclass

VALID_LOSS = "valid_loss"
"""Name of the loss on ``data.valid``; figures of tasks are called ``TASK/FIGURE``."""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Tasks that the model answers at each evaluation.

    Args:
        tasks: JSONL files of questions, images and answers, whose metrics are logged beside the
            validation loss.
        max_new_tokens: longest answer. The whole prompt runs again for each token, so this is for
            short answers.
        without_images: also measure the validation loss with every image in one colour, the mean
            of the pixels. A model that is not worse without images ignores them.
        only: answer the tasks and measure the validation loss with the weights that are loaded,
            and do not train.
    """

    tasks: tuple[str, ...] = ()
    max_new_tokens: int = 16
    without_images: bool = False
    only: bool = False
