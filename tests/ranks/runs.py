"""What the ranks of the tests run, and the configurations they run it with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from megavlm.config.schema import (
    Architecture,
    Config,
    Data,
    Fp8,
    Language,
    Optimizer,
    Parallel,
    Training,
    Vision,
)
from tests.data.samples import make_dataset

# Shapes unlike each other, so that a mix-up shows: grouped queries, a prime vocabulary that is
# padded, several layers of each kind.
TINY = Architecture(
    vision=Vision(
        image_size=16,
        patch_size=4,
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
    ),
    language=Language(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=199,
        rotary_base=1e4,
        max_position_embeddings=256,
    ),
)
# Several gradient buckets even in a tiny model, as large models have them.
SMALL_BUCKET = 5000
EVERYTHING = ("vision", "connector", "language")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What some steps tell: loss and gradient norm of each, and the weights after them.

    Args:
        losses, grad_norms: of each step.
        part_norms: by part, of the last step's gradient and of the trained parameters after it.
        shards: what this rank holds of each weight: checkpoint key, shape of the whole weight,
            where in it the shard is, and its values.
    """

    losses: list[float]
    grad_norms: list[float]
    part_norms: dict[str, dict[str, float]]
    shards: list[tuple[str, tuple[int, ...], tuple[slice, ...], np.ndarray]]


def whole_weights(curves: list[Curve]) -> dict[str, np.ndarray]:
    """Merge the weights of all ranks after the last step; ranks that hold the same weights must
    agree.
    """
    weights: dict[str, np.ndarray] = {}
    for key, shape, place, values in (shard for curve in curves for shard in curve.shards):
        held = weights.setdefault(key, np.full(shape, np.nan, np.float32))[place]
        assert np.isnan(held).all() or np.array_equal(held, values), f"ranks differ in {key}"
        held[...] = values
    assert not any(np.isnan(weight).any() for weight in weights.values())
    return weights


def assert_same_part_norms(curves: list[Curve], expected: Curve) -> None:
    """Compare the norms by part of every rank with those of one process, which make up the whole
    norm.
    """
    by_part = expected.part_norms["grad_norm"]
    assert math.hypot(*by_part.values()) == pytest.approx(expected.grad_norms[-1], rel=1e-5)
    for curve in curves:
        assert curve.part_norms.keys() == expected.part_norms.keys()
        for name, norms in expected.part_norms.items():
            assert curve.part_norms[name] == pytest.approx(norms, rel=1e-5), name


def make_packs(folder: Path, **settings: Any) -> None:
    """Write packs for the tiny model: 128 tokens, four samples a pack.

    Args:
        folder: of the dataset.
        settings: arguments of ``make_dataset`` that are to be others.
    """
    usual = dict(
        vocab_size=199,
        context_token_id=7,
        tile_size=16,
        features_per_tile=TINY.features_per_tile,
        capacity=128,
        samples_per_pack=4,
    )
    make_dataset(folder, **usual | settings)


def config_for(dataset: Path, *, fp8: Fp8 | None = None, **settings: Any) -> Config:
    """Return a run of the tiny model.

    Args:
        dataset: folder of the packs.
        fp8: recipes, in an argument of their own because ``Parallel`` also has a field ``vision``.
        settings: fields of ``Parallel``, ``Training`` and ``Optimizer``.

    Raises:
        ValueError: a setting has a value that its field does not take.
    """

    def take(kind: type, **defaults: Any) -> Any:
        hints = get_type_hints(kind)
        values = {name: settings.pop(name) for name in list(settings) if name in hints}
        for name, value in values.items():
            if get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
                raise ValueError(f"{kind.__name__}.{name}: {value!r} is none of {hints[name]}")
        return kind(**defaults | values)

    # Without overlap all gradients are summed in one go.
    bucket_size = SMALL_BUCKET if settings.get("overlap_grad_reduce", True) else 0
    config = Config(
        stage="2",
        model="tiny",
        architecture=TINY,
        data=Data(train=str(dataset), workers=0),
        parallel=take(Parallel, bucket_size=bucket_size),
        training=take(
            Training,
            precision="float32",
            global_batch_size=4,
            steps=10,
            trainable=EVERYTHING,
            seed=3,
        ),
        optimizer=take(Optimizer, lr=3e-3, warmup_ratio=0.1, clip_grad=0.5),
        fp8=fp8 or Fp8(),
    )
    assert not settings, f"unknown settings {settings}"
    return config


def build(config: Config):
    """Build a job from fresh weights."""
    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.data.loading.order import Plan
    from megavlm.model import weights
    from megavlm.parallel import backend, process_groups
    from megavlm.planner.layout import make_layout
    from megavlm.planner.partition import PackSize
    from megavlm.train.build_model import build_model
    from megavlm.train.job import Job

    device_backend = backend.start(
        config.parallel.timeout_minutes, deterministic=config.training.deterministic
    )
    packs = PackedDataset(config.data.train, reference=config.reference)
    layout = make_layout(config, PackSize.mean(packs.some_records()))
    groups = process_groups.create(config.parallel, config.training.seed, layout.embedding_chunk)
    built = build_model(
        config,
        layout,
        groups,
        device_backend,
        lambda chunks: weights.fill(chunks, weights.fresh_tensor(config)),
    )
    return Job(
        **vars(built),
        config=config,
        backend=device_backend,
        groups=groups,
        train=packs,
        plan=Plan(num_packs=len(packs), seed=config.training.seed),
        valid=None,
    )


def train_curve(config: Config, pack_ids: tuple[int, ...] = ()) -> Curve:
    """Loss and gradient norm of every step, on every rank; ``pack_ids`` replaces the order of the
    packs by this one, again and again.
    """
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.optimizer import set_rates
    from megavlm.train.step import train_step

    job = build(config)
    size = config.training.global_batch_size
    rank = job.groups.data_rank
    world = job.groups.data_size
    steps = config.training.steps
    order = np.resize(pack_ids, size * steps) if pack_ids else job.plan.pack_ids(0, size * steps)
    losses = []
    norms = []
    for step in range(steps):
        ids = order[step * size : (step + 1) * size]
        positions = range(step * size + rank, (step + 1) * size, world)
        options = job.training_options
        arriving = iter([job.train.batch(int(order[p]), p, options) for p in positions])
        set_rates(job.optimizer, config, step)
        weight = job.train.weight_sum(ids, config.data.loss_reduction)
        samples = job.samples_of_ranks(job.train.index[ids])
        result = train_step(
            job,
            Microbatches(arriving, size // world, weight, samples=samples),
            config.optimizer.clip_grad,
            job.backend,
        )
        losses.append(_from_last_chunk(float(job.groups.sum_over_data(result.loss)), job))
        norms.append(float(result.grad_norm))
    by_part = job.part_norms.report(job.groups, 1)
    return Curve(losses=losses, grad_norms=norms, part_norms=by_part, shards=_shards(job))


def _shards(job) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], np.ndarray]]:
    from megavlm.model import weights
    from megavlm.train.optimizer import whole_weights as collected

    with collected(job.ddp_chunks):
        shards = [shard for chunk in job.chunks for shard in weights._shards(chunk)]
        return [
            (
                shard.key,
                tuple(shard.global_shape),
                shard.global_slice(),
                shard.data.detach().cpu().float().numpy(),
            )
            for shard in shards
        ]


def _from_last_chunk(value: float, job) -> float:
    import torch
    import torch.distributed as dist

    answer = torch.tensor(
        [value if job.groups.is_writer else 0.0], dtype=torch.float64, device=job.backend.device
    )
    dist.all_reduce(answer)
    return float(answer)
