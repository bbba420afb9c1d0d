"""The benchmark from end to end, with a model of a few weights on a CPU."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.models import architecture
from megavlm.data.loading.dataset import PackedDataset
from megavlm.planner.flops import pieces, training_cost
from tools.benchmark import gpu, runner
from tools.benchmark.cases import Case, all_cases, smoke_cases
from tools.benchmark.packs import SMOKE, fullest, make_packs, photographs
from tools.benchmark.peer import IGNORED, build, normalise, packed, padded, samples

SETTINGS = runner.Settings(packs=2, workers=0, steps_s=1, peak_tflops=989)
TINY = next(case for case in smoke_cases() if case.name == "tiny-stage2-bf16-megavlm")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return make_packs(tmp_path_factory.mktemp("benchmark"), architecture("tiny"), SMOKE)


@pytest.fixture
def folders(packs: PackedDataset) -> dict[str, Path]:
    return {TINY.packs: Path(packs.folder)}


@pytest.mark.slow
def test_a_case_runs_through_the_trainer_and_its_figures_fit_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "deep" / "rows.json"
    native = "tiny_native-stage2-bf16-megavlm-recompute_selective"
    names = f"tiny-stage2-bf16-megavlm,tiny-stage1-bf16-transformers,{native}"
    small = ["--capacity", "448", "--tile_cap", "8"]
    short = ["--steps_s", "1", "--workers", "1"]
    assert gpu.main(["--smoke", "--cases", names, "--json", str(out), *short, *small]) == 0
    ours, native, theirs = json.loads(out.read_text())
    assert (ours["implementation"], theirs["implementation"]) == ("megavlm", "transformers")
    for row in (ours, theirs, native):
        assert (
            row["error"] == ""
            and row["peak_memory_gib"] > 0
            and row["steps"] >= 3
            and row["versions"]["torch"]
            and row["date"]
        )
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", row["commit"])
        assert row["command"].startswith("python ")
        assert row["tokens_per_step"] <= 448
        assert row["step_ms_least"] <= row["step_ms"] <= row["step_ms_most"]
        assert row["mfu"] == pytest.approx(row["tflops"] / 989, abs=1e-4)
        assert row["loss_first"] == pytest.approx(np.log(512), rel=0.25), (
            "random weights know nothing of 512 words"
        )
    assert max(ours["tiles_per_step"], theirs["tiles_per_step"]) <= 8 < native["tiles_per_step"]
    seconds = ours["tokens_per_step"] * ours["steps"] / ours["tokens_per_s"]
    assert ours["tflops"] == pytest.approx(
        sum(ours["tflop_per_step"].values()) * ours["steps"] / seconds, rel=0.2
    ), "both are rounded"
    assert ours["tflop_per_step"]["vision"] > theirs["tflop_per_step"]["vision"], "frozen there"
    assert set(ours["kernels"]["groups_ms"]) >= {"matrix products", "attention", "idle"}
    printed = capsys.readouterr().out
    assert "| tiny-stage2-bf16-megavlm" in printed and "matrix products" in printed


@pytest.mark.slow
def test_a_case_that_fails_is_a_row_with_its_error(folders: dict[str, Path], tmp_path: Path):
    eight_bits = next(
        case for case in smoke_cases() if case.name == "tiny-stage2-fp8_tensorwise-megavlm"
    )
    cases = [eight_bits, dataclasses.replace(TINY, limit_s=1)]
    [refused, late] = runner.run_all(cases, folders, tmp_path, SETTINGS, time.monotonic() + 300)
    assert late["error"].startswith("not done after 1 s") and late["tokens_per_s"] is None
    if not torch.cuda.is_available():
        assert "ConfigError" in refused["error"] and "--fp8.vision tensorwise" in refused["error"]
        assert any("Traceback" in line for line in refused["log"])


@pytest.mark.slow
def test_a_process_without_its_packs_tells_what_is_missing(tmp_path: Path):
    nowhere = {TINY.packs: tmp_path / "nowhere"}
    [row] = runner.run_all([TINY], nowhere, tmp_path, SETTINGS, time.monotonic() + 300)
    assert "FileNotFoundError" in row["error"] and "nowhere" in row["error"]


def test_cases_that_are_not_reached_say_so(folders: dict[str, Path], tmp_path: Path):
    rows = list(runner.run_all(smoke_cases()[:3], folders, tmp_path, SETTINGS, time.monotonic()))
    assert [row["error"][:7] for row in rows] == ["not run"] * 3
    assert {
        "name",
        "model",
        "stage",
        "precision",
        "implementation",
        "tokens_per_s",
        "step_ms",
        "tflops",
        "mfu",
        "peak_memory_gib",
    } <= set(rows[0])


def test_the_packs_are_full_and_hold_images(packs: PackedDataset):
    rows = packs.index[fullest(packs, SMOKE.packs)]
    assert (
        len(rows) == 2
        and (rows["tokens"] > 0.85 * SMOKE.capacity).all()
        and (rows["tiles"] > 3).all()
        and (rows["samples"] > 1).all()
    )


def test_without_scikit_learn_pictures_are_drawn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    [first, second] = itertools.islice(photographs(np.random.default_rng(0), SMOKE), 2)
    assert np.asarray(first).std() > 10 and first.size != second.size


def test_transformers_computes_the_same_loss_for_samples_alone_padded_and_packed(
    packs: PackedDataset,
):
    case = Case(model="tiny", stage="2", precision="fp32", implementation="transformers")
    model = build(case, torch.float32, torch.device("cpu"), "sdpa", packs.manifest.context_token_id)
    batch = packs.batch(fullest(packs, 1)[0], 0)
    pixels = normalise(batch.tiles, case.architecture.vision, torch.float32)
    alone = list(samples(batch, pixels, packs.manifest.features_per_tile))
    assert len(alone) == packs.index[batch.pack_id]["samples"] > 1

    def total(inputs: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            return float(model(**inputs, use_cache=False).loss) * int(
                (inputs["labels"][:, 1:] != IGNORED).sum()
            )

    expected = sum(total(sample) for sample in alone)
    assert total(padded(alone, packs.manifest.pad_token_id)) == pytest.approx(expected, rel=1e-5)
    assert total(packed(batch, pixels)) == pytest.approx(expected, rel=1e-5)


def test_the_peer_trains_what_the_stage_trains(packs: PackedDataset):
    case = Case(model="tiny", stage="1", precision="fp32", implementation="transformers")
    model = build(case, torch.float32, torch.device("cpu"), "sdpa", packs.manifest.context_token_id)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("multi_modal_projector" in name for name in trained)
    everything = build(
        dataclasses.replace(case, stage="2"),
        torch.float32,
        torch.device("cpu"),
        "sdpa",
        packs.manifest.context_token_id,
    )
    assert all(parameter.requires_grad for parameter in everything.parameters())


@pytest.mark.parametrize(
    "model", sorted({case.model for case in all_cases() if case.recipe == "internvl"})
)
def test_the_peer_has_as_many_weights_as_the_trainer(model: str):
    case = Case(model=model, stage="2", implementation="transformers")
    peer = build(case, torch.bfloat16, torch.device("meta"), "sdpa", 5)
    assert sum(parameter.numel() for parameter in peer.parameters()) == sum(
        piece.elements for piece in pieces(case.architecture)
    )


def test_the_peer_is_the_model_whose_flops_are_counted(packs: PackedDataset):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    case = Case(model="tiny", stage="2", precision="fp32", implementation="transformers")
    model = build(case, torch.float32, torch.device("cpu"), "sdpa", packs.manifest.context_token_id)
    batch = packs.batch(fullest(packs, 1)[0], 0)
    pixels = normalise(batch.tiles, case.architecture.vision, torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for sample in samples(batch, pixels, packs.manifest.features_per_tile):
            model(**sample, use_cache=False).loss.backward()
    row = packs.index[batch.pack_id]
    # torch counts all pairs of tokens, the cost half of them.
    size = {
        "tokens": float(row["tokens"]),
        "squared_lengths": 2 * float(row["squared_lengths"]),
        "tiles": float(row["tiles"]),
    }
    assert counter.get_total_flops() == pytest.approx(
        training_cost(case.architecture, case.trainable).total(**size), rel=1e-6
    )
