"""What only some models have trains the same at every layout: tied heads, heads that do not divide,
fewer key-value heads than ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megavlm.config.schema import Architecture, Checkpoint, Config, Logging
from megavlm.data.loading.batch import BatchOptions
from tests.data.samples import make_dataset
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import EVERYTHING, TINY, build, config_for, train_curve
from tests.ranks.test_resume import run_job, saved_tensors

TIED = replace(TINY, language=replace(TINY.language, tied_head=True))
# Three vision heads and a norm over all of them, as InternViT-6B; Qwen3's norms, one key-value
# head, heads wider than hidden size / heads.
ODD = Architecture(
    vision=replace(
        TINY.vision,
        normalization="RMSNorm",
        qkv_bias=False,
        qk_norm=True,
        num_attention_heads=3,
        hidden_size=30,
    ),
    language=replace(
        TINY.language,
        family="qwen3",
        qkv_bias=False,
        qk_norm=True,
        num_query_groups=1,
        kv_channels=14,
    ),
)
FROZEN_TABLE = ("vision", "connector", "language.decoder")
INTERLEAVED = dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
# Pipelines whose token embedding stands in the first chunk, in one in the middle, or with the head.
TIED_LAYOUTS = {
    "pp2": (2, dict(pipeline_model_parallel_size=2, layout="v*3,t|t*2")),
    "pp2, with the head": (2, dict(pipeline_model_parallel_size=2, layout="v*3|t*3")),
    "pp3, in the middle": (3, dict(pipeline_model_parallel_size=3, layout="v*2|v,t|t*2")),
    "pp2 dp2": (4, dict(pipeline_model_parallel_size=2, layout="v*3,t|t*2")),
    "pp2 cp2": (
        4,
        dict(pipeline_model_parallel_size=2, layout="v*3,t|t*2", context_parallel_size=2),
    ),
    "tp2 pp2": (
        4,
        dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, layout="v*3,t*2|t"),
    ),
    "pp2 vp2, on the head's rank": (2, INTERLEAVED | dict(layout="v*2|v,t|t|t")),
    "pp2 vp2 dp2, on the head's rank": (4, INTERLEAVED | dict(layout="v*2|v,t|t|t")),
    "pp2 vp2, on another rank": (2, INTERLEAVED | dict(layout="v*2|v|t*2|t")),
}
# The table in each of the places, under every kind of parallelism.
USUAL_TIED = (
    "pp2, with the head",
    "pp2 cp2",
    "pp3, in the middle",
    "tp2 pp2",
    "pp2 vp2 dp2, on the head's rank",
    "pp2 vp2, on another rank",
)
WITH_FROZEN_TABLE = ("pp2", "pp3, in the middle", "tp2 pp2", "pp2 vp2 dp2, on the head's rank")
ODD_LAYOUTS = {
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "tp4 sp": (4, dict(tensor_model_parallel_size=4, sequence_parallel=True)),
    "tp2 cp2, whole vision layers": (
        4,
        dict(tensor_model_parallel_size=2, context_parallel_size=2, vision="data"),
    ),
    "tp2 pp2": (
        4,
        dict(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            layout="v*2|v,t*3",
            recompute="full",
        ),
    ),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    sizes = dict(
        vocab_size=TINY.language.vocab_size,
        context_token_id=7,
        tile_size=16,
        features_per_tile=TINY.features_per_tile,
    )
    make_dataset(
        folder, packs=8, samples_per_pack=4, image_share=0.6, capacity=128, alignment=4, **sizes
    )
    return folder


def _config(dataset: Path, architecture: Architecture, **settings) -> Config:
    return dataclasses.replace(config_for(dataset, steps=3, **settings), architecture=architecture)


def _odd(dataset: Path, **settings) -> Config:
    return _config(dataset, ODD, global_batch_size=2, **settings)


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        pytest.param(EVERYTHING, TIED_LAYOUTS if asks_for_all() else USUAL_TIED, id="trained"),
        *([pytest.param(FROZEN_TABLE, WITH_FROZEN_TABLE, id="frozen")] if asks_for_all() else []),
    ],
)
def test_a_tied_head_trains_like_in_one_process(
    ranks: Pool, dataset: Path, mask: tuple[str, ...], names: Iterable[str]
) -> None:
    [alone] = ranks.run(train_curve, 1, _config(dataset, TIED, trainable=mask))
    for name in names:
        world, layout = TIED_LAYOUTS[name]
        curve = ranks.run(train_curve, world, _config(dataset, TIED, trainable=mask, **layout))[0]
        assert curve.losses == pytest.approx(alone.losses, rel=1e-5), name
        assert curve.grad_norms == pytest.approx(alone.grad_norms, rel=1e-5), name


def test_odd_heads_and_shared_keys_train_like_in_one_process(ranks: Pool, dataset: Path) -> None:
    [alone] = ranks.run(train_curve, 1, _odd(dataset))
    for name, (world, layout) in ODD_LAYOUTS.items():
        if name == "tp2" and not asks_for_all():
            continue  # as tp2 pp2
        curve = ranks.run(train_curve, world, _odd(dataset, **layout))[0]
        assert curve.losses == pytest.approx(alone.losses, rel=1e-5), name
        assert curve.grad_norms == pytest.approx(alone.grad_norms, rel=1e-5), name


def padding_after_steps(config: Config) -> dict[str, torch.Tensor]:
    """Train some steps and return the rows and columns of padding heads, on the rank that holds
    them.
    """
    from megavlm.model.vision_attention import unpadded_shape
    from megavlm.model.weights import named_weights
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.optimizer import set_rates, whole_weights
    from megavlm.train.step import train_step

    job = build(config)
    found = {}
    for step in range(3):
        batches = iter(
            [job.train.batch(pack, 0, BatchOptions(vision_layers=3)) for pack in range(4)]
        )
        set_rates(job.optimizer, config, step + 1)
        train_step(job, Microbatches(batches, 4, 100.0), 1.0, job.backend)
    ranks = config.parallel.tensor_model_parallel_size
    with whole_weights(job.ddp_chunks):
        weights = {
            key: weight.detach().clone() for key, weight in named_weights(job.chunks[0]).items()
        }
    for key, weight in weights.items():
        if key.startswith("vision.") and "layer_norm" not in key:
            axis = weight.ndim - 1 if "linear_proj.weight" in key else 0
            whole = (*weight.shape[:axis], weight.shape[axis] * ranks, *weight.shape[axis + 1 :])
            real = unpadded_shape(config.architecture.vision, key, whole)[axis]
            if real < whole[axis]:
                found[key] = weight.narrow(
                    axis, real - (ranks - 1) * weight.shape[axis], whole[axis] - real
                )
    return found if job.groups.tensor_rank == ranks - 1 else {}


def test_heads_that_only_pad_stay_zero(ranks: Pool, dataset: Path) -> None:
    *_, padding = ranks.run(padding_after_steps, 2, _odd(dataset, tensor_model_parallel_size=2))
    assert len(padding) == ODD.vision.num_layers * 4, (
        "fused projection, its successor, and both norms"
    )
    assert {
        key: float(tensor.abs().max())
        for key, tensor in padding.items()
        if tensor.any() or not tensor.numel()
    } == {}


def _job(dataset: Path, save: Path, load: Path | str = "", **settings) -> Config:
    files = Checkpoint(save=str(save), load=str(load), save_interval=2, keep=0)
    return dataclasses.replace(
        _odd(dataset, **settings), checkpoint=files, logging=Logging(interval=1)
    )


def test_a_checkpoint_with_padded_heads_goes_on_at_other_layouts(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    """With tensors of all three lengths: 3 heads in one process, 4 on two or four ranks."""
    ranks.run(run_job, 2, _job(dataset, tmp_path / "two", tensor_model_parallel_size=2))
    [expected] = ranks.run(saved_tensors, 1, tmp_path / "two" / "step_00000003")
    for world in (1, 4):
        save = tmp_path / str(world)
        ranks.run(run_job, world, _one_step(dataset, tmp_path / "two", save, world))
        [found] = ranks.run(saved_tensors, 1, save / "step_00000003")
        assert found.keys() == expected.keys() and any(
            "exp_avg" in key and "qk_norm" in key for key in found
        )
        for key, tensor in found.items():
            shared = tuple(
                slice(0, min(sizes))
                for sizes in zip(tensor.shape, expected[key].shape, strict=True)
            )
            torch.testing.assert_close(
                tensor[shared], expected[key][shared], rtol=1e-4, atol=1e-6, msg=key
            )


def _one_step(dataset: Path, source: Path, save: Path, world: int) -> Config:
    """Configure one more step, at another layout, from a copy of a run that stopped after step
    2.
    """
    import shutil

    save.mkdir()
    shutil.copytree(source / "step_00000002", save / "step_00000002")
    (save / "latest").write_text("step_00000002\n")
    return _job(dataset, save, tensor_model_parallel_size=world)
