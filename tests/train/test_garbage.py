"""What lives as long as a training loop is no work of the garbage collector."""

from __future__ import annotations

import gc

from megavlm.train.garbage import what_lives_set_aside


def test_what_lives_is_set_aside_and_comes_back() -> None:
    alive = [[number] for number in range(1000)]
    with what_lives_set_aside():
        assert gc.get_freeze_count() > 1000
        assert not any(found is alive for found in gc.get_objects())
    assert gc.get_freeze_count() == 0
    assert any(found is alive for found in gc.get_objects())
