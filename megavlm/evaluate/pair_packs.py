"""Images and texts of a task as packs of pairs, which a model of two encoders embeds.

The first text stands beside the first image, the second beside the second. What is left of the
texts is in packs without images; images that are left stand beside the first text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megavlm.data.images.tiling import Tiling
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.sample import Image
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.evaluate.answer import Score
from megavlm.evaluate.media import image_of
from megavlm.evaluate.packs import Request, RequestReader, arrange, usage_of
from megavlm.evaluate.pair_metrics import PAIR_METRICS, Embedded
from megavlm.evaluate.task import Task


@dataclass(frozen=True, kw_only=True)
class PairPacks:
    """A task of a metric of pairs, ready for the model.

    Args:
        task: its images with their texts or classes.
        texts: all texts that are compared: captions, or prompts of classes.
        owners: of each text, the index of its image or class.
        truth: of each image, its own index or that of its class.
        requests: the pairs that are embedded, of which the first have the images and the first have
            the texts.
        order: the indices in ``requests`` of each pack.
        packs: the packs.
    """

    task: Task
    texts: tuple[str, ...]
    owners: tuple[int, ...]
    truth: tuple[int, ...]
    requests: tuple[Request, ...]
    order: tuple[tuple[int, ...], ...]
    packs: PackedDataset

    def judge(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[Score, list[str]]:
        """Return what the metric says, and the text or class that each image is nearest to.

        Args:
            images: embeddings of the images, on the host [I, E].
            texts: of the texts [T, E].
        """
        found = Embedded(
            images=images,
            texts=texts,
            owners=torch.tensor(self.owners),
            truth=torch.tensor(self.truth),
        )
        score, nearest = PAIR_METRICS[self.task.metric].judge(found)
        names = self.task.classes or self.texts
        return score, [names[index] for index in nearest]


def prepare_pairs(task: Task, folder: Path | str, longest: int) -> PairPacks:
    """Make the packs of a task, with the tokenizer, template and tiling of a packed dataset.

    Args:
        task: of a metric of pairs.
        folder: of the dataset.
        longest: most tokens of a text, at which it is cut; 0: the template's.

    Raises:
        ValueError: packs that are not of pairs, an image that cannot be read, or a text that does
            not fit.
    """
    manifest, template, tiling = usage_of(folder, longest)
    if not template.format.is_of_pairs:
        raise ValueError(
            f"--eval.tasks {task.path}: the metric {task.metric} compares images and texts, and the"
            f" template {manifest.template} of {folder} is not of pairs"
        )
    texts, owners = _texts(task)
    requests = tuple(_pairs(task, texts, owners, template, tiling))
    images = len(task.questions)
    with_images = arrange(requests[:images], manifest)
    without = arrange(requests[images:], manifest)
    order = (*with_images, *([index + images for index in pack] for pack in without))
    return PairPacks(
        task=task,
        texts=texts,
        owners=owners,
        truth=tuple(
            task.classes.index(one.truth[0]) if task.classes else index
            for index, one in enumerate(task.questions)
        ),
        requests=requests,
        order=tuple(map(tuple, order)),
        packs=PackedDataset(RequestReader(requests, order, manifest)),
    )


def _texts(task: Task) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return all texts of a task, and the index of the class or image of each."""
    if task.classes:
        found = [
            (template.replace("{}", name), index)
            for index, name in enumerate(task.classes)
            for template in task.templates
        ]
    else:
        found = [(text, index) for index, one in enumerate(task.questions) for text in one.truth]
    return tuple(text for text, _ in found), tuple(index for _, index in found)


def _pairs(
    task: Task,
    texts: tuple[str, ...],
    owners: tuple[int, ...],
    template: ChatTemplate,
    tiling: Tiling,
) -> Iterator[Request]:
    """Yield the pairs that are embedded; arguments as of ``PairPacks``."""
    tokens = [_tokens(task, text, owner, template) for text, owner in zip(texts, owners)]
    for index in range(max(len(task.questions), len(texts))):
        images: tuple[Image, ...] = ()
        line = 0
        if index < len(task.questions):
            question = task.questions[index]
            line = question.line
            images = (image_of(question.images[0], tiling, 1, task.where(question)),)
        words = tokens[index if index < len(texts) else 0]
        yield Request(
            path=task.path,
            line=line,
            tokens=words,
            supervised=np.ones(len(words), bool),
            images=images,
        )


def _tokens(task: Task, text: str, owner: int, template: ChatTemplate) -> np.ndarray:
    """Return the tokens of a text."""
    try:
        return template.encode((Turn(role="pretrain", text=text),), [1])[0]
    except RejectError as error:
        where = task.path if task.classes else task.where(task.questions[owner])
        raise ValueError(f"--eval.tasks {where}: {error.detail}") from None
