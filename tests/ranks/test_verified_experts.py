"""``tools/verify_export.py`` tells rounding, which changes the choice of experts in 16 bits, from
another model.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megavlm.config.schema import Architecture
from megavlm.convert.hf.convert import import_
from megavlm.data.text.tokenizer import fingerprint, load_tokenizer
from tests.convert.models import TOKENIZER
from tests.data.samples import make_dataset
from tests.ranks import test_experts, test_gpt_oss, test_routing
from tests.ranks.pool import Pool
from tests.ranks.test_against_transformers import random_model
from tests.ranks.test_whole_way import agreement

CONTEXT = 5
WORDS = 457
MODELS = {
    "qwen3_moe": test_experts.MODEL,
    "gpt_oss": test_gpt_oss.MODEL,
    "dots1": test_routing.EXPORTED,
}


def make_model(folder: Path, architecture: Architecture) -> None:
    """Write a model, its checkpoint, and packs with padding behind most samples."""
    random_model(architecture, CONTEXT, folder / "hf")
    shutil.copytree(TOKENIZER, folder / "hf", dirs_exist_ok=True)
    import_(folder / "hf", folder / "checkpoint")
    facts = dict(vocab_size=WORDS, context_token_id=CONTEXT, tile_size=16, features_per_tile=4)
    made = make_dataset(folder / "packs", packs=2, capacity=256, alignment=4, **facts)
    known = fingerprint(load_tokenizer(TOKENIZER))
    dataclasses.replace(made, tokenizer_fingerprint=known).write(folder / "packs")


@pytest.mark.parametrize("name", MODELS)
def test_choices_that_rounding_changes_do_not_count(ranks: Pool, tmp_path: Path, name: str) -> None:
    language = dataclasses.replace(MODELS[name].language, vocab_size=WORDS)
    make_model(tmp_path, dataclasses.replace(MODELS[name], language=language))
    paths = (tmp_path / "checkpoint", tmp_path / "hf", tmp_path / "packs")
    [exact] = ranks.run(agreement, 1, *paths)
    assert not exact.failures() and not exact.other_choices and exact.max_abs_difference < 1e-5
    assert exact.choices == 2 * exact.tokens
    [rounded] = ranks.run(agreement, 1, *paths, "bfloat16")
    assert not rounded.failures() and 0 < rounded.largest_shortfall < 0.02
    # Another router makes choices that no rounding explains.
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    router = next(key for key in weights if key.endswith(("mlp.gate.weight", "router.weight")))
    save_file(weights | {router: weights[router].flip(0)}, file, metadata={"format": "pt"})
    [other] = ranks.run(agreement, 1, *paths, "bfloat16")
    assert any(told.startswith("a router chose an expert") for told in other.failures())
