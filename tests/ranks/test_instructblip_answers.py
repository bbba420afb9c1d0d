"""An InstructBLIP answers questions as transformers' ``generate`` does, token for token."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from megavlm.config.schema import Config, Eval
from megavlm.data.text.tokenizer import QFORMER_TOKENIZER
from tests.convert.blip2_models import INSTRUCT, make_instructblip
from tests.convert.round_trip import golden_words
from tests.data.pair_tokenizer import make_pair_tokenizer
from tests.data.samples import make_dataset, make_image
from tests.ranks.model_checks import recipe_config
from tests.ranks.pool import Pool
from tests.ranks.test_recipe_answers import NEW_TOKENS, answers

IMAGE = 631
QUESTIONS = ("what is it", "which of the many things is that", "who")


def answers_of_transformers(config: Config, folder: Path) -> list[list[int]]:
    """Answer the questions of a task with transformers' class, each by itself."""
    from megavlm.convert.hf.reference import load_reference
    from megavlm.train.tasks import open_tasks

    (task,) = open_tasks(config)
    model = load_reference(folder)
    vision = config.architecture.vision
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (vision.pixel_mean, vision.pixel_std)
    )
    found = []
    for number, pack in enumerate(task.order):
        tiles = task.packs.batch(number, 0).tiles  # one of each question
        for place, one in enumerate(task.requests[index] for index in pack):
            tokens = torch.from_numpy(one.tokens.astype(np.int64))[None]
            instruction = torch.from_numpy(one.instruction.astype(np.int64))[None]
            made = model.generate(
                pixel_values=(tiles[place : place + 1].float() / 255 - mean) / std,
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                qformer_input_ids=instruction,
                qformer_attention_mask=torch.ones_like(instruction),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=sorted(task.ends),
            )
            found.append(made[0, tokens.shape[1] :].tolist())
    return found


def test_answers_equal_those_of_transformers(ranks: Pool, tmp_path: Path) -> None:
    words = tmp_path / "packs" / "tokenizer"
    size = INSTRUCT.vision.image_size
    sizes = dict(tile_size=size, features_per_tile=INSTRUCT.features_per_tile)
    facts = dict(vocab_size=INSTRUCT.language.vocab_size, context_token_id=IMAGE)
    manifest = make_dataset(tmp_path / "packs", packs=4, instruction_length=17, **sizes, **facts)
    golden_words(words, "llava")
    make_pair_tokenizer(words / QFORMER_TOKENIZER, ("what", "is", "it", "who", "many", "things"))
    dataclasses.replace(
        manifest,
        template="instructblip",
        system_message="",
        tiling="stretch",
        tile_cap=64,
        pixel_mean=INSTRUCT.vision.pixel_mean,
        pixel_std=INSTRUCT.vision.pixel_std,
    ).write(tmp_path / "packs")
    folder = make_instructblip(tmp_path / "hf", INSTRUCT, torch.float32, IMAGE)
    rng = np.random.default_rng(4)
    rows = []
    for number, question in enumerate(QUESTIONS):
        image = make_image(rng, size, 1 + number, 2)
        (tmp_path / f"{number}.png").write_bytes(image.encoded)
        rows.append(dict(question=question, image=f"{number}.png", answer="a"))
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = Eval(tasks=(str(tmp_path / "task.jsonl"),), max_new_tokens=NEW_TOKENS)

    config = dataclasses.replace(
        recipe_config("instructblip", INSTRUCT, tmp_path / "packs", trainable=("connector",)),
        stage="1",
        eval=asked,
    )
    expected = answers_of_transformers(config, folder)
    assert len({tuple(tokens) for tokens in expected}) > 1
    [found] = ranks.run(answers, 1, config, folder)
    assert found == expected
