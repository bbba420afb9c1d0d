"""Small packed datasets of preferences: random prompts with two random answers each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.data.sample import Sample
from megavlm.data.store.manifest import Manifest
from megavlm.data.store.reader import Reader
from megavlm.data.store.reference import ReferenceFacts, ReferenceWriter, reference_folder
from tests.data.samples import make_sample, write_packs


def with_rejected(sample: Sample, rng: np.random.Generator, words: int, vocab_size: int) -> Sample:
    """Give a sample, whose end is supervised, another answer of so many random words."""
    prompt = int(np.flatnonzero(sample.supervised)[0])
    context = sample.tokens[:prompt]
    answer = rng.integers(8, vocab_size, words).astype(np.int32)
    rejected = dataclasses.replace(
        sample,
        tokens=np.concatenate([context, answer]),
        supervised=np.arange(prompt + words) >= prompt,
        images=(),
        instruction=np.zeros(0, np.int32),
    )
    return dataclasses.replace(sample, rejected=rejected)


def answers_apart(pairs: Sequence[Sample]) -> list[Sample]:
    """Return the answers of pairs as samples of their own, each with images and instruction."""
    return [
        dataclasses.replace(answer, images=pair.images, instruction=pair.instruction, rejected=None)
        for pair in pairs
        for answer in pair.answers
    ]


def make_pairs(packs: int, pairs: int, *, seed: int = 0, **sizes: Any) -> list[list[Sample]]:
    """Make packs of so many pairs, every other one with an image of one tile; ``sizes`` as for
    ``make_sample``.
    """
    rng = np.random.default_rng(seed)
    made = []
    for line in range(packs * pairs):
        text = int(rng.integers(6, 14))
        given = dict(text_tokens=text, line=line + 1, grids=((1, 1),))
        sample = make_sample(rng, images=line % 2, **given, **sizes)
        made.append(with_rejected(sample, rng, int(rng.integers(2, 9)), sizes["vocab_size"]))
    return [made[first : first + pairs] for first in range(0, len(made), pairs)]


def make_preferences(
    folder: Path,
    *,
    packs: int = 8,
    pairs: int = 2,
    seed: int = 0,
    capacity: int = 128,
    **facts: Any,
) -> Manifest:
    """Write packs of preferences for the tiny model of ``tests/ranks/runs``."""
    sizes = dict(vocab_size=199, context_token_id=7, tile_size=16, features_per_tile=4)
    sizes |= {name: facts.pop(name) for name in sizes if name in facts}
    made = make_pairs(packs, pairs, seed=seed, **sizes)
    return write_packs(folder, made, capacity=capacity, **sizes, **facts)


def make_reference(root: Path, dataset: Path, seed: int = 0) -> None:
    """Write probabilities of a reference model for a dataset, as if it was as good as chance."""
    reader = Reader(dataset)
    manifest = reader.manifest
    pairs = manifest.totals.samples // 2
    facts = ReferenceFacts(
        weights="chance",
        dataset=str(dataset),
        idx_crc32=manifest.idx_crc32,
        packs=manifest.totals.packs,
        pairs=pairs,
    )
    writer = ReferenceWriter(reference_folder(root, dataset, manifest), facts, reader.index)
    writer.append(-np.random.default_rng(seed).uniform(10, 40, (pairs, 2)).astype(np.float32))
    writer.close()
