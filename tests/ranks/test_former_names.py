"""A checkpoint of format 1, which called the connector ``projector``, is resumed and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megavlm.checkpoint import checksums
from tests.ranks.pool import Pool
from tests.ranks.test_resume import LAST, forget_the_end, losses, make_job, run_job
from tests.ranks.test_resume import dataset as dataset

MASK = ("connector", "language.decoder.layers.[02].*")


def write_as_format_1(step: Path) -> None:
    """Change a checkpoint into what the first version wrote. Both names have nine letters, so the
    description of the shards keeps its lengths.
    """
    description = step / "shards" / ".metadata"
    content = description.read_bytes()
    assert content.count(b"model.connector.") >= 12, "weights, and three tensors of the optimizer"
    description.write_bytes(content.replace(b"model.connector.", b"model.projector."))
    config = step / "config.yaml"
    config.write_text(config.read_text().replace("- connector", "- projector"))
    state = json.loads((step / "state.json").read_text())
    (step / "state.json").write_text(json.dumps(state | {"format": 1}))
    (step / checksums.FILE_NAME).unlink()
    checksums.write(step, {})


def test_a_run_of_format_1_resumes_to_the_same_losses(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    ranks.run(run_job, 1, make_job(dataset, tmp_path / "whole", trainable=MASK))
    forget_the_end(tmp_path / "whole", tmp_path / "old")
    write_as_format_1(tmp_path / "old" / "step_00000003")
    layout = dict(tensor_model_parallel_size=2)
    ranks.run(run_job, 2, make_job(dataset, tmp_path / "old", trainable=MASK, **layout))
    assert losses(tmp_path / "old") == pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-5)
    state = json.loads((tmp_path / "old" / LAST / "state.json").read_text())
    assert state["format"] == 2


def test_the_next_stage_keeps_moments_of_format_1(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    ranks.run(run_job, 1, make_job(dataset, tmp_path / "one", stage="1", trainable=MASK))
    step = tmp_path / "one" / LAST
    following = dict(load=step, moments="keep", trainable=MASK)
    ranks.run(run_job, 1, make_job(dataset, tmp_path / "new", **following))
    write_as_format_1(step)
    ranks.run(run_job, 1, make_job(dataset, tmp_path / "old", **following))
    assert losses(tmp_path / "old") == losses(tmp_path / "new")


def test_weights_of_format_1_have_todays_names(ranks: Pool, dataset: Path, tmp_path: Path) -> None:
    from megavlm.convert.dist_checkpoint import ShardsFolder

    ranks.run(run_job, 1, make_job(dataset, tmp_path / "run", trainable=MASK))
    step = tmp_path / "run" / LAST
    key = "connector.mlp.linear_fc1.weight"
    weight = ShardsFolder(step / "shards")[key]
    write_as_format_1(step)
    old = ShardsFolder(step / "shards")
    assert (old[key] == weight).all() and old.ranges(key, range(2))
    assert not any("projector" in name for name in old.headers)
