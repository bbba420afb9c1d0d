"""Answers of transformers' own class of a model, by its ``generate``, to the questions and in the
files of the trainer's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megavlm.convert.hf.hub_formats import dialect_of, hub_format_of
from megavlm.convert.hf.reference import (
    load_reference,
    refuse_other_tiles,
    shown_pixels,
    tile_inputs,
)
from megavlm.convert.hf.reference_videos import with_videos
from megavlm.data.store.manifest import read_manifest
from megavlm.evaluate.graded import ANSWERS, chosen, grade, write_rows, written
from megavlm.evaluate.packs import TaskPacks, prepare
from megavlm.evaluate.task import Task
from megavlm.io import atomic

# Dialects whose classes take the prompt and the pixels of its images, as below.
_ANSWERING = (
    *("native", "llava", "llava_next", "llava_onevision", "paligemma", "fuyu"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
)


def answer_tasks(
    model: Path, tasks: Sequence[Task], packs: Path, target: Path, max_new_tokens: int
) -> None:
    """Answer tasks, in float32, and write answers and figures where a run would.

    Args:
        model: Hugging Face folder.
        tasks: the questions.
        packs: packed dataset whose template, tokenizer and tiles are used.
        target: folder to write.
        max_new_tokens: longest answer.

    Raises:
        ValueError: a class that takes other inputs, or questions that do not fit the packs.
    """
    if dialect_of(model) not in _ANSWERING:
        raise ValueError(
            f"{model}: --transformers answers with the classes of {', '.join(_ANSWERING)}, and not"
            f" with {hub_format_of(model).class_name}; leave it out, and the trainer answers"
        )
    for task in tasks:
        if task.is_of_pairs:
            raise ValueError(
                f"{task.path}: --transformers answers questions, and the metric {task.metric}"
                " compares images and texts; leave it out"
            )
    refuse_other_tiles(f"--packs {packs}", read_manifest(packs), model)
    prepared = [prepare(task, packs) for task in tasks]
    reference = load_reference(model).to("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, float] = {}
    for task in prepared:
        if task.task.questions[0].choices:
            given = chosen(task.task, choose(reference, task))
        else:
            given = written(task, generate(reference, task, max_new_tokens))
        graded = grade(task.task, given)
        write_rows(target / ANSWERS / "step-00000000" / f"{task.task.name}.jsonl", graded.rows)
        figures |= graded.figures
        figures |= {
            f"{name}/{category}": value
            for name, found in graded.by_category.items()
            for category, value in found.items()
        }
    record = {"step": 0, "time": round(time.time(), 3)} | figures
    atomic.write_text(target / "metrics.jsonl", json.dumps(record) + "\n")


@torch.no_grad()
def generate(model: nn.Module, task: TaskPacks, max_new_tokens: int) -> list[list[int]]:
    """Return the tokens of the greedy answer to each question, with the one that ends it.

    Args:
        model: of transformers.
        task: questions without choices.
        max_new_tokens: longest answer.
    """
    answers: list[list[int]] = []
    for inputs in _inputs(model, task):
        length = inputs["input_ids"].shape[1]

        def is_over(tokens: Tensor, scores: Tensor, start: int = length, **_: object) -> Tensor:
            over = task.is_over(tokens[0, start:].tolist())
            return torch.tensor([over], device=tokens.device)

        made = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(task.ends),
            stopping_criteria=[is_over],
        )
        answers.append(made[0, length:].tolist())
    return answers


@torch.no_grad()
def choose(model: nn.Module, task: TaskPacks) -> list[int]:
    """Return the likeliest choice of each question, by the sum of its tokens' log-probabilities.

    Args:
        model: of transformers.
        task: questions with choices.
    """
    sums: dict[int, list[float]] = {}
    for one, owner, inputs in zip(task.requests, task.owners, _inputs(model, task), strict=True):
        logs = model(**inputs).logits[0].log_softmax(-1)
        places = np.flatnonzero(one.supervised)
        found = sum(float(logs[place - 1, one.tokens[place]]) for place in places)
        sums.setdefault(owner, []).append(found)
    return [found.index(max(found)) for _, found in sorted(sums.items())]


def _inputs(model: nn.Module, task: TaskPacks) -> Iterator[dict[str, Tensor]]:
    """Yield what the model reads of each question, or of each of its choices, in their order."""
    manifest = task.packs.manifest
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (manifest.pixel_mean, manifest.pixel_std)
    )
    for number, pack in enumerate(task.order):
        tiles = shown_pixels(task.packs, number)
        end = 0
        for one in (task.requests[index] for index in pack):
            start = end
            end += one.tiles
            tokens = torch.from_numpy(one.tokens.astype(np.int64))[None]
            inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
            pixels = (tiles[start:end].float() / 255 - mean) / std
            if one.tiles and model.config.model_type == "fuyu":
                pixels = pixels.permute(0, 2, 3, 1).flatten(1)[None]
            inputs |= tile_inputs(model, pixels, one.images, tokens[0])
            if model.config.model_type == "paligemma":
                # All of a prompt is a prefix, which sees itself; a choice behind it is not.
                choice = torch.from_numpy(one.supervised.astype(np.int64))[None]
                inputs["token_type_ids"] = choice
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            yield with_videos(model, inputs, one.images, task.packs.layout)
