"""Metrics of embeddings of images and texts, for models of two encoders.

Shape letters: I images, T texts, E size of the embeddings, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megavlm.evaluate.answer import Score

CUTS = (1, 5, 10)
RECALLS = tuple(f"{way}_at_{cut}" for way in ("image_to_text", "text_to_image") for cut in CUTS)
"""Names of R@1, R@5 and R@10, both ways."""
# Rows of the similarity matrix that are held at once.
_ROWS = 1024
# Cosines that differ by less are equal: those of the same two vectors differ in their last bits, by
# where in a matrix the vectors are.
_ALIKE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """What a model makes of the images and texts of a task, on the host.

    Args:
        images: of length one, float32 [I, E].
        texts: of length one, float32 [T, E].
        owners: of each text, the index of its image, or of its class; int64 [T].
        truth: index of each image's class, int64 [I]; of the image itself if there are no classes.
    """

    images: Tensor
    texts: Tensor
    owners: Tensor
    truth: Tensor


@dataclass(frozen=True, kw_only=True)
class PairMetric:
    """A row of the table.

    Args:
        judge: returns the figures with a score for each image, and what each image is taken for:
            the index of a text or of a class.
        measures: what for, in a few words.
        figures: names of its figures, the one that a model is judged by first. It is the mean of
            the images' scores.
        has_classes: whether an image has one right answer among classes that all images share.
    """

    judge: Callable[[Embedded], tuple[Score, list[int]]]
    measures: str
    figures: tuple[str, ...]
    has_classes: bool = False


def retrieval(found: Embedded) -> tuple[Score, list[int]]:
    """Return R@1, R@5 and R@10 both ways: the share of images of which any text is among so many of
    the most similar, and the share of texts whose image is (as CLIP and its successors count).
    """
    own = found.truth
    of_images = search_ranks(found.images, found.texts, own, found.owners)
    of_texts = search_ranks(found.texts, found.images, found.owners, own)
    places = (of_images, of_texts)
    shares = [_share(one < cut) for one in places for cut in CUTS]
    figures = dict(zip(RECALLS, shares, strict=True))
    hits = tuple((of_images < 1).double().tolist())
    return Score(figures=figures, each=hits), _nearest(found.images, found.texts)


def zero_shot(found: Embedded) -> tuple[Score, list[int]]:
    """Return how often the class of an image is the nearest one, or among the five nearest, and the
    mean of the first over classes. The embedding of a class is the mean of those of its prompts, of
    length one again (Radford et al., arXiv 2103.00020, section 3.1.4).
    """
    classes = int(found.owners.max()) + 1
    sums = torch.zeros(classes, found.texts.shape[1]).index_add(0, found.owners, found.texts)
    centres = normalize(sums, dim=-1)
    places = search_ranks(found.images, centres, found.truth, torch.arange(classes))
    is_right = places < 1
    of_classes = [_share(is_right[found.truth == one]) for one in found.truth.unique()]
    figures = {
        "accuracy": _share(is_right),
        "accuracy_at_5": _share(places < 5),
        "mean_per_class": sum(of_classes) / len(of_classes),
    }
    each = tuple(is_right.double().tolist())
    return Score(figures=figures, each=each), _nearest(found.images, centres)


def clip_similarity(found: Embedded) -> tuple[Score, list[int]]:
    """Return the mean cosine of images and their texts; several texts of one image count as one, by
    their mean. A hundred times the figure is the CLIP score.
    """
    cosines = (found.images[found.owners] * found.texts).sum(dim=1).double()
    sums = torch.zeros(len(found.images), dtype=torch.float64).index_add(0, found.owners, cosines)
    each = (sums / found.owners.bincount()).tolist()
    figures = {"similarity": sum(each) / len(each)}
    return Score(figures=figures, each=tuple(each)), _nearest(found.images, found.texts)


def search_ranks(queries: Tensor, found: Tensor, truth: Tensor, labels: Tensor) -> Tensor:
    """Return how many of those found are nearer to a query than the nearest right one, float64
    [queries]; half of those that are as near, to 1e-6, count. Infinite without a finite similarity.

    Args:
        queries: embeddings.
        found: embeddings that they find.
        truth: label of each query.
        labels: of each that is found; those with the query's are right.
    """
    places = queries.new_empty(len(queries), dtype=torch.float64)
    for start in range(0, len(queries), _ROWS):
        rows = slice(start, start + _ROWS)
        similar = queries[rows] @ found.T
        similar = similar.masked_fill(~similar.isfinite(), -torch.inf)
        is_right = labels == truth[rows, None]
        best = similar.masked_fill(~is_right, -torch.inf).max(dim=1).values
        ahead = similar.masked_fill(is_right, -torch.inf) - best[:, None]
        before = (ahead > _ALIKE).sum(dim=1) + (ahead.abs() <= _ALIKE).sum(dim=1) / 2
        places[rows] = before.double().masked_fill(~best.isfinite(), torch.inf)
    return places


def _nearest(queries: Tensor, found: Tensor) -> list[int]:
    """Return the index of what is nearest to each query."""
    rows = queries.split(_ROWS)
    return torch.cat([(some @ found.T).argmax(dim=1) for some in rows]).tolist()


def _share(which: Tensor) -> float:
    return float(which.double().mean())


PAIR_METRICS: dict[str, PairMetric] = {
    "retrieval": PairMetric(
        judge=retrieval,
        measures="images and their captions find each other (COCO, Flickr30k)",
        figures=RECALLS,
    ),
    "zero_shot": PairMetric(
        judge=zero_shot,
        measures="classes by the texts of prompts (ImageNet)",
        figures=("accuracy", "accuracy_at_5", "mean_per_class"),
        has_classes=True,
    ),
    "clip_similarity": PairMetric(
        judge=clip_similarity,
        measures="cosine of an image and its texts",
        figures=("similarity",),
    ),
}
