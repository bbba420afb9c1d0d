"""What a layout needs and takes, reckoned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megavlm.config.cli import parse
from megavlm.config.rules import layout_problems
from megavlm.config.schema import Config
from megavlm.parallel.chart import to_text
from megavlm.parallel.estimate import Estimate, Hardware, estimate, layouts
from megavlm.parallel.layout import make_layout
from megavlm.parallel.memory import Memory, memory
from megavlm.parallel.split import PackSize
from tools.plan_parallel import main

SIZE, CAPACITY = PackSize(tokens=16384, squared_lengths=3e7, tiles=50), 16384


def run(stage: str = "2", **parallel) -> Config:
    config = parse(["--stage", stage, "--model", "internvl2_5-2b"])
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **parallel))


def needed(config: Config, data_ranks: int = 8) -> Memory:
    return memory(config, make_layout(config, SIZE), data_ranks, capacity=CAPACITY, tiles=SIZE.tiles)


def test_weights_and_their_optimizer_take_what_the_numbers_say() -> None:
    found, numbers = needed(run()), 2.205e9
    assert found.weights == pytest.approx(2 * numbers, rel=0.01)
    assert found.gradients == pytest.approx(4 * numbers, rel=0.01)
    assert found.optimizer == pytest.approx(12 * numbers / 8, rel=0.01)


def test_frozen_parts_need_weights_only() -> None:
    projector, everything = needed(run(stage="1")), needed(run(stage="2"))
    assert projector.weights == everything.weights
    assert projector.gradients < 0.01 * everything.gradients
    assert projector.activations < 0.6 * everything.activations, "the vision encoder keeps nothing"


def test_recomputation_saves_activations() -> None:
    none, selective, full = (needed(run(recompute=name)).activations for name in ("none", "selective", "full"))
    assert full < selective < none and selective < 0.6 * none


def test_ranks_that_share_a_layer_share_its_memory() -> None:
    alone, two = needed(run()), needed(run(tensor_model_parallel_size=2, sequence_parallel=True))
    assert two.weights == pytest.approx(alone.weights / 2)
    assert alone.activations / 2 < two.activations < 0.8 * alone.activations, "norms of the vision encoder are whole on every rank"


def test_early_chunks_keep_more_packs_under_way() -> None:
    config = run(pipeline_model_parallel_size=4)
    deep = needed(config)
    shallow = needed(dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=8)))
    assert deep.activations > shallow.activations


def test_every_layout_can_run_and_fits() -> None:
    hardware = Hardware(memory_gib=80)
    found = layouts(run(), 64, SIZE, CAPACITY, hardware)
    assert len(found) > 10 and [one.step_ms for one in found] == sorted(one.step_ms for one in found)
    for one in found:
        assert one.memory_gib <= 72
        assert not layout_problems(dataclasses.replace(run(), parallel=one.parallel), 64)
    assert not layouts(run(), 64, SIZE, CAPACITY, Hardware(memory_gib=1))


def test_a_pipeline_waits_and_tensor_parallelism_talks() -> None:
    hardware = Hardware()
    pipeline = estimate(run(pipeline_model_parallel_size=4), 32, SIZE, CAPACITY, hardware)
    tensor = estimate(run(tensor_model_parallel_size=4, sequence_parallel=True), 32, SIZE, CAPACITY, hardware)
    assert pipeline.bubble == pytest.approx(3 / (512 // 8 + 3)) and pipeline.tensor_gb == 0
    assert tensor.bubble == 0 and tensor.tensor_gb > 0
    assert pipeline.parallel.layout.count("|") == 3


def test_an_automatic_split_is_no_slower_than_an_even_one() -> None:
    for stage in ("1", "2"):
        automatic, even = (
            estimate(run(stage=stage, pipeline_model_parallel_size=4, layout=layout), 32, SIZE, CAPACITY, Hardware())
            for layout in ("auto", "even")
        )
        assert automatic.step_ms < even.step_ms


def test_a_table_has_a_line_for_each_layout() -> None:
    found: list[Estimate] = layouts(run(), 8, SIZE, CAPACITY, Hardware())[:3]
    lines = to_text(found).splitlines()
    assert len(lines) == 4 and lines[0].split()[:3] == ["TP", "PP", "DP"]
    assert f"{found[0].memory_gib:.1f}" in lines[1]


def test_the_tool_writes_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the quickstart extra is not installed: pip install megavlm[quickstart]")
    files = ["--json", str(tmp_path / "plan.json"), "--picture", str(tmp_path / "plan.png")]
    assert main(["--model", "internvl2_5-1b", "--stage", "1", "--gpus", "16", "--top", "2", *files]) == 0
    assert "layouts fit into nine tenths of 80 GiB" in capsys.readouterr().out
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert rows[0]["step_ms"] <= rows[1]["step_ms"] and rows[0]["parallel"]["layout"]
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_the_tool_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "internvl2_5-1b", "--stage", "1", "--gpus", "8", "--data", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
