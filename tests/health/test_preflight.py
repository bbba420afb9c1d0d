"""Ranks that do not see the same, in threads of one process: the store is all that they share."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megavlm.config.schema import Optimizer
from megavlm.health.preflight import (
    DisagreementError,
    RankView,
    check_consistency,
    differences,
    problems,
    snapshot,
)
from megavlm.health.rank_names import spans
from tests.data.samples import make_dataset
from tests.ranks.runs import config_for


def _verdicts(
    views: list[RankView],
    size: int | None = None,
    timeout: float = 20,
    store: dist.Store | None = None,
) -> list[str]:
    """Return what each rank is told; empty if it may start. Ranks from ``len(views)`` on do not
    come.
    """
    store = store or dist.HashStore()
    said = []

    def rank(number: int) -> str:
        try:
            check_consistency(
                store,
                number,
                size or len(views),
                views[number],
                timedelta(seconds=timeout),
                said.append,
            )
        except DisagreementError as error:
            assert said == [str(error)], "the first rank speaks before any ends"
            return str(error)
        return ""

    with ThreadPoolExecutor(len(views)) as pool:
        return list(pool.map(rank, range(len(views))))


def test_ranks_that_see_the_same_start() -> None:
    assert (
        _verdicts([RankView(facts={"seed": "1"}, host=f"node{rank}") for rank in range(4)])
        == [""] * 4
    )


def test_every_rank_is_told_who_differs_and_in_what() -> None:
    views = [
        RankView(facts={"seed": "1", "torch": "2.13"}, host=f"node{rank // 2}") for rank in range(6)
    ]
    views[4] = dataclasses.replace(views[4], facts={"seed": "7", "torch": "2.13"})
    [told] = set(_verdicts(views))
    assert "rank 4 (node2): seed is 7 (ranks 0-3, 5: 1)" in told and "torch" not in told


def test_a_rank_that_cannot_start_is_named() -> None:
    views = [
        RankView(host="a"),
        RankView(host="b", problem="--data.train packs: no such folder"),
        RankView(host="c"),
    ]
    [told] = set(_verdicts(views))
    assert told == "rank 1 (b): --data.train packs: no such folder"


@pytest.mark.parametrize("ranks", [2, 16])
def test_facts_that_all_ranks_see_are_in_the_store_once(ranks: int) -> None:
    store = dist.HashStore()
    facts = {f"code of {number}.py": "0123456789ab" for number in range(500)}
    views = [RankView(facts=facts, host=f"node{rank}") for rank in range(ranks)]
    assert _verdicts(views, store=store) == [""] * ranks
    posted = [store.get(f"preflight/view/{rank}") for rank in range(ranks)]
    assert max(map(len, posted)) < 200
    # A view of each rank, the facts, how many see them, and the verdict.
    assert store.num_keys() == ranks + 3


def test_what_all_ranks_have_is_told_without_ranks() -> None:
    assert (
        problems([RankView(problem="--stage 7: no such stage")] * 3) == "--stage 7: no such stage"
    )


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named() -> None:
    [told] = set(_verdicts([RankView(), RankView()], size=4, timeout=3))
    assert told.startswith("ranks 2-3 of 4 have not come within")


def test_a_fact_that_a_rank_lacks_is_a_difference() -> None:
    has = RankView(facts={"code of a.py": "1"}, host="a")
    lacks = RankView(facts={}, host="b")
    [line] = differences([has, lacks, has])
    assert line == "rank 1 (b): code of a.py is missing (ranks 0, 2: 1)"


def test_many_differences_are_cut_short() -> None:
    [told] = set(
        _verdicts(
            [RankView(facts={}), RankView(facts={f"fact {number}": "x" for number in range(50)})]
        )
    )
    assert "and 30 differences more" in told and told.count("\n") == 21


def test_configuration_data_code_and_start_are_looked_at(tmp_path: Path) -> None:
    sizes = dict(
        vocab_size=199, context_token_id=7, tile_size=16, features_per_tile=4, capacity=128
    )
    make_dataset(tmp_path / "one", packs=4, **sizes)
    make_dataset(tmp_path / "two", packs=5, **sizes)
    config = config_for(tmp_path / "one")
    here = snapshot(config, None)
    assert here == snapshot(config, None)
    assert here["megatron-core"].startswith("0.1") and "code of megavlm/health/preflight.py" in here

    def changed(other: dict[str, str]) -> set[str]:
        return {name for name in here if other.get(name) != here[name]}

    assert changed(snapshot(dataclasses.replace(config, optimizer=Optimizer(lr=0.5)), None)) >= {
        "--optimizer.lr"
    }
    assert changed(snapshot(config, tmp_path / "step_00000003")) == {"it starts from"}
    (tmp_path / "one").rename(tmp_path / "old")
    (tmp_path / "two").rename(tmp_path / "one")
    assert changed(snapshot(config, None)) == {
        f"packs in --data.train {tmp_path / 'one'}",
        f"manifest.json of --data.train {tmp_path / 'one'}",
    }


def test_every_folder_of_a_blend_is_looked_at(tmp_path: Path) -> None:
    for place, name in enumerate(("one", "two")):
        make_dataset(tmp_path / name, packs=3 + place, image_share=0)
    found = snapshot(config_for(f"{tmp_path / 'one'},{tmp_path / 'two'}"), None)
    assert [found[f"packs in --data.train {tmp_path / name}"] for name in ("one", "two")] == [
        "3",
        "4",
    ]


@pytest.mark.parametrize(("ranks", "words"), [([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")])
def test_ranks_in_few_words(ranks: list[int], words: str) -> None:
    assert spans(ranks) == words


def test_a_first_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(RuntimeError, match="rank 0 has not come within"):
        check_consistency(dist.HashStore(), 1, 2, RankView(), timedelta(seconds=0.1), print)
