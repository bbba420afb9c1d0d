"""Looking ahead changes nothing."""

from __future__ import annotations

from megavlm.parallel.pipeline import Ahead


def test_an_item_that_was_looked_at_still_comes() -> None:
    items = Ahead(iter([1, 2, 3]))
    assert (items.look(), items.look(), next(items), next(items), items.look()) == (1, 1, 1, 2, 3)
    assert list(items) == [3]
