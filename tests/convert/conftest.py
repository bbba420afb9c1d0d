"""Messages of assertions in helpers."""

import pytest

pytest.register_assert_rewrite("tests.convert.round_trip")
