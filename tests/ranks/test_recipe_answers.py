"""Models of recipes answer questions during training as transformers does: behind image tokens of
CLIP, as a prefix-LM, whose prompt sees itself, and with patches or grids of images of any size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.schema import Architecture, Config, Eval
from megavlm.config.tiling import BOUNDED, VideoPixels
from megavlm.data.images.anyres import USUAL_GRIDS
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS, add_special_tokens, load_tokenizer
from tests.convert import (
    fuyu_models,
    llava_models,
    llava_next_models,
    paligemma_models,
    qwen_vl_models,
)
from tests.convert.fuyu_models import make_fuyu
from tests.convert.llava_models import make_llava
from tests.convert.llava_next_models import make_llava_next, make_llava_onevision
from tests.convert.paligemma_models import make_paligemma
from tests.convert.part_folders import (
    make_fuyu_tokenizer,
    make_gemma_tokenizer,
    make_tokenizer,
)
from tests.convert.qwen_vl_models import make_qwen_vl
from tests.convert.round_trip import golden_words
from tests.data.samples import make_dataset, make_image
from tests.ranks.model_checks import WORLDS
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for

NEW_TOKENS = 5
TEMPLATES = {
    "paligemma": "paligemma",
    "paligemma 2": "paligemma",
    "fuyu": "fuyu",
    "llava": "llava_v1",
    "llava_next": "llava_v1",
    "llava_onevision": "llava_v1",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl experts": "qwen3_vl",
}
_QWEN_TOKENS = IMAGE_TOKEN_SETS["qwen2_vl"].added
CASES: dict[str, tuple[Architecture, Callable, Callable, str, tuple[str, ...]]] = {
    "paligemma": (
        paligemma_models.KINDS["untied"],  # a tied head repeats the last token
        make_paligemma,
        make_gemma_tokenizer,
        "stretch",
        ("vision", "connector", "language"),
    ),
    "paligemma 2": (
        paligemma_models.UNTIED2,
        make_paligemma,
        make_gemma_tokenizer,
        "stretch",
        ("vision", "connector", "language"),
    ),
    "fuyu": (
        fuyu_models.SMALL,
        make_fuyu,
        make_fuyu_tokenizer,
        "patches",
        ("connector", "language"),
    ),
    "llava": (
        llava_models.SMALL,
        make_llava,
        partial(golden_words, image_tokens="llava"),
        "pad",
        ("connector", "language"),
    ),
    "llava_next": (
        llava_next_models.SMALL,
        make_llava_next,
        partial(golden_words, image_tokens="llava"),
        "anyres",
        ("vision", "connector", "language"),
    ),
    "llava_onevision": (
        llava_next_models.ONEVISION,
        make_llava_onevision,
        partial(golden_words, image_tokens="llava"),
        "anyres_max_9",
        ("vision", "connector", "language"),
    ),
    "qwen2_vl": (
        qwen_vl_models.SMALL_2,
        make_qwen_vl,
        partial(make_tokenizer, extra=_QWEN_TOKENS),
        "native",
        ("vision", "connector", "language"),
    ),
    "qwen3_vl": (
        qwen_vl_models.SMALL_3,
        make_qwen_vl,
        partial(make_tokenizer, extra=_QWEN_TOKENS),
        "native",
        ("vision", "connector", "language"),
    ),
    "qwen3_vl experts": (
        qwen_vl_models.SMALL_3_MOE,
        make_qwen_vl,
        partial(make_tokenizer, extra=_QWEN_TOKENS),
        "native",
        ("vision", "connector", "language"),
    ),
    "qwen2_5_vl": (
        qwen_vl_models.SMALL,
        make_qwen_vl,
        partial(make_tokenizer, extra=_QWEN_TOKENS),
        "native",
        ("vision", "connector", "language"),
    ),
}


def answers(config: Config, folder: Path) -> list[list[int]]:
    """Answer a task with the weights of a Hugging Face folder."""
    from megavlm.convert.hf import convert
    from megavlm.model import weights
    from megavlm.train.generate import generate
    from megavlm.train.tasks import open_tasks
    from tests.ranks.runs import build

    job = build(config)
    weights.fill(job.chunks, convert.full_tensors(folder, config.architecture))
    for chunk in job.ddp_chunks:
        chunk.eval()
    (task,) = open_tasks(config)
    return generate(job, task, NEW_TOKENS)


def answers_of_transformers(config: Config, folder: Path) -> list[list[int]]:
    """Answer the same questions, each by itself."""
    from megavlm.convert.hf.reference import load_reference
    from megavlm.evaluate import by_transformers
    from megavlm.train.tasks import open_tasks

    (task,) = open_tasks(config)
    return by_transformers.generate(load_reference(folder), task, NEW_TOKENS)


def _about_videos(folder: Path, rng: np.random.Generator, size: int) -> list[dict]:
    """Return questions about videos, which are folders of frames: some of one, and two of unlike
    lengths with an image.
    """
    for name, frames in (("a", 5), ("b", 2)):
        (folder / name).mkdir()
        for number in range(frames):
            (folder / name / f"{number}.png").write_bytes(make_image(rng, size, 2, 1).encoded)
    both = dict(video=["a", "b"], image="0.png", question="is <video> <image> or <video>")
    return [dict(video="a", frames=3, question="what", answer="a"), both | dict(answer="b")]


@pytest.mark.parametrize("name", CASES)
def test_answers_equal_those_of_transformers(ranks: Pool, tmp_path: Path, name: str) -> None:
    small, make_model, make_words, tiling, trainable = CASES[name]
    words = tmp_path / "packs" / "tokenizer"
    make_words(tmp_path / "words")
    tokenizer = load_tokenizer(tmp_path / "words")
    add_special_tokens(tokenizer, small.image_tokens)
    context = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN_SETS[small.image_tokens].context)
    rows = max(tokenizer.get_vocab().values()) + 2
    language = dataclasses.replace(small.language, vocab_size=rows)
    architecture = dataclasses.replace(small, language=language)
    size = architecture.vision.image_size
    sizes = dict(tile_size=size, features_per_tile=architecture.features_per_tile)
    manifest = make_dataset(
        tmp_path / "packs", packs=4, vocab_size=rows, context_token_id=context, **sizes
    )
    dataclasses.replace(
        manifest,
        template=TEMPLATES[name],
        system_message="",
        tiling=tiling,
        tile_cap=64,
        pixel_mean=architecture.vision.pixel_mean,
        pixel_std=architecture.vision.pixel_std,
        image_limit=(6 * size, 6 * size),
        min_pixels=1,
        video=VideoPixels(least=size**2, most=6 * size**2, total=15 * size**2),
        grids=USUAL_GRIDS.get(tiling, ()),
    ).write(tmp_path / "packs")
    tokenizer.save_pretrained(words)
    folder = make_model(tmp_path / "hf", architecture, torch.float32, image_token_id=context)
    rng = np.random.default_rng(4)
    rows = []
    for number, question in enumerate(("what is it", "which of the many things is that", "who")):
        image = make_image(rng, size, 1 + number, 2)
        (tmp_path / f"{number}.png").write_bytes(image.encoded)
        rows.append(dict(question=question, image=f"{number}.png", answer="a"))
    if name == "llava" or tiling in (BOUNDED, "native"):
        rows += _about_videos(tmp_path, rng, size)
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def configure(**settings) -> Config:
        config = config_for(tmp_path / "packs", trainable=trainable, **settings)
        asked = Eval(tasks=(str(tmp_path / "task.jsonl"),), max_new_tokens=NEW_TOKENS)
        return dataclasses.replace(
            config, architecture=architecture, recipe=name.split()[0], stage="1", eval=asked
        )

    expected = answers_of_transformers(configure(), folder)
    assert len({tuple(tokens) for tokens in expected}) > 1
    for layout, (world, settings) in WORLDS.items():
        for found in ranks.run(answers, world, configure(**settings), folder):
            assert found == expected, layout
