"""Two answers that share their images, stored and encoded once, have the losses and gradients of
two samples with images of their own, in every recipe that can be trained on preferences.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megavlm.config.schema import Architecture, Config
from megavlm.config.tiling import Mode
from megavlm.data.sample import Sample
from tests.convert.blip2_models import OPT
from tests.convert.fuyu_models import SMALL as FUYU
from tests.convert.llava_models import SMALL as LLAVA
from tests.convert.llava_next_models import (
    LARGE_SIZES,
    ONEVISION,
    make_anyres_sample,
    write_anyres,
)
from tests.convert.llava_next_models import SMALL as LLAVA_NEXT
from tests.convert.paligemma_models import SMALL as PALIGEMMA
from tests.data.preference_packs import answers_apart, with_rejected
from tests.data.samples import make_sample, write_packs
from tests.ranks.model_checks import recipe_config, sizes_of
from tests.ranks.pool import Pool
from tests.ranks.runs import EVERYTHING, TINY
from tests.ranks.test_instructblip import LONGEST
from tests.ranks.test_instructblip import MODEL as INSTRUCTBLIP
from tests.ranks.test_packs import losses_and_gradients

CAPACITY = 768
MODELS: dict[str, Architecture] = {
    "internvl": TINY,
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": ONEVISION,
    "paligemma": PALIGEMMA,
    "fuyu": FUYU,
    "blip2": OPT,
    "instructblip": INSTRUCTBLIP,
}
GRIDS: dict[str, Mode] = {"llava_next": "anyres", "llava_onevision": "anyres_max_9"}


def make_pairs(recipe: str) -> list[Sample]:
    """Make pairs of answers to a question with an image, without one, and (of grids) with two."""
    model = MODELS[recipe]
    rng = np.random.default_rng(4)
    sizes = sizes_of(model)
    if mode := GRIDS.get(recipe):
        shown = ((LARGE_SIZES[3],), (), LARGE_SIZES[:2])
        samples = [
            make_anyres_sample(rng, each, text_tokens=9 + line, line=line, mode=mode, **sizes)
            for line, each in enumerate(shown, start=1)
        ]
    else:
        asked = LONGEST if model.connector.instruction_tokens else 0
        samples = [
            make_sample(
                rng,
                images=line != 2,
                text_tokens=9 + line,
                line=line,
                grids=((1, 1),),
                instruction_tokens=asked and asked - line,
                instruction_vocab=max(model.connector.qformer.vocab_size, 2),
                **sizes,
            )
            for line in (1, 2, 3)
        ]
    return [with_rejected(one, rng, 4 + one.line, sizes["vocab_size"]) for one in samples]


def configure(recipe: str, folder: Path, samples: list[Sample]) -> Config:
    """Configure a run on one pack of some samples; every part is trained."""
    model = MODELS[recipe]
    settings = dict(capacity=CAPACITY, alignment=4, **sizes_of(model))
    if mode := GRIDS.get(recipe):
        write_anyres(folder, [samples], mode, **settings)
    else:
        asked = LONGEST if model.connector.instruction_tokens else 0
        write_packs(folder, [samples], instruction_length=asked, **settings)
    trainable = EVERYTHING if model.vision.exists else EVERYTHING[1:]
    return recipe_config(recipe, model, folder, trainable=trainable, global_batch_size=1)


@pytest.mark.parametrize("recipe", MODELS)
def test_answers_that_share_images_train_as_samples_with_their_own(
    ranks: Pool, tmp_path: Path, recipe: str
) -> None:
    pairs = make_pairs(recipe)
    shared = configure(recipe, tmp_path / "shared", pairs)
    apart = configure(recipe, tmp_path / "apart", answers_apart(pairs))
    [([losses], gradients)] = ranks.run(losses_and_gradients, 1, shared)
    [([expected], all_expected)] = ranks.run(losses_and_gradients, 1, apart)
    assert len(losses) > 20
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert gradients.keys() == all_expected.keys()
    for key, gradient in gradients.items():
        limit = 1e-5 * np.abs(all_expected[key]).max() + 1e-7
        np.testing.assert_allclose(gradient, all_expected[key], atol=limit, err_msg=key)
    assert any(np.abs(gradients[key]).max() > 0 for key in gradients if "connector" in key)
