"""Chat exports against what OpenGVLab's own InternVLChatModel answered from the same weights."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.schema import Config, Eval
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.data.sample import Sample
from megavlm.data.text.tokenizer import load_tokenizer
from tests.convert import golden_models as golden
from tests.convert.ask_original import GOLDEN
from tests.convert.models import TOKENIZER
from tests.data.samples import write_packs
from tests.ranks.model_checks import answers_of_pack
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for

ANSWERS = json.loads(gzip.decompress(GOLDEN.read_bytes()))


def answers(config: Config, folder: Path) -> list[str]:
    """Answer the task of a run with the weights of a Hugging Face folder."""
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
    return [
        task.template.text([token for token in tokens if token not in task.ends]).strip()
        for tokens in generate(job, task, config.eval.max_new_tokens)
    ]


@pytest.mark.parametrize("kind", golden.KINDS_OF_ORIGINAL)
def test_logits_and_answers_are_those_of_the_original_class(
    ranks: Pool, tmp_path: Path, kind: str
) -> None:
    wanted = ANSWERS[kind]
    folder = golden.export_golden(tmp_path, kind)
    assert golden.digest(folder) == wanted["weights"]
    tokenizer = load_tokenizer(folder)
    tokens = np.array(tokenizer(golden.TEXT)["input_ids"], np.int32)
    assert tokens.tolist() == wanted["ids"]
    images = golden.images()
    supervised = np.zeros(len(tokens), bool)
    supervised[-1] = True
    sample = Sample(tokens=tokens, supervised=supervised, images=tuple(images), source=0, line=1)
    architecture = architecture_from_hf(folder)  # what was tied is not, in this format
    system = json.loads((folder / "config.json").read_text())["system_message"]
    packs = tmp_path / "packs"
    write_packs(
        packs,
        [[sample]],
        vocab_size=len(tokenizer),
        context_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tile_size=golden.SIDE,
        features_per_tile=architecture.features_per_tile,
        capacity=256,
    )
    load_tokenizer(TOKENIZER).save_pretrained(packs / "tokenizer")
    rows = []
    for question, count in golden.QUESTIONS:
        names = [f"{number}.png" for number in range(count)]
        for name, image in zip(names, images):
            (tmp_path / name).write_bytes(image.encoded)
        rows.append({"question": question, "image": names, "answer": "", "system": system})
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(
        config_for(packs),
        architecture=architecture,
        eval=Eval(tasks=(str(task),), max_new_tokens=golden.NEW_TOKENS),
    )
    [(logits, _)] = ranks.run(answers_of_pack, 1, config, folder)
    count = len(wanted["logits"])
    found = logits[len(tokens) - count : len(tokens), : architecture.language.vocab_size]
    assert np.abs(found - np.array(wanted["logits"])).max() < 1e-4
    [answered] = ranks.run(answers, 1, config, folder)
    assert answered == wanted["answers"]
