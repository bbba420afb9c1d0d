"""Tests with ranks: processes that train and convert together."""

import pytest

# Here, since tests of other folders import it, too.
pytest.register_assert_rewrite("tests.ranks.model_checks")
