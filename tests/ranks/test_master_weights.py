"""Master weights and moments in checkpoints with several gradient buckets, and planted faults."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megavlm.checkpoint import step_folder
from megavlm.config.cli import from_yaml
from megavlm.config.schema import Config
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, make_packs
from tests.ranks.test_resume import STEPS, forget_the_end, losses, make_job, run_job, saved_tensors

# Odd multiples of 64, so that buckets end at no multiple of 128.
WIDE = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(
        TINY.vision, hidden_size=64, ffn_hidden_size=192, num_attention_heads=2
    ),
    language=dataclasses.replace(
        TINY.language,
        hidden_size=192,
        ffn_hidden_size=320,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=32,
    ),
)
# Enough to learn something.
_FEW_STEPS = 2
_PARAM = "optimizer.state.param."


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=12, image_share=0.6, alignment=4)
    return folder


def wide_job(dataset: Path, save: Path, load: Path | str = "", **settings: Any) -> Config:
    """Configure a job of three packs a step, which one or three data-parallel ranks share."""
    config = make_job(dataset, save, load, **dict(global_batch_size=3) | settings)
    return dataclasses.replace(config, architecture=WIDE)


def different(tensors: dict[str, torch.Tensor]) -> list[str]:
    """List the weights of a checkpoint that differ from their rounded master weights."""
    pairs = {
        key.removeprefix(_PARAM): value for key, value in tensors.items() if key.startswith(_PARAM)
    }
    assert pairs
    return [
        key
        for key, value in pairs.items()
        if not torch.equal(value.to(tensors[key].dtype), tensors[key])
    ]


def share_of_estimate(save: Path) -> float:
    """Return the bytes of a run's last checkpoint over those that a run expects when it starts."""
    from megavlm.train.disk_room import checkpoint_bytes

    folder = save / f"step_{STEPS:08d}"
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return written / checkpoint_bytes(from_yaml(folder / "config.yaml"))


SIX_RANKS = {
    "DP6": dict(global_batch_size=6),
    "TP2 DP3": dict(tensor_model_parallel_size=2, vision="data"),
    "PP2 DP3": dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3"),
    "virtual 3, connector": dict(
        global_batch_size=6,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=3,
        layout="v|v|v|t|t|t",
        trainable=("connector",),
    ),
}
CASES = [
    (6, settings, precision)
    for settings in SIX_RANKS.values()
    for precision in ("float32", "bfloat16")
]
CASES += [(world, dict(), precision) for world in (1, 3) for precision in ("float32", "bfloat16")]
EVERYDAY = [(6, SIX_RANKS["PP2 DP3"], "bfloat16")]


@pytest.mark.parametrize(
    ("world", "settings", "precision"),
    CASES if asks_for_all() else EVERYDAY,
)
def test_a_run_with_several_buckets_resumes_bit_for_bit(
    ranks: Pool, dataset: Path, tmp_path: Path, world: int, settings: dict[str, Any], precision: str
) -> None:
    settings = settings | dict(precision=precision)
    ranks.run(run_job, world, wide_job(dataset, tmp_path / "whole", **settings))
    forget_the_end(tmp_path / "whole", tmp_path / "killed")
    ranks.run(run_job, world, wide_job(dataset, tmp_path / "killed", **settings))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")[3:]
    [whole] = ranks.run(saved_tensors, 1, tmp_path / "whole" / f"step_{STEPS:08d}")
    [killed] = ranks.run(saved_tensors, 1, tmp_path / "killed" / f"step_{STEPS:08d}")
    assert different(whole) == []
    assert share_of_estimate(tmp_path / "whole") == pytest.approx(1, abs=0.1)
    assert whole.keys() == killed.keys() and all(
        torch.equal(whole[key], killed[key]) for key in whole
    )


def test_a_checkpoint_of_three_data_parallel_ranks_goes_on_at_other_layouts(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    ranks.run(run_job, 3, wide_job(dataset, tmp_path / "whole"))
    assert share_of_estimate(tmp_path / "whole") == pytest.approx(1, abs=0.1)
    others = [(1, dict()), (6, SIX_RANKS["TP2 DP3"])]
    others += [(2, dict(context_parallel_size=2))] if asks_for_all() else []
    for number, (world, settings) in enumerate(others):
        save = tmp_path / f"other-{number}"
        forget_the_end(tmp_path / "whole", save)
        ranks.run(run_job, world, wide_job(dataset, save, **settings))
        assert losses(save) == pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-5)


def _error_of(config: Config) -> str:
    """Run a job and return the message of the error that it ends with."""
    from megavlm.train.master_weights import MismatchError
    from megavlm.train.saver import SaveError

    try:
        run_job(config)
    except (MismatchError, SaveError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_shifted(config: Config, *, checked: bool) -> str:
    """Run a job whose master weights are cut out of their buffers one value too early, as
    megatron-core's are behind a bucket with padding; compare nothing if not ``checked``.
    """
    from contextlib import ExitStack

    from megavlm.train import master_weights, optimizer_state

    gather = optimizer_state._gather

    def shifted(*args: Any) -> dict[int, dict[str, torch.Tensor]]:
        whole = gather(*args)
        for tensors in whole.values():
            tensors["param"] = tensors["param"].roll(1)
        return whole

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(optimizer_state, "_gather", shifted))
        if not checked:
            stack.enter_context(mock.patch.object(master_weights, "refuse"))
        return _error_of(config)


def run_with_one_value_changed(config: Config) -> str:
    """Run a job in which one master weight changes between its comparison and the file."""
    from megavlm.train import checkpoint

    sharded = checkpoint.sharded

    def changed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        tensors = sharded(*args, **kwargs)
        for entries in tensors["optimizer"]["param_state"].values():
            if entries["param"].key.endswith("connector.mlp.linear_fc1.bias"):
                entries["param"].data.view(-1)[-1] += 1.0
        return tensors

    with mock.patch.object(checkpoint, "sharded", changed):
        return _error_of(config)


TENSOR = dict(tensor_model_parallel_size=2)


HALF = dict(precision="bfloat16")
_SHORT = dict(steps=_FEW_STEPS, save_interval=_FEW_STEPS, global_batch_size=6)


@pytest.mark.parametrize(
    ("world", "settings"),
    [(2, TENSOR | HALF), *([(1, HALF), (2, TENSOR)] if asks_for_all() else [])],
)
def test_shifted_master_weights_are_refused_when_they_are_saved(
    ranks: Pool, dataset: Path, tmp_path: Path, world: int, settings: dict[str, Any]
) -> None:
    save = tmp_path / "run"
    answers = ranks.run(_shifted_and_checked, world, wide_job(dataset, save, **settings))
    for text in answers:
        assert text.startswith("SaveError") and f"of step {STEPS} could not be saved" in text
        assert (
            "tensors, rounded, are not the weights: " in text
            and "the last checkpoint is of step 0" in text
        )
    assert not list(save.glob("*step_*"))


def _shifted_and_checked(config: Config) -> str:
    return run_shifted(config, checked=True)


def _shifted_and_unchecked(config: Config) -> str:
    return run_shifted(config, checked=False)


def write_refused(
    ranks: Pool,
    dataset: Path,
    folder: Path,
    fault: Any,
    precision: str,
    loaded_at: list[tuple[int, dict[str, Any]]],
) -> Path:
    """Save a run with a fault on two ranks, and see its checkpoint refused at each of some layouts;
    return its save folder.
    """
    settings = dict(precision=precision) | _SHORT
    old = folder / "old"
    assert ranks.run(fault, 2, wide_job(dataset, old, **settings)) == ["", ""]
    [tensors] = ranks.run(saved_tensors, 1, old / f"step_{_FEW_STEPS:08d}")
    found = different(tensors)
    assert found and (
        fault is _shifted_and_unchecked or found == ["model.connector.mlp.linear_fc1.bias"]
    )
    for world, layout in loaded_at:
        job = wide_job(dataset, folder / "new", old, **settings | layout)
        for text in ranks.run(_error_of, world, job):
            assert text.startswith("MismatchError")
            assert f"{len(found)} tensors, rounded, are not the weights" in text
            assert (
                f"--checkpoint.load {old}/step_{_FEW_STEPS:08d} --checkpoint.weights_only true"
                in text
            )
    return old


def test_shifted_master_weights_are_refused_when_they_are_loaded_but_their_weights_are_not(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    fault = (_shifted_and_unchecked, "bfloat16", [(2, TENSOR), (3, dict())])
    old = write_refused(ranks, dataset, tmp_path, *fault)
    settings = dict(precision="bfloat16") | _SHORT
    fresh = wide_job(dataset, tmp_path / "fresh", old, weights_only=True, **settings)
    assert ranks.run(_error_of, 2, fresh) == ["", ""]
    assert losses(tmp_path / "fresh")[0] < losses(old)[0]
    # Its own checkpoint is resumed, with its moments.
    assert ranks.run(_error_of, 2, fresh) == ["", ""]


def test_one_master_weight_that_changed_is_refused_when_it_is_loaded(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    fault = (run_with_one_value_changed, "float32", [(1, dict())])
    write_refused(ranks, dataset, tmp_path, *fault)


def master_weights_after_loading(config: Config, folder: Path) -> dict[str, torch.Tensor]:
    """Resume from ``folder`` and return what the run would save again, by key."""
    from megavlm.train import checkpoint
    from tests.ranks.runs import build

    job = build(config)
    found = step_folder.read(folder)
    checkpoint.load_weights(found, job.chunks)
    checkpoint.load_optimizer(found, job.chunks, job.optimizer, config.fp8)
    tensors = checkpoint.sharded(job.chunks, job.optimizer, config.fp8, is_loading=False)[
        "optimizer"
    ]
    return {
        entries["param"].key: entries["param"].data for entries in tensors["param_state"].values()
    }


def test_precision_may_change_and_master_weights_stay(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    for written, resumed in (("bfloat16", "float32"), ("float32", "bfloat16")):
        ranks.run(
            run_job, 1, make_job(dataset, tmp_path / written, precision=written, save_interval=0)
        )
        folder = tmp_path / written / f"step_{STEPS:08d}"
        [tensors] = ranks.run(saved_tensors, 1, folder)
        [kept] = ranks.run(
            master_weights_after_loading,
            1,
            make_job(dataset, tmp_path / "x", precision=resumed),
            folder,
        )
        assert kept and all(
            torch.equal(value, tensors[key]) for key, value in kept.items() if key in tensors
        )
