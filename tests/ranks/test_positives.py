"""Pairs that share an image or a text, and texts that go around a ring of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from megavlm.config.schema import Architecture, Checkpoint, Config, Logging
from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.sample import Sample
from tests.data.samples import make_sample, write_packs
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import build
from tests.ranks.test_contrastive import (
    CLIP,
    DROPPED,
    SIGLIP,
    assert_same,
    config_of,
    measure_recalls,
    pack_pairs,
    problems_of,
    run,
)
from tests.ranks.test_resume import STEPS, resume_bit_for_bit

FACTS = dict(vocab_size=199, context_token_id=7, tile_size=16, features_per_tile=0)
# Which image and which text each of 12 pairs has.
IMAGES = (0, 1, 2, 0, 4, 5, 1, 7, 0, 9, 10, 11)
TEXTS = (0, 1, 2, 3, 4, 5, 6, 2, 8, 9, 4, 11)


def with_settings(architecture: Architecture, **settings: Any) -> Architecture:
    changed = dataclasses.replace(architecture.contrastive, **settings)
    return dataclasses.replace(architecture, contrastive=changed)


def shared_samples() -> list[Sample]:
    rng = np.random.default_rng(1)
    usual = dict(images=1, text_tokens=9, grids=((1, 1),), **FACTS)
    fresh = [make_sample(rng, line=line + 1, **usual) for line in range(12)]
    return [
        dataclasses.replace(one, images=fresh[image].images, tokens=fresh[text].tokens)
        for one, image, text in zip(fresh, IMAGES, TEXTS, strict=True)
    ]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack 12 pairs, some of which share an image or a text, in four packs and in one."""
    folder = tmp_path_factory.mktemp("shared")
    samples = shared_samples()
    packs = [samples[start : start + 3] for start in range(0, 12, 3)]
    write_packs(folder / "four", packs, capacity=32, **FACTS)
    write_packs(folder / "one", [samples], capacity=112, **FACTS)
    return folder


def test_equal_images_and_texts_have_equal_ids(shared: Path) -> None:
    dataset = PackedDataset(shared / "four")
    found = np.concatenate(
        [
            dataset.batch(pack, 0, BatchOptions(with_pair_ids=True)).pair_ids.numpy()
            for pack in range(4)
        ]
    )
    for column, expected in enumerate((IMAGES, TEXTS)):
        same = found[:, column][:, None] == found[:, column][None]
        numbers = np.array(expected)
        assert np.array_equal(same, numbers[:, None] == numbers[None])
    assert dataset.batch(0, 0).pair_ids is None
    blind = dataset.batch(0, 0, BatchOptions(with_pair_ids=True, with_tiles=False))
    assert np.array_equal(blind.pair_ids, found[:3]) and len(blind.tiles) == 0


def loss_of(config: Config) -> tuple[float, np.ndarray, float, float]:
    """Return the loss of a step of all packs, the embeddings, scale and bias."""
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.whole_step import outputs_of, run_whole_step

    job = build(config)
    packs = [
        job.train.batch(number, 0, BatchOptions(reduction="sample", with_pair_ids=True))
        for number in range(len(job.train))
    ]
    outputs = outputs_of(job.ddp_chunks, iter(packs), len(packs), job.backend)
    samples = job.samples_of_ranks(job.train.index[np.arange(len(packs))])
    weight = sum(pack.weight_sum for pack in packs)
    step = Microbatches(iter(packs), len(packs), weight, samples=samples)
    loss = run_whole_step(job.ddp_chunks, step, job.backend, forward_only=True)
    objective = job.chunks[-1].objective
    bias = objective.logit_bias
    return (
        float(loss),
        torch.cat(outputs, dim=1).numpy(),
        float(objective.logit_scale.exp()),
        0.0 if bias is None else float(bias),
    )


@pytest.mark.parametrize("positives", ["own", "image", "text", "either"])
@pytest.mark.parametrize("architecture", [CLIP, SIGLIP], ids=["softmax", "sigmoid"])
def test_the_loss_is_the_one_written_out(
    ranks: Pool, shared: Path, architecture: Architecture, positives: str
) -> None:
    model = with_settings(architecture, positives=positives)
    config = config_of(model, shared / "four", drop_path=0.0)
    [(loss, embeddings, scale, bias)] = ranks.run(loss_of, 1, config)
    images, texts = torch.from_numpy(embeddings).double()
    logits = scale * images @ texts.T + bias
    by_image = torch.tensor(IMAGES)[:, None] == torch.tensor(IMAGES)[None]
    by_text = torch.tensor(TEXTS)[:, None] == torch.tensor(TEXTS)[None]
    same = {
        "own": torch.eye(12, dtype=torch.bool),
        "image": by_image,
        "text": by_text,
        "either": by_image | by_text,
    }[positives].double()
    if architecture is SIGLIP:
        expected = -(logsigmoid((2 * same - 1) * logits)).sum() / 12
    else:
        targets = same / same.sum(dim=1, keepdim=True)
        both = (logits.log_softmax(1), logits.T.log_softmax(1))
        expected = -sum((targets * one).sum() for one in both) / 24
    assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "architecture",
    [with_settings(CLIP, positives="image"), with_settings(SIGLIP, positives="either")],
    ids=["softmax", "sigmoid"],
)
def test_shared_images_train_alike_at_every_layout(
    ranks: Pool, shared: Path, architecture: Architecture
) -> None:
    usual = dict(drop_path=0.0, steps=3)
    four = ranks.run(run, 1, config_of(architecture, shared / "four", **usual))
    whole = config_of(architecture, shared / "one", **usual, global_batch_size=1)
    assert_same(ranks.run(run, 1, whole), four)
    layouts = {
        4: {},
        2: dict(pipeline_model_parallel_size=2, layout="v*3,c,t|t*2,h"),
    }
    for world, layout in layouts.items():
        config = config_of(architecture, shared / "four", **usual, **layout)
        assert_same(four, ranks.run(run, world, config))


RESUMED = {"sigmoid": with_settings(SIGLIP, positives="either", exchange="ring")}
if asks_for_all():
    RESUMED["softmax"] = with_settings(DROPPED, positives="image")


@pytest.mark.parametrize("architecture", RESUMED.values(), ids=RESUMED)
def test_shared_images_resume_bit_for_bit(
    ranks: Pool, shared: Path, tmp_path: Path, architecture: Architecture
) -> None:
    def of(save: Path) -> Config:
        config = config_of(architecture, shared / "four", steps=STEPS)
        files = Checkpoint(save=str(save), save_interval=3, keep=0)
        return dataclasses.replace(config, checkpoint=files, logging=Logging(interval=1))

    # Two ranks with two cached microbatches each.
    resume_bit_for_bit(ranks, 2, of, tmp_path)


def test_a_ring_of_ranks_is_a_gather(ranks: Pool, tmp_path: Path) -> None:
    # Packs of 2 to 4 pairs, so that ranks have unequal numbers.
    pack_pairs(tmp_path, text_tokens=(4, 16), capacity=40)
    ring = with_settings(SIGLIP, exchange="ring")
    for batch, worlds in ((4, (1, 2, 4) if asks_for_all() else (4,)), (3, (3,))):
        usual = dict(global_batch_size=batch, steps=3)
        one = ranks.run(run, 1, config_of(SIGLIP, tmp_path, **usual))
        for world in worlds:
            assert_same(one, ranks.run(run, world, config_of(ring, tmp_path, **usual)))


def test_a_ring_knows_which_pairs_share_an_image(ranks: Pool, shared: Path) -> None:
    usual = dict(drop_path=0.0, steps=2)
    gather = with_settings(SIGLIP, positives="image")
    ring = with_settings(gather, exchange="ring")
    one = ranks.run(run, 1, config_of(gather, shared / "four", **usual))
    assert_same(one, ranks.run(run, 2, config_of(ring, shared / "four", **usual)))


def bytes_of_similarities(config: Config) -> tuple[int, float]:
    """Return the bytes that the loss of 64 pairs keeps for its backward pass, embeddings aside, and
    those that the planner counts.
    """
    job = build(config)
    pairs = 64
    objective = job.chunks[-1].objective
    size = config.architecture.contrastive.size
    leaves = [torch.randn(pairs, size).requires_grad_() for _ in range(2)]
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() >= pairs * pairs:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective._pair_losses(*leaves, [pairs], None).sum()
    found = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    return found, config.architecture.needs.step_bytes(config.architecture, pairs, pairs)


@pytest.mark.parametrize(
    ("architecture", "is_kept"),
    [(CLIP, True), (SIGLIP, True), (with_settings(SIGLIP, exchange="ring"), False)],
    ids=["softmax", "sigmoid", "ring"],
)
def test_the_planner_counts_the_similarities(
    ranks: Pool, shared: Path, architecture: Architecture, is_kept: bool
) -> None:
    config = config_of(architecture, shared / "four")
    [(kept, counted)] = ranks.run(bytes_of_similarities, 1, config)
    # What is kept, and what the backward pass makes beside it.
    assert (counted / 3 < kept <= counted) if is_kept else kept == 0 < counted


def test_the_planner_counts_a_step_of_many_pairs(shared: Path) -> None:
    from megavlm.planner.layout import make_layout
    from megavlm.planner.memory import memory
    from megavlm.planner.partition import PackSize

    size = PackSize(tokens=20480.0, squared_lengths=1e6, tiles=256.0)

    def activations(architecture: Architecture, packs: int, ranks: int) -> float:
        config = config_of(architecture, shared / "four", global_batch_size=packs)
        layout = make_layout(config, size)
        return memory(config, layout, ranks, capacity=20480, tiles=256).activations

    alone = activations(CLIP, 1, 1)
    assert activations(CLIP, 64, 64) - alone == 4 * 8 * 256 * 256 * 63
    # Between two passes there are no other activations, and many pairs take more than these.
    assert activations(CLIP, 640, 4) == 4 * 8 * (160 * 256) * (640 * 256)
    ring = with_settings(SIGLIP, exchange="ring")
    assert activations(ring, 640, 4) == 4 * 5 * (160 * 256) ** 2
    assert activations(ring, 64, 64) == activations(ring, 1, 1)


def test_a_ring_is_refused_for_cross_entropy(tmp_path: Path) -> None:
    pack_pairs(tmp_path, text_tokens=(4, 16), capacity=40)
    [found] = problems_of(with_settings(CLIP, exchange="ring"), tmp_path)
    assert "exchange ring: the loss softmax of a pair needs the similarities of all" in found


def test_any_text_of_an_image_counts_and_an_image_is_searched_once(
    ranks: Pool, shared: Path
) -> None:
    config = config_of(CLIP, shared / "four")
    [(figures, packs)] = ranks.run(measure_recalls, 1, config)
    images, texts = np.concatenate(packs, axis=1)
    once = sorted(set(IMAGES))
    similar = images[once] @ texts.T
    is_own = np.array(once)[:, None] == IMAGES
    for direction, rows, own in (
        ("image_to_text", similar, is_own),
        ("text_to_image", similar.T, is_own.T),
    ):
        best = np.where(own, rows, -np.inf).max(axis=1, keepdims=True)
        others = np.where(own, -np.inf, rows)
        # Equal texts are as near, but for a rounding that depends on the processor.
        is_near = abs(others - best) <= 1e-6
        before = (others > best + 1e-6).sum(axis=1) + is_near.sum(axis=1) / 2
        for cut in (1, 5, 10):
            hits = (before < cut).mean()
            assert figures[f"recall/{direction}_at_{cut}"] == pytest.approx(hits)
    two = ranks.run(measure_recalls, 2, config)
    assert [found for found, _ in two] == [figures, figures]
