"""The table of cases, and where the time of a step goes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.recipes.internvl import STAGES
from tools.benchmark import gpu, report, runner
from tools.benchmark.cases import all_cases, chosen, predicted_gib, predicted_tflop, smoke_cases
from tools.benchmark.kernel_times import Kernel, group_of, table
from tools.benchmark.measure import steps_to_warm_up


@pytest.mark.parametrize("cases", [all_cases(), smoke_cases()])
def test_every_case_has_a_name_of_its_own(cases: list):
    assert len({case.name for case in cases}) == len(cases) > 20


def test_the_case_that_matters_most_is_measured_first():
    first = all_cases()[0]
    assert (first.name, first.trainable) == (
        "2b-stage2-bf16-megavlm",
        STAGES["2"].training.trainable,
    )


def test_the_table_covers_what_is_to_be_compared():
    cases = all_cases()
    ours = [case for case in cases if case.implementation == "megavlm"]
    sizes = {case.model.rpartition("-")[2] for case in ours if case.recipe == "internvl"}
    assert sizes == {"1b", "2b", "4b", "8b", "a3b"}
    assert {case.recipe for case in ours} == {"internvl", "qwen2_5_vl", "qwen3_vl"}
    assert {case.precision for case in ours} == {
        "bf16",
        "fp8_tensorwise",
        "fp8_blockwise",
        "fp8_delayed",
    }
    assert {case.recompute for case in ours} == {"none", "selective", "full"}
    assert {case.stage for case in ours} == set(STAGES) - {"0", "mpo"}
    peers = {case.implementation for case in cases} - {"megavlm"}
    assert peers >= {
        "transformers",
        "transformers_padded",
        "transformers_packed",
        "transformers_compiled",
        "transformers_packed_compiled",
    }


@pytest.mark.parametrize(
    "case",
    [case for case in all_cases() if case.implementation == "megavlm"],
    ids=lambda case: case.name,
)
def test_what_is_asked_of_the_trainer_should_fit_into_the_memory_of_an_h200(case):
    assert predicted_gib(case) < 130


def test_frozen_parts_are_expected_to_cost_less():
    by_name = {case.name: case for case in all_cases()}
    assert predicted_tflop(by_name["2b-stage1-bf16-megavlm"]) < 0.6 * predicted_tflop(
        by_name["2b-stage2-bf16-megavlm"]
    )
    assert predicted_gib(by_name["2b-stage1-bf16-megavlm"]) < 0.6 * predicted_gib(
        by_name["2b-stage2-bf16-megavlm"]
    )


def test_patterns_choose_cases():
    cases = all_cases()
    assert [case.name for case in chosen(cases, "2b-stage2-bf16-megavlm")] == [
        "2b-stage2-bf16-megavlm"
    ], "a whole name is that case alone"
    assert {case.model for case in chosen(cases, "4b-*, 8b-*")} == {
        "internvl2_5-4b",
        "internvl2_5-8b",
    }
    assert {case.precision for case in chosen(cases, "2b-*fp8_delayed*")} == {"fp8_delayed"}
    assert chosen(cases, "") == cases
    with pytest.raises(ValueError, match="--cases 70b"):
        chosen(cases, "70b")


def test_a_dry_run_lists_every_case_and_runs_none(capsys: pytest.CaptureFixture[str]):
    assert gpu.main(["--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in all_cases())
    assert gpu.main(["--dry_run", "--cases", "70b"]) == 2
    assert gpu.main(["--dry_run", "--tile_cap", "32"]) == 2


def test_on_an_h100_only_rows_that_fit_are_run_and_the_others_say_why(
    capsys: pytest.CaptureFixture[str],
):
    assert gpu.main(["--dry_run", "--memory_gib", "78"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    skipped = {line.split()[0] for line in lines if "not run: needs about" in line}
    ours = {case.name: case for case in all_cases() if case.implementation == "megavlm"}
    assert skipped == {name for name, case in ours.items() if predicted_gib(case) > 0.93 * 78}
    assert "2b-stage2-bf16-megavlm" in skipped
    first = [line.split()[0] for line in lines][:4]
    assert first == [
        "2b-stage2-bf16-megavlm-recompute_selective-bf16_moments",
        "2b-stage2-bf16-megavlm-recompute_full",
        "4b-stage2-bf16-megavlm-recompute_full-bf16_moments",
        "2b-stage2-fp8_tensorwise-megavlm-recompute_full",
    ]
    assert any(case.packs_per_step == 4 for name, case in ours.items() if name not in skipped)


def test_a_case_that_does_not_fit_is_a_row_that_says_so(tmp_path: Path):
    settings = runner.Settings(packs=1, workers=0, steps_s=1, peak_tflops=989, memory_gib=78)
    case = all_cases()[0]
    [row] = runner.run_all([case], tmp_path, tmp_path, settings, time.monotonic() + 60)
    assert row["error"].startswith("not run: needs about 10") and row["tokens_per_s"] is None


def test_warm_up_sees_every_padded_number_of_tiles():
    tiles = np.array([48, 47, 45, 46, 48, 47, 46, 42])
    assert steps_to_warm_up(tiles, 1) == 8, "the 42, padded to 44, comes last"
    assert steps_to_warm_up(tiles, 4) == 3 and steps_to_warm_up(tiles[:7], 1) == 3


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (
            "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
            "communication",
        ),
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x64x128_4x1x1_kernel0_0",
            "attention",
        ),
        (
            (
                "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128,"
                " 128, 64, 4>>"
            ),
            "attention",
        ),
        ("nvjet_tst_192x192_64x3_2x1_v_bz_coopB_TNN", "matrix products"),
        (
            "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_warpgroupsize1x1x1",
            "matrix products",
        ),
        (
            (
                "void transformer_engine::normalization::ln_bwd_tuned_kernel<"
                "transformer_engine::normalization::Kernel_traits>"
            ),
            "norm",
        ),
        (
            (
                "void transformer_engine::detail::cast_transpose_general_kernel<8ul, 8ul, float,"
                " __nv_bfloat16>"
            ),
            "8-bit conversion",
        ),
        (
            (
                "void multi_tensor_apply_kernel<TensorListMetadata<4>,"
                " AdamFunctorMaster<__nv_bfloat16>>"
            ),
            "optimizer",
        ),
        ("triton_red_fused__log_softmax_0", "loss"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        (
            (
                "void at::native::vectorized_elementwise_kernel<4,"
                " at::native::CUDAFunctor_add<c10::BFloat16>>"
            ),
            "elementwise",
        ),
        ("aten::addmm", "matrix products"),
        ("something_else", "other"),
    ],
)
def test_kernels_are_grouped_by_their_names(name: str, group: str):
    assert group_of(name) == group


def test_idle_time_is_when_no_kernel_runs():
    kernels = [
        _kernel("gemm", 0, 10),
        _kernel("nccl", 5, 20),
        _kernel("gemm", 30, 40),
        _kernel("gemm", 32, 34),
    ]
    found = table(kernels)
    assert found["span_ms"] == 0.04
    assert found["groups_ms"] == {"matrix products": 0.022, "communication": 0.015, "idle": 0.01}
    assert found["gaps"] == [{"us": 10, "behind": "nccl", "before": "gemm"}]
    assert found["longest"][0] == {
        "name": "gemm",
        "group": "matrix products",
        "ms": 0.022,
        "calls": 3,
    }


def measured() -> dict[str, float]:
    """Return the GiB that cases took on a GPU."""
    rows = json.loads(Path("docs/benchmarks/h200.json").read_text(encoding="utf-8"))
    return {
        row["name"]: row["peak_memory_gib"]
        for row in rows
        if row["implementation"] == "megavlm" and not row["error"]
    }


def test_the_planner_predicts_the_memory_that_a_gpu_needed() -> None:
    cases = {case.name: case for case in all_cases()}
    found = measured()
    assert len(found) >= 9 and any("fp8" in name for name in found)
    for name, gib in found.items():
        assert predicted_gib(cases[name]) == pytest.approx(gib, rel=0.05), name


def test_the_error_is_found_behind_the_names_of_ranks():
    log = [
        "[rank0]: Traceback (most recent call last):",
        "[rank0]: torch.OutOfMemoryError: CUDA out of memory.",
        "[rank0]:[W1127 15:06:42] Warning: destroy_process_group() was not called",
    ]
    assert runner._reason(log) == "torch.OutOfMemoryError: CUDA out of memory."


def test_nothing_profiled_gives_an_empty_table():
    assert report.kernels({"kernels": table([])}) == ""


def _kernel(name: str, start: float, end: float) -> Kernel:
    return Kernel(name=name, start=start, end=end, own=end - start)
