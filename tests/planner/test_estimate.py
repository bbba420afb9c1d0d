"""What a layout needs and takes, as estimated."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from megavlm.config.checks.rules import layout_problems
from megavlm.config.cli import parse
from megavlm.config.schema import Config, Fp8, Parallel
from megavlm.planner import search
from megavlm.planner.activations import activation_memory
from megavlm.planner.estimate import Estimate, Hardware, Packs, estimate
from megavlm.planner.flops import pieces
from megavlm.planner.layout import make_layout
from megavlm.planner.memory import Memory, memory
from megavlm.planner.partition import PackSize
from megavlm.planner.rank_load import RankLoad
from megavlm.planner.report import to_text
from tests.convert.models import make_hf
from tools.plan_parallel import main
from tools.planning.layouts import alignment_note

SIZE = PackSize(tokens=16384, squared_lengths=3e7, tiles=50)
CAPACITY = 16384
PACKS = Packs(size=SIZE, capacity=CAPACITY)


def run(stage: str = "2", **parallel) -> Config:
    config = parse(["--stage", stage, "--model", "internvl2_5-2b"])
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **parallel))


def needed(config: Config, data_ranks: int = 8) -> Memory:
    return memory(
        config, make_layout(config, SIZE), data_ranks, capacity=CAPACITY, tiles=SIZE.tiles
    )


def test_weights_and_their_optimizer_take_what_the_numbers_say() -> None:
    found = needed(run())
    elements = 2.205e9
    assert found.weights == pytest.approx(2 * elements, rel=0.01)
    assert found.gradients == pytest.approx(4 * elements, rel=0.01)
    assert found.optimizer == pytest.approx(12 * elements / 8, rel=0.01)


def test_frozen_parts_need_weights_only() -> None:
    connector = needed(run(stage="1"))
    everything = needed(run(stage="2"))
    assert connector.weights == everything.weights
    assert connector.gradients < 0.01 * everything.gradients
    assert connector.activations < 0.6 * everything.activations, "the vision encoder keeps nothing"


def test_frozen_layers_keep_less_and_those_before_all_that_is_trained_nothing() -> None:
    arch = run().architecture
    load = RankLoad(tokens=1000.0, tiles=0.0)
    behind = make_layout(run(pipeline_model_parallel_size=4), SIZE).chunks[-1]
    both = (activation_memory(run(stage=stage), behind, load) for stage in ("1", "2"))
    frozen, trained = (one.per_microbatch for one in both)
    assert 0.3 * trained < frozen < 0.8 * trained
    first = make_layout(run(stage="1", pipeline_model_parallel_size=4), SIZE).chunks[0]
    assert not first.language_layers
    sent = 2 * 7 * arch.vision.tokens * arch.vision.hidden_size
    kept = activation_memory(run(stage="1"), first, RankLoad(tokens=1000.0, tiles=7.0))
    assert kept.per_microbatch == sent, "only what it sends on"


def test_recomputation_saves_activations() -> None:
    none, selective, full = (
        needed(run(recompute=name)).activations for name in ("none", "selective", "full")
    )
    assert full < selective < none and selective < 0.6 * none
    of_vision, of_language = (
        needed(run(recompute="full", recompute_parts=(part,))).activations
        for part in ("vision", "language")
    )
    assert full < of_language < none and full < of_vision < none


def test_ranks_that_share_a_layer_share_its_memory() -> None:
    alone = needed(run())
    two = needed(run(tensor_model_parallel_size=2, sequence_parallel=True))
    assert two.weights == pytest.approx(alone.weights / 2, rel=0.01), (
        "norms are whole on every rank"
    )
    assert alone.activations / 2 < two.activations < 0.8 * alone.activations, (
        "norms of the vision encoder are whole on every rank"
    )


def test_early_chunks_keep_more_packs_under_way() -> None:
    config = run(pipeline_model_parallel_size=4)
    deep = needed(config)
    shallow = needed(
        dataclasses.replace(
            config, training=dataclasses.replace(config.training, global_batch_size=8)
        )
    )
    assert deep.activations > shallow.activations


@pytest.fixture(scope="module")
def found() -> list[Estimate]:
    return search.find_layouts(run(), 64, PACKS, Hardware(memory_gib=80))


def test_every_layout_can_run_and_fits(found: list[Estimate]) -> None:
    assert len(found) > 10 and [one.step_ms for one in found] == sorted(
        one.step_ms for one in found
    )
    config = run()
    for one in found:
        assert one.memory_gib <= 72
        assert not layout_problems(dataclasses.replace(config, parallel=one.parallel), 64)


def test_where_nothing_fits_the_least_memory_that_would_is_told() -> None:
    with pytest.raises(
        ValueError, match=r"--memory_gib 1: .* would do; else try more --gpus"
    ) as told:
        search.find_layouts(run(), 8, PACKS, Hardware(memory_gib=1))
    enough = int(re.search(r"--memory_gib (\d+) would do", str(told.value))[1])
    assert search.find_layouts(run(), 8, PACKS, Hardware(memory_gib=enough))
    with pytest.raises(ValueError, match="--memory_gib"):
        search.find_layouts(run(), 8, PACKS, Hardware(memory_gib=enough - 1))


def test_where_nothing_can_run_the_flag_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"--gpus 97: --training.global_batch_size 512 is not a multiple"
    ):
        search.find_layouts(run(), 97, PACKS, Hardware())


def test_layouts_of_every_kind_are_looked_at(found: list[Estimate]) -> None:
    seen = {field: {vars(one.parallel)[field] for one in found} for field in vars(Parallel())}
    for field in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
    ):
        assert {1, 2, 4, 8} <= seen[field], field
    assert {1, 2, 4} <= seen["virtual_pipeline_model_parallel_size"]
    assert seen["vision"] == {"tensor", "data"} and seen["recompute"] == {
        "none",
        "selective",
        "full",
    }


def test_of_layouts_that_differ_in_recomputation_the_fastest_is_shown(
    found: list[Estimate],
) -> None:
    shown = search.without_recompute_variants(found)
    assert shown[0] is found[0] and len(shown) < len(found)
    kept = {dataclasses.replace(one.parallel, recompute="none", layout="") for one in found}
    assert len(shown) == len(kept)


def test_the_flags_of_a_layout_ask_for_it(found: list[Estimate]) -> None:
    for one in found[:: len(found) // 5]:
        asked = parse(
            ["--stage", "2", "--model", "internvl2_5-2b", *shlex.split(search.to_flags(one))]
        ).parallel
        assert asked == dataclasses.replace(one.parallel, layout=asked.layout)
        assert asked.layout in ("auto", one.parallel.layout)


def test_options_are_told_by_what_they_change() -> None:
    chosen = estimate(
        run(tensor_model_parallel_size=2, sequence_parallel=True), 64, PACKS, Hardware()
    )
    found = search.estimate_changes(run(), chosen, 64, PACKS, Hardware())
    none = found["--parallel.recompute none"]
    full = found["--parallel.recompute full"]
    assert (none.memory, none.step_ms) == (chosen.memory, chosen.step_ms)
    assert full.memory.activations < none.memory.activations and full.step_ms > none.step_ms
    halves = [
        found[f"--parallel.recompute full --parallel.recompute_parts {part}"]
        for part in ("vision", "language")
    ]
    assert all(none.step_ms < half.step_ms < full.step_ms for half in halves)
    assert found["--parallel.overlap_grad_reduce false"].step_ms > none.step_ms
    assert found["--parallel.overlap_param_gather false"].step_ms > none.step_ms
    assert found["--parallel.sequence_parallel false"].memory.activations > none.memory.activations
    assert found["--parallel.vision data"].memory.weights > none.memory.weights
    assert found["--optimizer.moments bfloat16"].memory.optimizer == none.memory.optimizer * 8 / 12


def test_ranks_that_share_packs_share_activations_and_the_optimizer() -> None:
    alone = needed(run(), data_ranks=8)
    two = needed(run(context_parallel_size=2), data_ranks=8)
    assert (two.weights, two.gradients) == (alone.weights, alone.gradients)
    assert two.optimizer == alone.optimizer / 2
    assert two.activations == pytest.approx(alone.activations / 2, rel=0.03), (
        "an odd number of tiles leaves blank ones"
    )


def test_whole_vision_layers_cost_memory_and_spare_sums() -> None:
    both = dict(tensor_model_parallel_size=4, sequence_parallel=True)
    shared, whole = (
        estimate(run(**both, vision=vision), 64, PACKS, Hardware()) for vision in ("tensor", "data")
    )
    vision = sum(
        piece.elements
        for piece in pieces(run().architecture)
        if piece.part in ("vision", "connector")
    )
    assert whole.memory.weights - shared.memory.weights == pytest.approx(
        2 * vision * 3 / 4, rel=0.01
    )
    assert whole.memory.gradients - shared.memory.gradients == pytest.approx(
        4 * vision * 3 / 4, rel=0.01
    )
    assert whole.communication.tensor < shared.communication.tensor
    assert whole.step_ms < shared.step_ms


def test_chunks_that_take_turns_shorten_the_bubble_and_lengthen_the_traffic() -> None:
    plain, turns = (
        estimate(
            run(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=v),
            32,
            PACKS,
            Hardware(),
        )
        for v in (1, 2)
    )
    assert turns.bubble == plain.bubble / 2 and len(turns.chunk_ms) == 8
    assert plain.communication.pipeline < turns.communication.pipeline
    assert turns.memory.activations > plain.memory.activations


def test_context_parallelism_sends_keys_and_values() -> None:
    alone, two = (
        estimate(run(context_parallel_size=size), 64, PACKS, Hardware()) for size in (1, 2)
    )
    language = run().architecture.language
    packs = 512 // 32
    of_layers = (
        2 * 2 * language.num_query_groups * language.head_size * CAPACITY / 2 * language.num_layers
    )
    features = (
        2 * (SIZE.tiles + 1.5) * run().architecture.features_per_tile * language.hidden_size / 2
    )
    assert alone.communication.context == 0
    assert two.communication.context == pytest.approx(2 * packs * (of_layers + features))


def test_a_pipeline_waits_and_tensor_parallelism_talks() -> None:
    hardware = Hardware()
    pipeline = estimate(run(pipeline_model_parallel_size=4), 32, PACKS, hardware)
    tensor = estimate(
        run(tensor_model_parallel_size=4, sequence_parallel=True), 32, PACKS, hardware
    )
    assert pipeline.bubble == 3 / (512 // 8) and pipeline.communication.tensor == 0
    assert tensor.bubble == 0 and tensor.communication.tensor > 0
    assert pipeline.parallel.layout.count("|") == 3


def test_an_automatic_split_is_no_slower_than_an_even_one() -> None:
    for stage in ("1", "2"):
        automatic, even = (
            estimate(
                run(stage=stage, pipeline_model_parallel_size=4, layout=layout),
                32,
                PACKS,
                Hardware(),
            )
            for layout in ("auto", "even")
        )
        assert automatic.step_ms < even.step_ms


def test_a_table_has_a_line_for_each_layout(found: list[Estimate]) -> None:
    lines = to_text(found[:3]).splitlines()
    assert len(lines) == 4 and lines[0].split()[:3] == ["TP", "PP", "V"]
    assert f"{found[0].memory_gib:.1f}" in lines[1]


def test_the_tool_writes_json_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(
        "matplotlib",
        reason="the quickstart extra is not installed: pip install megavlm[quickstart]",
    )
    files = ["--json", str(tmp_path / "plan.json"), "--picture", str(tmp_path / "plan.png")]
    assert (
        main(["--model", "internvl2_5-1b", "--stage", "1", "--gpus", "16", "--top", "2", *files])
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "layouts fit into nine tenths of 80 GiB" in printed
        and "--parallel.recompute full" in printed
    )
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert rows[0]["step_ms"] <= rows[1]["step_ms"] and rows[0]["parallel"]["layout"]
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("size", "aligned", "message"),
    [(1, None, ""), (2, None, "--alignment 4"), (2, 8, ""), (4, 4, "have 4: pack them again")],
)
def test_the_tool_says_how_packs_are_aligned_for_context_parallelism(
    size: int, aligned: int | None, message: str
) -> None:
    note = alignment_note(run(context_parallel_size=size).parallel, aligned)
    assert (message in note) if message else not note


def test_the_tool_judges_a_layout_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["--model", "internvl2_5-1b", "--stage", "2", "--gpus", "8", "--layout"]
    assert main([*plan, "--parallel.context_parallel_size 2 --parallel.recompute full"]) == 0
    printed = capsys.readouterr().out
    assert "the layout fits into nine tenths of 80 GiB" in printed
    table = printed.split("\n\n")[1].splitlines()
    assert len(table) == 2 and table[1].split()[:6] == ["1", "1", "1", "2", "4", "full"]
    assert "tools/pack_dataset.py --alignment 4" in printed
    assert main([*plan, "--parallel.tensor_model_parallel_size 3"]) == 1
    assert "--parallel.tensor_model_parallel_size 3" in capsys.readouterr().err
    assert main([*plan[:4], "--gpus", "8", "--memory_gib", "3", "--layout", ""]) == 0
    assert "does NOT fit" in capsys.readouterr().out


def test_the_tool_takes_the_folder_of_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_hf(tmp_path / "model")
    assert main(["--model", str(folder), "--stage", "2", "--gpus", "2", "--top", "1"]) == 0
    assert str(folder) in capsys.readouterr().out


def test_the_tool_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--model", "internvl2_5-1b", "--stage", "1", "--gpus", "8", "--data", "nowhere"]) == 1
    )
    assert "nowhere" in capsys.readouterr().err


def test_logits_take_two_bytes_if_the_loss_is_computed_in_place() -> None:
    config = run()
    last = make_layout(config, SIZE).chunks[-1]
    load = RankLoad(tokens=1000.0, tiles=0.0)
    local = dataclasses.replace(
        config, training=dataclasses.replace(config.training, kernels="local")
    )
    logits = 1000 * config.architecture.language.vocab_size
    saved = activation_memory(local, last, load).once - activation_memory(config, last, load).once
    assert saved == 4 * logits


def test_short_moments_need_copies_inside_the_update() -> None:
    config = run()
    short = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, moments="bfloat16")
    )
    assert needed(config).update == 0
    assert needed(short).update == pytest.approx(8 * 2.205e9 / 8, rel=0.01)
    alone = needed(short, data_ranks=1)
    assert alone.update == 8 * 2**29, "of one slice"
    assert alone.total == alone.weights + alone.gradients + alone.optimizer + alone.activations, (
        "activations are gone by then, and were more"
    )


def test_fp8_copies_of_weights_count() -> None:
    config = run()
    fp8 = dataclasses.replace(config, fp8=Fp8(vision="tensorwise", language="tensorwise"))
    added = needed(fp8).weights - needed(config).weights
    assert 0.8 * 2 * 1.9e9 < added < 2 * 2.205e9, "of the layers, neither embedding nor head"


def test_supervised_tokens_alone_have_logits_and_pass_the_head() -> None:
    packs = dataclasses.replace(PACKS, size=dataclasses.replace(SIZE, supervised=4096.0))
    config = run()
    plain = dataclasses.replace(
        config, training=dataclasses.replace(config.training, head_tokens="all")
    )
    hardware = Hardware()
    few, all_tokens = (estimate(one, 8, packs, hardware) for one in (config, plain))
    rows = 16384 - 1.5 * 4096
    arch = config.architecture.language
    saved = rows * 2 * (arch.vocab_size + arch.hidden_size)
    assert all_tokens.memory.activations - few.memory.activations == pytest.approx(saved)
    head = 6 * arch.vocab_size * arch.hidden_size * (16384 - 4096)
    done = hardware.tflops * hardware.efficiency * 1e12
    assert all_tokens.chunk_ms[0] - few.chunk_ms[0] == pytest.approx(head / done * 1e3, rel=1e-6)
