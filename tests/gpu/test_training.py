"""Training on a GPU: FP8, moments in 16 bits, the same bits twice, nothing that the host waits for,
checkpoints.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megavlm.config.checks.device import device_problems
from megavlm.config.schema import Checkpoint, Config, Fp8, Logging
from megavlm.data.loading.batch import BatchOptions
from tests.convert.models import TOKENIZER, load_all, make_hf
from tests.gpu.models import SMALL, small

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def engine(dataset: Path, **settings) -> Config:
    """Configure a run on Transformer Engine's layers; skip the test if the GPU cannot run it."""
    from megavlm.model.precision import device_capabilities

    config = small(dataset, kernels="transformer_engine", **settings)
    lacking = device_problems(config, device_capabilities())
    if lacking:
        pytest.skip(lacking[0])
    return config


LONG = dict(steps=200, lr=5e-4)


@pytest.fixture(scope="module")
def long_curve(curve, dataset: Path) -> list[float]:
    """Train in bfloat16, once for all recipes: it takes a minute."""
    return curve(engine(dataset, **LONG))


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_trains_like_bfloat16(
    curve, dataset: Path, recipe: str, request: pytest.FixtureRequest
) -> None:
    config = engine(dataset, fp8=Fp8(vision=recipe, language=recipe), **LONG)
    exact = request.getfixturevalue("long_curve")
    eight = curve(config)
    assert eight != exact, "the recipe had no effect"
    # Three steps a pack: an average over the last epochs, in which no pack weighs more than
    # another.
    assert sum(eight[-30:]) == pytest.approx(sum(exact[-30:]), rel=5e-3)


@pytest.mark.parametrize("part", ["vision", "language"])
def test_8_bit_weights_follow_the_weights(job, dataset: Path, part: str) -> None:
    """Transformer Engine keeps the 8-bit copy of a weight over the packs of a step; the next step
    needs another.
    """
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.optimizer import set_rates
    from megavlm.train.step import train_step

    config = engine(dataset, lr=0.1, fp8=Fp8(**{part: "tensorwise"}))
    with job(config) as built:
        layer = (
            {
                "vision": built.chunks[0].vision.encoder,
                "language": built.chunks[0].language.decoder,
            }[part]
            .layers[0]
            .mlp.linear_fc2
        )
        copies = []
        for number in range(3):
            packs = [
                built.train.batch(pack, pack, BatchOptions(vision_layers=3, tile_multiple=16))
                for pack in range(2)
            ]
            set_rates(built.optimizer, config, number)
            train_step(
                built,
                Microbatches(iter(packs), 2, sum(pack.weight_sum for pack in packs)),
                1.0,
                built.backend,
            )
            copies.append(layer._fp8_workspaces["weight"].dequantize().clone())
        assert not torch.equal(copies[1], copies[2]), (
            "the first update has a rate of 0, the second changes the weights"
        )


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_recomputed_layers_train_the_same_in_8_bits(
    curve, dataset: Path, recipe: str, recompute: str
) -> None:
    kept = curve(engine(dataset, steps=6, fp8=Fp8(vision=recipe, language=recipe)))
    again = curve(
        engine(dataset, steps=6, fp8=Fp8(vision=recipe, language=recipe), recompute=recompute)
    )
    assert again == pytest.approx(kept, rel=5e-3)


def test_nothing_waits_for_a_backward_pass_that_does_not_come(
    dataset: Path, tmp_path: Path
) -> None:
    from transformer_engine.pytorch.distributed import activation_recompute_forward

    config = engine(
        dataset,
        steps=3,
        fp8=Fp8(vision="tensorwise", language="delayed"),
        recompute="selective",
        trainable=("connector", "language"),
    )
    data = dataclasses.replace(config.data, valid=str(dataset))
    training = dataclasses.replace(config.training, eval_interval=1)
    run(saving(dataclasses.replace(config, data=data, training=training), tmp_path / "run"))
    assert not activation_recompute_forward._is_first_fp8_module


def test_layers_that_stay_in_16_bits_change_the_result(curve, dataset: Path) -> None:
    all_eight = curve(engine(dataset, fp8=Fp8(language="tensorwise"), steps=3))
    some = curve(
        engine(
            dataset,
            fp8=Fp8(language="tensorwise", first_bf16_layers=1, last_bf16_layers=1),
            steps=3,
        )
    )
    assert all_eight != some


def test_moments_in_16_bits_train_like_those_in_32(curve, dataset: Path) -> None:
    exact = curve(engine(dataset, steps=50))
    short = curve(engine(dataset, steps=50, moments="bfloat16"))
    assert short != exact and short[-1] == pytest.approx(exact[-1], rel=2e-2)


def test_a_deterministic_run_gives_the_same_bits_twice(curve, dataset: Path) -> None:
    config = engine(dataset, steps=8, drop_path=0.2, deterministic=True)
    assert curve(config) == curve(config)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("recipe", ["none", "tensorwise"])
def test_the_host_waits_for_nothing_in_a_step(
    job, dataset: Path, recipe: str, recompute: str
) -> None:
    from megavlm.data.loading.loader import batches
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.optimizer import set_rates
    from megavlm.train.step import train_step

    config = engine(
        dataset, fp8=Fp8(vision=recipe, language=recipe), drop_path=0.2, recompute=recompute
    )
    with job(config) as built:
        size = config.training.global_batch_size
        clip = config.optimizer.clip_grad
        options = built.batch_options
        # The same packs again and again: the first steps compile kernels and plan attention, which
        # may wait.
        steps = [list(batches(built.train, built.plan, range(size), options)) for _ in range(4)]
        for number, packs in enumerate(steps):
            weight = sum(pack.weight_sum for pack in packs)
            set_rates(built.optimizer, config, number)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if number == len(steps) - 1 else "default")
            try:
                result = train_step(
                    built,
                    Microbatches(iter(packs), size, weight),
                    clip,
                    built.backend,
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(result.loss) and torch.isfinite(result.grad_norm)


def run(config: Config) -> None:
    """Run a whole job as ``pretrain_vlm.py`` does."""
    from megavlm.parallel import backend, process_groups
    from megavlm.train.inspection import inspect
    from megavlm.train.run_job import run_job
    from megavlm.train.stop_signal import StopRequest

    start = inspect(config, 1)
    try:
        device_backend = backend.start(5, deterministic=config.training.deterministic)
        run_job(config, device_backend, start, None, StopRequest())
    finally:
        process_groups.destroy()


def saving(config: Config, save: Path, load: Path | str = "", **checkpoint) -> Config:
    """Add checkpoints to a run."""
    files = Checkpoint(save=str(save), load=str(load), save_interval=3, keep=0, **checkpoint)
    return dataclasses.replace(config, checkpoint=files, logging=Logging(interval=1))


def losses(save: Path) -> dict[int, float]:
    """Read the loss of every step from the run's metrics."""
    import json

    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize(
    ("recipe", "moments"),
    [("none", "float32"), ("none", "bfloat16"), ("delayed", "float32"), ("tensorwise", "float32")],
)
def test_resuming_from_a_checkpoint_is_as_if_never_stopped(
    dataset: Path, tmp_path: Path, recipe: str, moments: str
) -> None:
    fp8 = Fp8(vision=recipe, language=recipe)
    config = engine(dataset, steps=6, fp8=fp8, moments=moments, deterministic=True)
    run(saving(config, tmp_path / "whole"))
    run(saving(config, tmp_path / "rest", load=tmp_path / "whole" / "step_00000003"))
    whole = losses(tmp_path / "whole")
    rest = losses(tmp_path / "rest")
    assert list(rest) == [4, 5, 6] and rest == {step: whole[step] for step in rest}


@pytest.mark.parametrize("language", ["Qwen2", "GPT-OSS"])
@pytest.mark.parametrize(
    ("first", "second"), [("transformer_engine", "local"), ("local", "transformer_engine")]
)
def test_a_checkpoint_of_one_kind_of_layers_goes_on_with_the_other(
    dataset: Path, tmp_path: Path, first: str, second: str, language: str
) -> None:
    engine(dataset)
    run(saving(small(dataset, language, steps=6, kernels=first), tmp_path / "whole"))
    run(
        saving(
            small(dataset, language, steps=6, kernels=second),
            tmp_path / "rest",
            load=tmp_path / "whole" / "step_00000003",
        )
    )
    whole = losses(tmp_path / "whole")
    rest = losses(tmp_path / "rest")
    assert list(rest) == [4, 5, 6]
    assert all(rest[step] == pytest.approx(whole[step], rel=1e-2) for step in rest)


def test_frozen_weights_come_back_from_hugging_face_and_return_bit_identical(
    dataset: Path, tmp_path: Path
) -> None:
    from megavlm.convert.hf import convert

    config = engine(dataset, steps=3, trainable=("connector",))
    source = make_hf(tmp_path / "hf", SMALL)
    run(saving(config, tmp_path / "run", load=source))
    convert.export(tmp_path / "run", tmp_path / "out", tokenizer=TOKENIZER)
    before = load_all(source)
    after = load_all(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)
