"""What ``tools/plan_parallel.py`` asks for."""

from __future__ import annotations

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
    assert capsys.readouterr().out.startswith(f"{recipe}, stage 1, 8 GPUs,")


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


def test_packs_that_the_ranks_of_a_layout_cannot_share_are_refused(
    capsys: pytest.CaptureFixture[str],
):
    layout = ["--layout", "--parallel.context_parallel_size 3", "--gpus", "6"]
    assert main([*_RUN, *layout, "--global_batch_size", "6"]) == 1
    assert "--capacity that is a multiple of 6" in capsys.readouterr().err
    assert main([*_RUN, *layout, "--global_batch_size", "6", "--capacity", "16386"]) == 0
