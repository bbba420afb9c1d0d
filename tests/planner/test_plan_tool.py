"""What ``tools/plan_parallel.py`` asks for."""

from __future__ import annotations

import pytest

from tools.plan_parallel import main


@pytest.mark.parametrize("recipe", ["llava", "clip"])
def test_a_recipe_with_a_model_of_its_own_needs_no_model(
    recipe: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["--recipe", recipe, "--stage", "1", "--gpus", "8", "--top", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"{recipe}, stage 1, 8 GPUs,")
