"""Settings of a test's run reach the field that is meant, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.config.schema import Fp8
from tests.gpu.models import small
from tests.ranks.runs import config_for


def test_a_recipe_for_fp8_does_not_end_in_another_section() -> None:
    with pytest.raises(ValueError, match="Parallel.vision: 'tensorwise'"):
        small(Path("unused"), vision="tensorwise")
    with pytest.raises(AssertionError, match="language"):
        small(Path("unused"), language="delayed")
    config = small(Path("unused"), fp8=Fp8(vision="tensorwise", language="delayed"))
    assert config.fp8.recipes == {"vision": "tensorwise", "language": "delayed"}
    assert config.parallel.vision == "tensor"
    assert config_for(Path("unused"), vision="data").parallel.vision == "data"
