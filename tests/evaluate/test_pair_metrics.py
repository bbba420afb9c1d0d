"""Metrics of embeddings, against torchmetrics and against a search by brute force."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from megavlm.evaluate import pair_metrics
from megavlm.evaluate.pair_metrics import PAIR_METRICS, Embedded, search_ranks

GOLDEN = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "golden" / "pair_metrics.json.gz").read_bytes())
)


def embedded(images: Any, texts: Any, owners: Any, truth: Any) -> Embedded:
    return Embedded(
        images=normalize(torch.tensor(images, dtype=torch.float32), dim=-1),
        texts=normalize(torch.tensor(texts, dtype=torch.float32), dim=-1),
        owners=torch.tensor(owners),
        truth=torch.tensor(truth),
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_figures_are_those_of_torchmetrics(name: str) -> None:
    given = dict(GOLDEN[name])
    expected = given.pop("figures")
    score, nearest = PAIR_METRICS[name].judge(embedded(**given))
    assert tuple(score.figures) == PAIR_METRICS[name].figures
    assert score.figures == pytest.approx(expected, abs=1e-6)
    assert len(nearest) == len(score.each) == len(given["images"])
    assert np.mean(score.each) == pytest.approx(score.figures[PAIR_METRICS[name].figures[0]])


def test_retrieval_is_a_search_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_metrics, "_ROWS", 7)  # a part of them at a time
    given = dict(GOLDEN["retrieval"])
    del given["figures"]
    found = embedded(**given)
    score, nearest = PAIR_METRICS["retrieval"].judge(found)
    similar = found.images.double().numpy() @ found.texts.double().numpy().T
    owners = found.owners.numpy()
    for cut in (1, 5, 10):
        hits = [image in owners[np.argsort(-row)[:cut]] for image, row in enumerate(similar)]
        assert score.figures[f"image_to_text_at_{cut}"] == pytest.approx(np.mean(hits))
        columns = zip(similar.T, owners, strict=True)
        hits = [owner in np.argsort(-column)[:cut] for column, owner in columns]
        assert score.figures[f"text_to_image_at_{cut}"] == pytest.approx(np.mean(hits))
    assert nearest == similar.argmax(axis=1).tolist()


def test_the_similarity_of_an_image_is_the_mean_of_its_texts() -> None:
    found = embedded([[1, 0], [0, 1]], [[1, 0], [0, 1], [3, 4]], [0, 0, 1], [0, 1])
    score, nearest = PAIR_METRICS["clip_similarity"].judge(found)
    assert score.each == pytest.approx((0.5, 0.8))
    assert score.figures["similarity"] == pytest.approx(0.65)
    assert nearest == [0, 1]


def test_what_is_as_near_counts_half_and_what_is_no_number_is_missed() -> None:
    alike = torch.ones(4, 2)
    labels = torch.arange(4)
    assert search_ranks(alike[:1], alike, labels[:1], labels).tolist() == [1.5]
    nothing = torch.full((1, 2), -torch.inf)
    missed = search_ranks(torch.cat([nothing, alike[:1]]), alike, labels[:2], labels)
    assert missed.tolist() == [torch.inf, 1.5]
    # Products of the same vectors differ in their last bits, by where they are in a matrix.
    rounded = torch.tensor([[1 - 2**-23, 0.0], [1.0, 0.0], [1 - 2**-16, 0.0]])
    assert search_ranks(rounded[1:2], rounded, labels[:1], labels[:3]).tolist() == [0.5]
    assert search_ranks(alike[:0], alike, labels[:0], labels).tolist() == []
    # A text that is no number harms its own image alone.
    texts = torch.cat([nothing, alike[1:]])
    assert search_ranks(alike[:2], texts, labels[:2], labels).tolist() == [torch.inf, 1.0]
    # And not even that, if the image has another.
    signs = torch.tensor([[1.0, -1.0]])
    texts = torch.cat([nothing, signs, -signs])
    assert search_ranks(signs, texts, labels[:1], torch.tensor([0, 0, 1])).tolist() == [0.0]
    assert search_ranks(-signs.abs(), texts, labels[1:2], torch.tensor([0, 0, 1])).tolist() == [0.5]
