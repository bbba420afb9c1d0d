"""BLIP-2's first stage against what LAVIS's own class answered from the same weights: its three
losses, the scores of matching, the negatives, and the gradient of every weight.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture

from megavlm.config.schema import Config, Data
from megavlm.convert.weights.qformer import retrieval_rows
from megavlm.data.loading.batch import Batch, BatchOptions
from megavlm.data.sample import Sample
from tests.convert import golden_models as golden
from tests.convert.ask_lavis import GOLDEN
from tests.convert.blip2_models import STAGE1
from tests.data.samples import as_png, write_packs
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for

MODEL = dataclasses.replace(
    STAGE1, image_text=dataclasses.replace(STAGE1.image_text, gradient="local")
)
ANSWERS = json.loads(gzip.decompress(GOLDEN.read_bytes()))


def write_pairs(folder: Path, questions: dict[str, Any]) -> None:
    """Write the pairs as packs."""
    size = MODEL.vision.image_size
    samples = [
        Sample(
            tokens=np.array(text, np.int32),
            supervised=np.ones(len(text), bool),
            images=(as_png(Picture.fromarray(np.array(tile, np.uint8).transpose(1, 2, 0))),),
            source=0,
            line=line,
        )
        for line, (text, tile) in enumerate(
            zip(questions["texts"], questions["tiles"], strict=True), start=1
        )
    ]
    first = golden.PAIRS_OF_PACKS[0]
    sizes = dict(vocab_size=questions["qformer"]["vocab_size"], tile_size=size)
    packs = [samples[:first], samples[first:]]
    write_packs(folder, packs, context_token_id=-1, features_per_tile=0, capacity=64, **sizes)


def batches(config: Config, draws: list[list[float]]) -> list[Batch]:
    """Return the packs of a pool, with given numbers to draw negatives by."""
    import torch

    from megavlm.data.loading.dataset import PackedDataset

    dataset = PackedDataset(config.data.train)
    layers = config.architecture.vision.num_layers
    found = []
    for pack, given in enumerate(torch.tensor(draws).split(golden.PAIRS_OF_PACKS, dim=1)):
        batch = dataset.batch(pack, 0, BatchOptions(reduction="sample", vision_layers=layers))
        assert batch.samples == given.shape[1]
        found.append(dataclasses.replace(batch, pair_draws=given))
    return found


def answers(config: Config, folder: Path, draws: list[list[float]]) -> dict[str, Any]:
    """Return what LAVIS's class was asked for, of one pool of both packs."""
    import torch
    from safetensors.torch import load_file

    from megavlm.convert.hf import convert
    from megavlm.model import weights
    from megavlm.model.objective import qformer
    from megavlm.model.vlm import VisionLanguageModel
    from megavlm.parallel import backend, process_groups
    from megavlm.planner.layout import make_layout

    backend.start(5)
    layout = make_layout(config)
    groups = process_groups.create(config.parallel, 0, layout.embedding_chunk)
    model = VisionLanguageModel(config, layout, groups).train()
    whole = convert.full_tensors(folder, config.architecture)
    heads = load_file(folder / golden.HEADS / "model.safetensors")
    weights.fill([model], lambda key, shape: heads[key] if key in heads else whole(key, shape))
    packs = batches(config, draws)
    found: dict[str, list[Any]] = {"matching": [], "negatives": []}
    model.objective.matching.register_forward_hook(
        lambda *call: found["matching"].append(call[2].mean(dim=1).unflatten(0, (3, -1)).detach())
    )

    def keep(*given: torch.Tensor) -> torch.Tensor:
        found["negatives"].append(draw(*given))
        return found["negatives"][-1]

    draw = qformer.draw_negatives
    qformer.draw_negatives = keep
    losses = model.objective.step_losses(
        [model(batch) for batch in packs], packs, [golden.PAIRS_OF_PACKS]
    )
    qformer.draw_negatives = draw
    ends = [batch.sample_ends[: batch.samples].long() for batch in packs]

    def mean(losses_of_packs: list[torch.Tensor]) -> torch.Tensor:
        pairs = zip(losses_of_packs, ends, strict=True)
        return torch.cat([losses[at] for losses, at in pairs]).mean()

    mean([one.total for one in losses]).backward()
    named = weights.named_weights(model)
    gradients = {key: weight.grad for key, weight in named.items() if weight.grad is not None}
    process_groups.destroy()
    return {
        "losses": {
            name: float(mean([one.named[name] for one in losses])) for name in ("itc", "itm", "itg")
        },
        "matching": torch.cat(found["matching"], dim=1).flatten(0, 1).numpy(),
        # Of each pack: wrong images, then wrong texts.
        "negatives": torch.cat(found["negatives"][::2] + found["negatives"][1::2]).tolist(),
        "gradients": gradients,
    }


@pytest.fixture(scope="module")
def ours(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ask our model, with the same weights, about the same pairs."""
    folder = golden.make_stage1(tmp_path_factory.mktemp("lavis") / "hf")
    assert golden.digest(folder) == ANSWERS["weights"]
    questions = golden.stage1_questions()
    packs = folder.parent / "packs"
    write_pairs(packs, questions)
    config = config_for(packs, trainable=("vision", "connector", "objective"))
    data = Data(train=str(packs), workers=0, loss_reduction="sample")
    config = dataclasses.replace(config, architecture=MODEL, data=data, recipe="blip2")
    [found] = ranks.run(answers, 1, config, folder, questions["draws"])
    return found


def test_losses_scores_and_negatives_are_those_of_the_original(ours: dict[str, Any]) -> None:
    assert ours["negatives"] == ANSWERS["negatives"]
    assert np.abs(ours["matching"] - np.array(ANSWERS["matching"])).max() < 1e-4
    assert ours["losses"] == pytest.approx(ANSWERS["losses"], abs=1e-4)


def test_gradients_are_those_of_the_original(ours: dict[str, Any]) -> None:
    """Every weight's; that of contrast has the authors' form, ``local``."""
    rows = retrieval_rows(MODEL)
    assert {row.key for row in rows} == set(ours["gradients"])
    found = {}
    for row in rows:
        gradient = ours["gradients"][row.key]
        parts = row.split(gradient) if row.names else {row.key: gradient}
        found |= {name: float(part.norm()) for name, part in parts.items()}
    assert found == pytest.approx(ANSWERS["gradients"], rel=1e-4, abs=1e-6)
