"""A run that resumes with other options than its checkpoint's takes or refuses each of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megavlm.config.cli import from_yaml
from tests.ranks.pool import Pool
from tests.ranks.test_resume import LAST, first_moments, losses, make_job, run_job, saved_tensors
from tests.ranks.test_resume import dataset as dataset

HALF = "step_00000003"


@pytest.fixture(scope="module")
def begun(ranks: Pool, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interrupted(ranks, dataset, tmp_path_factory.mktemp("runs"))


def interrupted(ranks: Pool, dataset: Path, tmp_path: Path, **settings) -> Path:
    """Run until the checkpoint of step 3, and keep that one alone."""
    save = tmp_path / "begun"
    ranks.run(run_job, 1, make_job(dataset, save, **settings))
    shutil.rmtree(save / LAST)
    (save / "metrics.jsonl").unlink()
    (save / "latest").write_text(f"{HALF}\n")
    return save


def resumed(begun: Path, copy: Path) -> Path:
    return Path(shutil.copytree(begun, copy))


def test_other_betas_count_and_are_what_the_configuration_says(
    ranks: Pool, dataset: Path, begun: Path, tmp_path: Path
) -> None:
    for name, beta in (("same", 0.9), ("other", 0.5)):
        save = resumed(begun, tmp_path / name)
        ranks.run(run_job, 1, make_job(dataset, save, save_interval=1, adam_beta1=beta))
    [before] = ranks.run(first_moments, 1, begun, 3)
    [same], [other] = (
        ranks.run(first_moments, 1, tmp_path / name, 4) for name in ("same", "other")
    )
    for key, moment in before.items():
        gradient = (same[key] - 0.9 * moment) / 0.1
        assert torch.allclose(other[key], 0.5 * moment + 0.5 * gradient, rtol=1e-3, atol=1e-6), key
    written = from_yaml(tmp_path / "other" / LAST / "config.yaml")
    assert written.optimizer.adam_beta1 == 0.5


def test_a_bfloat16_checkpoint_keeps_its_master_weights_in_float32(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    begun = interrupted(ranks, dataset, tmp_path, precision="bfloat16")
    still = dict(precision="float32", lr=1e-30, weight_decay=0.0, save_interval=1)
    later = dict(overlap_param_gather=False)
    for name, world, other in (("one", 1, {}), ("two", 2, {}), ("three", 2, later)):
        ranks.run(
            run_job, world, make_job(dataset, resumed(begun, tmp_path / name), **still, **other)
        )
    # Weights of 16 bits in the first forward pass on the parts that the other rank owns would show.
    first, *others = (losses(tmp_path / name)[0] for name in ("one", "two", "three"))
    assert others == pytest.approx([first] * 2, rel=1e-5)
    start = "optimizer.state.param."
    [before], *after = (
        ranks.run(saved_tensors, 1, folder)
        for folder in (begun / HALF, tmp_path / "one/step_00000004", tmp_path / "two/step_00000004")
    )
    masters = {key: value for key, value in before.items() if key.startswith(start)}
    assert masters
    for [tensors] in after:
        for key, value in masters.items():
            assert torch.equal(tensors[key], value), key
            weight = tensors[key.removeprefix(start)]
            assert torch.equal(weight.flatten(), value.flatten()[: weight.numel()]), key


def test_what_changed_is_a_table_at_the_start(
    ranks: Pool, dataset: Path, begun: Path, tmp_path: Path
) -> None:
    save = resumed(begun, tmp_path / "run")
    [shown] = ranks.run(output_of_job, 1, make_job(dataset, save, lr=1e-3))
    assert "changed since the checkpoint:" in shown
    assert "--optimizer.lr  0.003       0.001" in shown
    [shown] = ranks.run(output_of_job, 1, make_job(dataset, save, lr=1e-3))
    assert "changed since" not in shown


def output_of_job(config) -> str:
    """Run a whole job and return what it prints."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as shown:
        run_job(config)
    return shown.getvalue()


def test_another_decay_is_taken_and_told(
    ranks: Pool, dataset: Path, begun: Path, tmp_path: Path
) -> None:
    for name, decay in (("same", "all"), ("other", "matrices")):
        config = make_job(dataset, resumed(begun, tmp_path / name), decay=decay, weight_decay=0.5)
        [text] = ranks.run(output_of_job, 1, config)
        changed = "--optimizer.decay         all" in text and "moments follow" in text
        assert changed == (name == "other"), text
    same = losses(tmp_path / "same")
    other = losses(tmp_path / "other")
    # What decays counts from the first update after the resume, and so in the second loss.
    assert same[0] == other[0] and same[1:] != other[1:]
