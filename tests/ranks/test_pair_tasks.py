"""Tasks of a model of two encoders, in training and by ``tools/evaluate.py``, at every layout."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.schema import Checkpoint, Config, Data, Eval, Logging
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.job import pack_dataset
from megavlm.data.packing.settings import Job as Packing
from megavlm.data.records.meta_file import single_source
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for
from tests.ranks.test_resume import losses, run_job
from tests.score.models import (
    WORDS,
    caption,
    embeddings_of_transformers,
    make_captions,
    make_towers,
    write_lines,
)
from tools import evaluate

IMAGES = 12
CLASSES = WORDS[2:6]
TEMPLATES = ("a {}", "{} at home", "b b {}")
LAYOUTS = {
    "DP2": (2, {}),
    "PP2": (2, dict(pipeline_model_parallel_size=2, layout="v*2,c,t|t,h")),
    "TP2": (2, dict(tensor_model_parallel_size=2)),
    "TP2 DP3": (6, dict(tensor_model_parallel_size=2)),
}
ALWAYS = ("DP2", "PP2")


def captions(number: int) -> list[str]:
    """Return one to three texts of an image."""
    return [caption(100 * number + one) for one in range(1 + number % 3)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a random CLIP, packs of pairs, and a task of each metric."""
    folder = tmp_path_factory.mktemp("pair_tasks")
    make_towers(folder / "clip", "clip")
    vision = architecture_from_hf(folder / "clip").vision
    write_lines(folder / "pairs.jsonl", make_captions(folder / "images", IMAGES))
    pack_dataset(
        Packing(
            sources=single_source(folder / "pairs.jsonl", folder / "images"),
            tokenizer=str(folder / "clip"),
            out=str(folder / "packs"),
            capacity=60,
            tile_cap=4,
            features_per_tile=0,
            template="clip",
            truncate=12,
            tiling=Tiling(tile_size=16, max_tiles=1, mode="crop", pixel_mean=vision.pixel_mean),
            pixel_std=vision.pixel_std,
        )
    )
    image = [{"image": f"images/{number}.png"} for number in range(IMAGES)]
    found = {
        "found": [
            one | {"answers": captions(number), "metric": "retrieval", "category": "ab"[number % 2]}
            for number, one in enumerate(image)
        ],
        "named": [
            {"choices": CLASSES, "templates": TEMPLATES, "metric": "zero_shot"},
            *(
                one | {"answer": CLASSES[number % 4], "metric": "zero_shot"}
                for number, one in enumerate(image)
            ),
        ],
        "alike": [
            one | {"answers": captions(number), "metric": "clip_similarity"}
            for number, one in enumerate(image)
        ],
    }
    for name, rows in found.items():
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def expected(data: Path) -> dict[str, float]:
    """Compute the figures with transformers, by brute force."""
    texts = [(text, number) for number in range(IMAGES) for text in captions(number)]
    prompts = [one.replace("{}", name) for name in CLASSES for one in TEMPLATES]
    paths = [data / "images" / f"{number}.png" for number in range(IMAGES)]
    words = [text for text, _ in texts] + prompts
    images, found = embeddings_of_transformers(
        data / "clip", "clip", [paths[i % IMAGES] for i in range(len(words))], words
    )
    images = images[:IMAGES]
    similar = images @ found[: len(texts)].T
    own = np.array([number for _, number in texts])
    figures = {}
    for cut in (1, 5, 10):
        near = [number in own[np.argsort(-row)[:cut]] for number, row in enumerate(similar)]
        figures[f"found/image_to_text_at_{cut}"] = float(np.mean(near))
        if cut == 1:
            for place, name in enumerate("ab"):
                figures[f"found/image_to_text_at_1/{name}"] = float(np.mean(near[place::2]))
        near = [
            number in np.argsort(-row)[:cut] for number, row in zip(own, similar.T, strict=True)
        ]
        figures[f"found/text_to_image_at_{cut}"] = float(np.mean(near))
    centres = found[len(texts) :].reshape(len(CLASSES), len(TEMPLATES), -1).mean(axis=1)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    right = (images @ centres.T).argmax(axis=1) == np.arange(IMAGES) % 4
    figures["named/accuracy"] = float(right.mean())
    figures["named/accuracy_at_5"] = 1.0
    figures["named/mean_per_class"] = float(np.mean([right[one::4].mean() for one in range(4)]))
    of_images = [similar[number, own == number].mean() for number in range(IMAGES)]
    figures["alike/similarity"] = float(np.mean(of_images))
    return figures


def config_of(data: Path, save: Path, **settings) -> Config:
    usual = dict(global_batch_size=settings.pop("batch", 1), trainable=("connector",))
    config = config_for(data / "packs", **usual | settings)
    tasks = tuple(str(data / f"{name}.jsonl") for name in ("found", "named", "alike"))
    return dataclasses.replace(
        config,
        architecture=architecture_from_hf(data / "clip"),
        data=Data(train=str(data / "packs"), workers=0, loss_reduction="sample"),
        eval=Eval(tasks=tasks, only=True),
        checkpoint=Checkpoint(load=str(data / "clip"), save=str(save)),
    )


def figures(save: Path, step: int = 0) -> dict[str, float]:
    """Read the figures of an evaluation."""
    lines = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    (found,) = [one for one in lines if one["step"] == step and "found/image_to_text_at_1" in one]
    return {name: value for name, value in found.items() if "/" in name}


def test_figures_are_those_of_transformers(
    data: Path, expected: dict[str, float], ranks: Pool, tmp_path: Path
) -> None:
    ranks.run(run_job, 1, config_of(data, tmp_path / "one"))
    one = figures(tmp_path / "one")
    assert one == pytest.approx(expected, abs=1e-6)
    assert len(set(one.values())) > 6
    answers = tmp_path / "one" / "answers" / "step-00000000"
    rows = [json.loads(line) for line in (answers / "named.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in rows} <= set(CLASSES)
    assert [row["score"] for row in rows] == [
        float(row["prediction"] == row["answers"][0]) for row in rows
    ]
    for name in LAYOUTS if os.environ.get("MEGAVLM_MATRIX") == "all" else ALWAYS:
        world, layout = LAYOUTS[name]
        batch = max(1, world // (2 if layout else 1))
        save = tmp_path / name.replace(" ", "-")
        ranks.run(run_job, world, config_of(data, save, batch=batch, **layout))
        assert figures(save) == pytest.approx(one, abs=1e-6), name


def test_training_does_not_notice(data: Path, ranks: Pool, tmp_path: Path) -> None:
    usual = dict(batch=2, steps=2, eval_interval=1, trainable=("vision", "connector", "language"))
    asked = config_of(data, tmp_path / "asked", **usual)
    positives = dataclasses.replace(asked.architecture.contrastive, positives="image")
    asked = dataclasses.replace(
        asked,
        architecture=dataclasses.replace(asked.architecture, contrastive=positives),
        eval=dataclasses.replace(asked.eval, only=False),
        checkpoint=dataclasses.replace(asked.checkpoint, save_interval=0),
        logging=Logging(interval=1),
    )
    plain = dataclasses.replace(
        asked,
        eval=Eval(),
        training=dataclasses.replace(asked.training, eval_interval=0),
        checkpoint=dataclasses.replace(asked.checkpoint, save=str(tmp_path / "plain")),
    )
    ranks.run(run_job, 2, asked)
    ranks.run(run_job, 2, plain)
    assert losses(tmp_path / "asked") == losses(tmp_path / "plain")
    assert figures(tmp_path / "asked", 0) != figures(tmp_path / "asked", 2)


@pytest.mark.usefixtures("quick_start")
def test_a_folder_of_transformers_is_evaluated(
    data: Path, expected: dict[str, float], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    words = [str(data / "clip"), "--tasks", *(str(data / f"{name}.jsonl") for name in ("found",))]
    words += ["--packs", str(data / "packs"), "--out", str(out)]
    assert evaluate.main([*words, "--", "--training.precision", "float32"]) == 0
    assert "found/image_to_text_at_1" in capfd.readouterr().out
    (found,) = json.loads((out / "summary.json").read_text()).values()
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-6)
    assert "data:image/jpeg" in (out / "index.html").read_text()


def test_metrics_of_other_objectives_are_refused(data: Path, tmp_path: Path) -> None:
    from megavlm.train.tasks import open_tasks

    config = config_of(data, tmp_path)
    write_lines(tmp_path / "text.jsonl", [{"question": "What?", "answer": "x"}])
    asked = dataclasses.replace(config, eval=Eval(tasks=(str(tmp_path / "text.jsonl"),)))
    with pytest.raises(ValueError, match="the metric exact_match is not for .* contrastive, whose"):
        open_tasks(asked)
    words = dataclasses.replace(config.architecture, objective="next_token")
    with pytest.raises(ValueError, match="the metric retrieval is not for .* next_token, whose"):
        open_tasks(dataclasses.replace(config, architecture=words))
    tasks = config.eval.tasks[:1]
    shown = Eval(tasks=tasks, examples=tasks[0], shots=(0, 2))
    with pytest.raises(ValueError, match="the metric retrieval is not for .* next_token, whose"):
        open_tasks(dataclasses.replace(config, architecture=words, eval=shown))
