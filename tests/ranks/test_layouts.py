"""Whatever the layout and the freeze mask, training is the same as in one process: losses, gradient
norms, and the weights in the end.

``MEGAVLM_MATRIX=all`` runs every layout of the table with every mask and keeps what it finds in
``docs/layouts.md``; the part that is the default has every axis, every pair of axes, and every
mask, and fits into everyday testing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megavlm.config.schema import Config
from megavlm.data.loading.dataset import PackedDataset
from tests.data.samples import make_sample, write_packs
from tests.ranks import layouts
from tests.ranks.layouts import LAYOUTS, LIMIT, MASKS, Layout, Row
from tests.ranks.pool import Pool
from tests.ranks.runs import (
    TINY,
    Curve,
    assert_same_part_norms,
    config_for,
    train_curve,
    whole_weights,
)

# Images of each sample; each third pack has none.
PACKS = [(1, 0, 2), (0, 2, 1), (0, 0, 0), (2, 0, 0)] * 3
# An epoch and a step more, or as many as the table is about.
STEPS = 10 if layouts.asks_for_all() else 4
CASES = [
    (layout, mask)
    for layout in LAYOUTS
    for mask in MASKS
    if mask in layout.everyday or (layouts.asks_for_all() and mask != "0")
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    rng = np.random.default_rng(0)
    sizes = dict(
        vocab_size=TINY.language.vocab_size,
        context_token_id=7,
        tile_size=16,
        features_per_tile=TINY.features_per_tile,
    )
    samples = [
        [
            make_sample(
                rng, images=count, text_tokens=int(rng.integers(8, 28)), line=line + 1, **sizes
            )
            for line, count in enumerate(images)
        ]
        for images in PACKS
    ]
    write_packs(folder, samples, capacity=128, alignment=4, **sizes)
    assert sum(record["tiles"] == 0 for record in PackedDataset(folder).some_records()) == 3
    return folder


def _config(dataset: Path, mask: str, layers: int, **settings: Any) -> Config:
    # Adam hides a wrong factor in the gradients, and makes much of the rounding in a gradient of
    # zero: a large epsilon cures both.
    config = config_for(
        dataset,
        steps=STEPS,
        trainable=MASKS[mask],
        drop_path=0.2 if "vision" in MASKS[mask] else 0.0,
        adam_eps=1e-3,
        **settings,
    )
    vision, language = (replace(part, num_layers=layers) for part in (TINY.vision, TINY.language))
    return replace(config, architecture=replace(TINY, vision=vision, language=language))


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path) -> Callable[[str, int], Curve]:
    """Return a cached function that trains in one process, for a freeze mask and a number of
    layers.
    """
    return cache(lambda mask, layers: ranks.run(train_curve, 1, _config(dataset, mask, layers))[0])


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    """Collect the rows that the tests find, and print them at the end."""
    rows: list[Row] = []
    yield rows
    for row in rows:
        print("\n", layouts.line(row), sep="", end="")


def _apart(values: list[float], expected: list[float]) -> float:
    return max(
        abs(value - wanted) / abs(wanted) for value, wanted in zip(values, expected, strict=True)
    )


def compare(curves: list[Curve], expected: Curve) -> dict[str, float]:
    """Compute the largest relative difference of all ranks' curves from that of one process, by
    quantity.
    """
    assert_same_part_norms(curves, expected)
    weights = whole_weights(curves)
    wanted = whole_weights([expected])
    assert weights.keys() == wanted.keys()
    apart = {
        key: np.abs(weight - wanted[key]).max() / max(np.abs(wanted[key]).max(), 1e-9)
        for key, weight in weights.items()
    }
    return dict(
        loss=_apart(curves[0].losses, expected.losses),
        grad_norm=_apart(curves[0].grad_norms, expected.grad_norms),
        weights=float(max(apart.values())),
    )


@pytest.mark.parametrize(("layout", "mask"), CASES, ids=lambda value: str(value))
def test_a_layout_trains_like_one_process(
    ranks: Pool,
    dataset: Path,
    alone: Callable[[str, int], Curve],
    table: list[Row],
    layout: Layout,
    mask: str,
) -> None:
    curves = ranks.run(
        train_curve, layout.ranks, _config(dataset, mask, layout.layers, **layout.settings)
    )
    row = Row(
        layout=str(layout),
        ranks=layout.ranks,
        mask=mask,
        **compare(curves, alone(mask, layout.layers)),
    )
    table.append(row)
    if layouts.asks_for_all():
        layouts.keep(row)
    assert row.largest <= LIMIT, row


@pytest.mark.parametrize("mask", MASKS)
def test_training_learns(alone: Callable[[str, int], Curve], mask: str) -> None:
    curve = alone(mask, TINY.vision.num_layers)
    assert curve.losses[-1] < curve.losses[0]
    assert all(norm > 0 for norm in curve.grad_norms)
    assert set(curve.part_norms["param_norm"]) == set(MASKS[mask])
