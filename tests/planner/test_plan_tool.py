"""What ``tools/plan_parallel.py`` asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.plan_parallel import main
from tools.planning.options import make_parser

_RUN = ["--model", "internvl2_5-2b", "--stage", "2", "--gpus", "8"]
_NUMBERS = {
    action.option_strings[0]: action.type
    for action in make_parser("")._actions
    if action.type in (int, float)
}


@pytest.mark.parametrize("recipe", ["llava", "clip"])
def test_a_recipe_with_a_model_of_its_own_needs_no_model(
    recipe: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["--recipe", recipe, "--stage", "1", "--gpus", "8", "--top", "1"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{recipe}, stage 1, 8 GPUs,")
    # Of small models, which fit on each GPU, the first layout is that of a run without options.
    assert told.rstrip().splitlines()[-1].startswith(("--parallel.", "no option of --parallel"))


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        ("--recipe qwen3_vl --model qwen3-vl-2b --stage 2", 32768),
        ("--recipe qwen3_vl --model qwen3-vl-2b --stage 2 --capacity 4096", 4096),
        ("--model internvl2_5-1b --stage 1", 16384),
    ],
)
def test_packs_are_as_long_as_the_stage_has_them(
    words: str, tokens: int, capsys: pytest.CaptureFixture[str]
):
    assert main([*words.split(), "--gpus", "8", "--layout", ""]) == 0
    assert f"packs a step, each of {tokens}\n" in capsys.readouterr().out


@pytest.mark.parametrize("flag", _NUMBERS)
def test_every_number_that_cannot_be_is_named(flag: str, capsys: pytest.CaptureFixture[str]):
    for wrong in ("-8", "nan", "inf") if _NUMBERS[flag] is float else ("-8",):
        assert main([*_RUN, flag, wrong]) == 1
        assert capsys.readouterr().err.startswith(f"error: {flag} {wrong}: must be ")


def test_what_a_number_must_be_is_told(capsys: pytest.CaptureFixture[str]):
    zeros = ["--gpus", "0", "--capacity", "0", "--global_batch_size", "0", "--tflops", "0"]
    assert main([*_RUN, *zeros, "--efficiency", "1.5"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: --gpus 0: must be at least 1",
        "  --global_batch_size 0: must be at least 1",
        "  --capacity 0: must be at least 1",
        "  --tflops 0: must be above 0",
        "  --efficiency 1.5: must be above 0 and at most 1",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "packs", "--tiles", "9"], "--tiles 9 has no effect: --data says what packs"),
        (["--layout", "", "--top", "3"], "--top 3 has no effect with --layout"),
        (["--supervised", "20000"], "--supervised 20000: must be at most --capacity 16384"),
    ],
)
def test_options_without_effect_are_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
):
    assert main([*_RUN, *words]) == 1
    assert capsys.readouterr().err.startswith(f"error: {told}")


def test_packs_that_the_ranks_of_a_layout_cannot_share_are_refused(
    capsys: pytest.CaptureFixture[str],
):
    layout = ["--layout", "--parallel.context_parallel_size 3", "--gpus", "6"]
    assert main([*_RUN, *layout, "--global_batch_size", "6"]) == 1
    assert "--capacity that is a multiple of 6" in capsys.readouterr().err
    assert main([*_RUN, *layout, "--global_batch_size", "6", "--capacity", "16386"]) == 0


def _planned(tmp_path: Path, *arguments: str) -> list[dict]:
    """Return all layouts that the tool finds."""
    path = tmp_path / "plan.json"
    assert main([*_RUN, "--memory_gib", "1000", "--json", str(path), *arguments]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_search_starts_from_the_options_of_the_trainer(tmp_path: Path):
    usual = _planned(tmp_path)
    average = _planned(tmp_path, "--ema.decay", "0.999")
    assert average[0]["memory"]["optimizer"] > usual[0]["memory"]["optimizer"]
    file = tmp_path / "run.yaml"
    file.write_text("optimizer: {moments: bfloat16}\n", encoding="utf-8")
    smaller = _planned(tmp_path, "--config", str(file))
    assert smaller[0]["memory"]["optimizer"] < usual[0]["memory"]["optimizer"]
    adapters = ["--training.trainable", "connector", "--training.drop_path", "0"]
    adapters += ["--architecture.lora.rank", "4", "--architecture.lora.dropout", "0.1"]
    trained = _planned(tmp_path, *adapters)
    assert trained[0]["memory"]["gradients"] < 0.1 * usual[0]["memory"]["gradients"]
    contexts = {one["parallel"]["context_parallel_size"] for one in trained}
    assert contexts == {1}, "dropout excludes context parallelism"


def test_an_option_that_the_search_sets_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*_RUN, "--tensor-model-parallel-size", "2"]) == 1
    told = "error: --parallel.tensor_model_parallel_size 2: the search sets the layout"
    assert capsys.readouterr().err.startswith(told)
    file = tmp_path / "run.yaml"
    file.write_text("parallel: {recompute: full}\n", encoding="utf-8")
    assert main([*_RUN, "--config", str(file)]) == 1
    assert f"--parallel.recompute full (--config {file}, line 1)" in capsys.readouterr().err
    assert main([*_RUN, "--config", str(file), "--layout", "--parallel.vision tensor"]) == 0
    assert " full " in capsys.readouterr().out


def test_options_of_the_trainer_are_checked(capsys: pytest.CaptureFixture[str]):
    for wrong in (
        ["--training.trainable", "foo"],
        ["--loss.vocabulary_block", "-1"],
        ["--gpu", "8"],
    ):
        with pytest.raises(SystemExit):
            main([*_RUN, *wrong])
        assert wrong[0] in capsys.readouterr().err


def test_a_model_that_transformer_engine_cannot_compute_is_planned_on_local_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = ["--model", "internvl3_5-30b-a3b", "--stage", "2", "--gpus", "8"]
    run += ["--training.trainable", "connector,language.decoder.layers.3.mlp.experts.17"]
    # Which kernels compute the run is decided before layouts are searched for, which takes seconds.
    run += ["--training.drop_path", "0", "--layout", "--parallel.expert_model_parallel_size 8"]
    path = tmp_path / "plan.json"
    memory = {}
    for kernels in ("auto", "local"):
        kind = ["--training.kernels", kernels]
        assert main([*run, *kind, "--json", str(path)]) == 0
        assert " --training.kernels local\n" in capsys.readouterr().out
        memory[kernels] = json.loads(path.read_text(encoding="utf-8"))[0]["memory_gib"]
    assert memory["auto"] == memory["local"]
    assert main([*run, "--training.kernels", "transformer_engine"]) == 1
    assert "use --training.kernels local" in capsys.readouterr().err
