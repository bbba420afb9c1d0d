"""Stage 1 of BLIP-2: a Q-Former learns by contrast, matching and generation, alike at every
layout.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megavlm.config.checks.rules import problems
from megavlm.config.image_text import ImageText
from megavlm.config.qformer import QFormer
from megavlm.config.schema import (
    NO_LANGUAGE,
    Architecture,
    Checkpoint,
    Config,
    Connector,
    Data,
    Logging,
    Vision,
)
from megavlm.data.loading.batch import BatchOptions
from megavlm.planner.layout import make_layout
from megavlm.planner.memory import memory_by_rank
from megavlm.planner.partition import PackSize
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import Curve, build, config_for, train_curve, whole_weights
from tests.ranks.test_contrastive import assert_same, pack_pairs
from tests.ranks.test_resume import STEPS, forget_the_end, run_job

# Odd sizes: three heads, three layers, a vocabulary that is no multiple of anything.
MODEL = Architecture(
    objective="qformer",
    vision=Vision(
        family="clip",
        image_size=16,
        patch_size=4,
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        activation="quick_gelu",
        layernorm_epsilon=1e-5,
    ),
    connector=Connector(
        kind="qformer",
        qformer=QFormer(
            queries=5,
            num_layers=3,
            hidden_size=24,
            ffn_hidden_size=36,
            num_attention_heads=3,
            text=True,
            vocab_size=200,
            max_position_embeddings=16,
        ),
    ),
    language=NO_LANGUAGE,
    image_text=ImageText(size=10, text_tokens=16),
)
Q_FORMER = ("connector", "objective")
EVERYTHING = ("vision", *Q_FORMER)
PP2 = {"pipeline_model_parallel_size": 2, "layout": "v*2|v,c,h"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, PP2),
    "DP2 x PP2": (4, PP2),
    "DP4": (4, {}),
    "TP2 with copies": (2, {"tensor_model_parallel_size": 2, "vision": "data"}),
    "DP2 x TP2 with copies": (4, {"tensor_model_parallel_size": 2, "vision": "data"}),
}
ALWAYS = ("DP4", "TP2", "DP2 x PP2", "TP2 with copies")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack pairs, 2 to 4 a pack."""
    folder = tmp_path_factory.mktemp("pairs") / "packs"
    pack_pairs(folder, text_tokens=(4, 16), capacity=40)
    return folder


def run(config: Config) -> Curve:
    return train_curve(config)


def job(config: Config) -> int:
    return run_job(config)


def config_of(packs: Path, losses: dict[str, Any] | None = None, **settings: Any) -> Config:
    usual = dict(trainable=EVERYTHING, steps=3, drop_path=0.2, adam_eps=1e-4, lr=1e-3)
    config = config_for(packs, **usual | settings)
    data = Data(train=str(packs), workers=0, loss_reduction="sample")
    model = dataclasses.replace(
        MODEL, image_text=dataclasses.replace(MODEL.image_text, **losses or {})
    )
    return dataclasses.replace(config, architecture=model, data=data)


@pytest.mark.parametrize(
    "losses",
    [{}, {"pool_packs": 2, "gradient": "local", "generation": 0.5}],
    ids=["whole step", "pools of two packs"],
)
def test_every_layout_trains_like_one_process(
    ranks: Pool, pairs: Path, losses: dict[str, Any]
) -> None:
    one = ranks.run(run, 1, config_of(pairs, losses))
    assert min(one[0].grad_norms) > 0
    always = ("DP4", "DP2 x PP2") if losses else ALWAYS  # pools are of data-parallel ranks
    for name in LAYOUTS if asks_for_all() else always:
        world, layout = LAYOUTS[name]
        assert_same(one, ranks.run(run, world, config_of(pairs, losses, **layout)))


def test_the_local_gradient_is_another_one_of_the_same_loss(ranks: Pool, pairs: Path) -> None:
    exact, local = (
        ranks.run(run, 1, config_of(pairs, {"gradient": kind}, steps=1))[0]
        for kind in ("global", "local")
    )
    assert exact.losses == local.losses
    assert abs(exact.grad_norms[0] / local.grad_norms[0] - 1) > 1e-3


def test_the_planner_counts_the_hidden_states_of_the_pool(pairs: Path) -> None:
    size = PackSize(tokens=64.0, squared_lengths=900.0, tiles=4.0)
    found = []
    for packs in (1, 2, 0):
        config = config_of(pairs, {"pool_packs": packs})
        layout = make_layout(config, size)
        found.append(memory_by_rank(config, layout, 1, capacity=64, tiles=4)[0].activations)
    vision = MODEL.vision
    of_pack = 4 * 2 * vision.tokens * vision.hidden_size * 4  # tiles, copies, bytes
    assert found[1] - found[0] == pytest.approx(of_pack)
    assert found[2] - found[0] == pytest.approx(3 * of_pack)  # a step has four packs


def test_a_frozen_encoder_stays_and_its_last_norm_is_trained(ranks: Pool, pairs: Path) -> None:
    settings = dict(trainable=Q_FORMER, drop_path=0.0)
    before = whole_weights(ranks.run(run, 1, config_of(pairs, steps=1, **settings)))
    curve = ranks.run(run, 4, config_of(pairs, steps=3, **settings, **PP2))
    assert_same(ranks.run(run, 1, config_of(pairs, steps=3, **settings)), curve)
    after = whole_weights(curve)
    changed = {key for key, weight in after.items() if not np.array_equal(weight, before[key])}
    assert changed == {key for key in after if not key.startswith("vision.")}
    assert {"connector.norm.weight", "objective.temperature"} < changed


def measured(config: Config) -> dict[str, Any]:
    """Compute the losses of a step with the passes of the authors' code: queries alone, texts
    alone, texts behind cached queries, and the three kinds of pairs.
    """
    import torch

    from megavlm.model.connector.qformer_mask import TextRows, seen_by
    from megavlm.model.objective.qformer import texts_of
    from megavlm.train.pipeline import run_pipeline

    job = build(config)
    objective = job.chunks[0].objective
    options = BatchOptions(reduction="sample", vision_layers=3, seed=config.training.seed)
    ids = job.plan.pack_ids(0, 4)
    packs = [job.train.batch(int(number), at, options) for at, number in enumerate(ids)]
    samples = job.samples_of_ranks(job.train.index[ids])
    outputs = []
    hidden = []

    def keep(batch, output):
        outputs.append(tuple(part.detach() for part in output))
        hidden.append(output[3].detach())
        return output[1].sum()

    run_pipeline(job.ddp_chunks, iter(packs), 4, keep, job.backend, forward_only=True)
    with torch.no_grad():
        found = objective.step_losses(outputs, packs, samples)
        states = torch.cat(hidden)
        tokens, lengths = (
            torch.cat(parts) for parts in zip(*(texts_of(p, 16) for p in packs), strict=True)
        )
        image, text, spoken = _three_passes(
            job.chunks[0], states, tokens, lengths, seen_by, TextRows
        )
        draws = torch.cat([pack.pair_draws for pack in packs], dim=1)
        expected = _reference(
            job.chunks[0], states, tokens, lengths, image, text, spoken, draws, seen_by, TextRows
        )
    ends = [batch.sample_ends[: batch.samples].long() for batch in packs]
    named = {
        name: torch.cat([one.named[name][at] for one, at in zip(found, ends, strict=True)]).mean()
        for name in ("itc", "itm", "itg")
    }
    totals = torch.cat([one.total[at] for one, at in zip(found, ends, strict=True)]).mean()
    return {
        "found": {name: float(value) for name, value in named.items()},
        "expected": expected,
        "total": float(totals),
        "readings": {
            name: sum(float(one.readings[name][0]) for one in found)
            / sum(float(one.readings[name][1]) for one in found)
            for name in found[0].readings
        },
    }


def _three_passes(chunk, states, tokens, lengths, seen_by, rows):
    import torch

    connector = chunk.connector
    objective = chunk.objective
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    memory = connector.memory(states.transpose(0, 1))
    image = objective.image_projection(connector.read(memory))
    alone = connector.read(None, tokens, seen_by(0, [rows(mode="separate", real=real)]))
    text = objective.text_projection(alone[:, 0])
    said = tokens.clone()
    said[:, 0] = 199
    spoken = connector.read(memory, said, seen_by(5, [rows(mode="causal", real=real)]))[:, 5:]
    normal = torch.nn.functional.normalize
    return normal(image, dim=-1), normal(text, dim=-1), spoken


def _reference(chunk, states, tokens, lengths, image, text, spoken, draws, seen_by, rows):
    import torch

    objective = chunk.objective
    connector = chunk.connector
    entropy = torch.nn.functional.cross_entropy
    count = len(tokens)
    own = torch.arange(count)
    scores = torch.stack([(image[i] @ text.T).max(dim=0).values for i in range(count)]) / 0.07
    itc = (
        entropy(scores, own, label_smoothing=0.1) + entropy(scores.T, own, label_smoothing=0.1)
    ) / 2
    negatives = []
    for table, draw in ((scores.T, draws[0]), (scores, draws[1])):
        chosen = []
        for row in range(count):
            weights = table[row].double().softmax(0)
            weights[row] = 0
            sums = weights.cumsum(0)
            chosen.append(int((sums <= float(draw[row]) * sums[-1]).sum()))
        assert all(number != row for row, number in enumerate(chosen))
        negatives.append(torch.tensor(chosen))
    images = torch.cat([own, negatives[0], own])
    texts = torch.cat([own, own, negatives[1]])
    real = (torch.arange(tokens.shape[1]) < lengths[:, None])[texts]
    seen = seen_by(5, [rows(mode="bidirectional", real=real)])
    memory = connector.memory(states[images].transpose(0, 1))
    read = connector.read(memory, tokens[texts], seen)[:, :5]
    labels = torch.cat([torch.ones(count), torch.zeros(2 * count)]).long()
    itm = entropy(objective.matching(read).mean(dim=1), labels)
    hidden = objective.transform_norm(torch.nn.functional.gelu(objective.transform(spoken)))
    logits = hidden @ connector.token_embedding.weight.T + objective.vocabulary_bias
    wanted = tokens.clone()
    wanted[torch.arange(tokens.shape[1]) >= lengths[:, None]] = -100
    itg = entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), label_smoothing=0.1)
    return {"itc": float(itc), "itm": float(itm), "itg": float(itg)}


def test_two_passes_are_the_three_of_the_authors(ranks: Pool, pairs: Path) -> None:
    weights = {"contrast": 2.0, "matching": 0.5, "generation": 0.25}
    [found] = ranks.run(measured, 1, config_of(pairs, weights, drop_path=0.0))
    assert found["found"] == pytest.approx(found["expected"], rel=1e-5)
    itc, itm, itg = (found["found"][name] for name in ("itc", "itm", "itg"))
    assert found["total"] == pytest.approx(2 * itc + 0.5 * itm + 0.25 * itg, rel=1e-5)
    readings = found["readings"]
    assert readings["temperature"] == pytest.approx(0.07)
    both = readings["itm_accuracy_of_pairs"] + 2 * readings["itm_accuracy_of_negatives"]
    assert readings["itm_accuracy"] == pytest.approx(both / 3)


def test_it_resumes_bit_for_bit(ranks: Pool, pairs: Path, tmp_path: Path) -> None:
    def of(folder: Path, **layout: Any) -> Config:
        config = config_of(pairs, {"pool_packs": 2}, steps=STEPS, **layout)
        data = dataclasses.replace(config.data, valid=str(pairs))
        checkpoint = Checkpoint(save=str(folder), save_interval=3)
        logging = Logging(interval=1)
        return dataclasses.replace(config, data=data, checkpoint=checkpoint, logging=logging)

    ranks.run(job, 2, of(tmp_path / "whole"))
    forget_the_end(tmp_path / "whole", tmp_path / "killed")
    ranks.run(job, 2, of(tmp_path / "killed"))
    whole, killed = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    )
    names = ("loss", "itc_loss", "itm_loss", "itg_loss", "grad_norm", "itm_accuracy", "temperature")
    steps = [{name: one[name] for name in names} for one in whole if "grad_norm" in one]
    again = [{name: one[name] for name in names} for one in killed if "grad_norm" in one]
    assert len(steps) == STEPS and again == steps[3:]
    [*_, valid] = [one for one in whole if "valid_loss" in one]
    parts = sum(valid[f"valid_{name}_loss"] for name in ("itc", "itm", "itg"))
    assert valid["valid_loss"] == pytest.approx(parts, rel=1e-5)
    assert 0 <= valid["valid_recall_image_to_text"] <= 1


def test_held_out_losses_have_no_label_smoothing(ranks: Pool, pairs: Path, tmp_path: Path) -> None:
    found = []
    for smoothing in (0.0, 0.4):
        config = config_of(pairs, {"label_smoothing": smoothing}, steps=1, lr=1e-12)
        save = tmp_path / str(smoothing)
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, valid=str(pairs)),
            checkpoint=Checkpoint(save=str(save), save_interval=0),
            logging=Logging(interval=1),
        )
        ranks.run(job, 1, config)
        lines = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
        found.append({name: value for line in lines for name, value in line.items()})
    assert abs(found[1]["itg_loss"] - found[0]["itg_loss"]) > 1e-4
    for name in ("itc", "itm", "itg"):
        held_out = [one[f"valid_{name}_loss"] for one in found]
        assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)


def test_longer_texts_are_refused_and_never_cut_in_silence(ranks: Pool, pairs: Path) -> None:
    from megavlm.train.inspection import inspect

    config = dataclasses.replace(
        config_of(pairs, {"text_tokens": 8}), checkpoint=Checkpoint(save_interval=0)
    )
    with pytest.raises(ValueError, match="sample of 1[0-6] tokens, and .*image_text.text_tokens"):
        inspect(config, 1)
    [curve] = ranks.run(run, 1, dataclasses.replace(config, checkpoint=Checkpoint()))
    assert not np.isfinite(curve.losses[0])


def test_settings_that_cannot_be_are_refused(pairs: Path) -> None:
    def problems_of(config: Config, world: int = 2, **changed: Any) -> list[str]:
        model = dataclasses.replace(config.architecture, **changed)
        checkpoint = Checkpoint(save_interval=0)
        return problems(
            dataclasses.replace(config, architecture=model, checkpoint=checkpoint), world
        )

    assert not problems_of(config_of(pairs))
    [one] = problems_of(config_of(pairs), connector=Connector(kind="mlp"))
    assert "use qformer with --architecture.connector.qformer.text true" in one
    [one] = problems_of(config_of(pairs, {"pool_packs": 3}))
    assert "pool_packs 3 does not divide --training.global_batch_size 4" in one
    [one] = problems_of(config_of(pairs, {"text_tokens": 17}))
    assert "max_position_embeddings 16" in one
    [one] = problems_of(config_of(pairs, {"label_smoothing": 1.0}))
    assert "label_smoothing 1.0" in one


def test_matching_reads_the_weights_that_were_gathered(ranks: Pool, pairs: Path) -> None:
    """No other weight waits for them here."""
    config = config_of(pairs, trainable=("objective.matching",), drop_path=0.0, steps=5)
    one = ranks.run(run, 1, config)
    assert_same(one, ranks.run(run, 2, config))


def sums_of_pool(config: Config) -> dict[str, list[Any]]:
    """Return the gradients that a pool of four packs has for the objective's own parameters, and
    the sums of those that each pack has alone.
    """
    import torch

    from megavlm.train import whole_step

    job = build(config)
    objective = job.chunks[0].objective
    ids = job.plan.pack_ids(0, 4)
    options = BatchOptions(reduction="sample", vision_layers=3, seed=config.training.seed)
    packs = [job.train.batch(int(number), at, options) for at, number in enumerate(ids)]
    samples = job.samples_of_ranks(job.train.index[ids])
    outputs = whole_step.outputs_of(job.ddp_chunks, iter(packs), 4, job.backend)
    found = {"together": [], "alone": []}

    def part(chosen: slice) -> list[torch.Tensor]:
        def loss(first: int, given: list) -> torch.Tensor:
            losses = objective.step_losses(given, packs, samples)
            return whole_step._weighed(losses[chosen], packs[chosen], 1.0, ())

        sums = whole_step._zeros(objective.loss_parameters)
        whole_step._keep_gradients(0, outputs, loss, objective, whole_step.deque(), sums)
        return sums

    found["together"] = part(slice(0, 4))
    alone = [part(slice(number, number + 1)) for number in range(4)]
    found["alone"] = [sum(parts[1:], parts[0]) for parts in zip(*alone, strict=True)]
    return {name: [one.numpy() for one in sums] for name, sums in found.items()}


def test_gradients_of_a_pools_packs_are_summed_in_float32(ranks: Pool, pairs: Path) -> None:
    [found] = ranks.run(sums_of_pool, 1, config_of(pairs, precision="bfloat16"))
    assert len(found["alone"]) > 50
    for together, alone in zip(found["together"], found["alone"], strict=True):
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6 * np.abs(alone).max())
