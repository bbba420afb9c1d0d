"""Packs of questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megavlm.data.loading.dataset import sample_positions
from megavlm.data.loading.prefixes import find_prefixes
from megavlm.data.store.manifest import read_manifest
from megavlm.evaluate.packs import Asked, QuestionReader
from tests.data.samples import make_dataset


def test_a_prefix_ends_where_an_answer_begins(tmp_path: Path) -> None:
    make_dataset(tmp_path, packs=1, capacity=64, alignment=4)
    asked = [
        Asked(
            path=Path("task.jsonl"),
            line=number + 1,
            tokens=np.arange(2, 2 + length, dtype=np.int32),
            supervised=np.arange(length) >= learned,
            images=(),
            room=room,
        )
        # Two questions with room for an answer, and a choice of five tokens behind a question.
        for number, (length, learned, room) in enumerate([(7, 7, 6), (10, 10, 6), (12, 7, 0)])
    ]
    reader = QuestionReader(asked, [[0, 1, 2]], read_manifest(tmp_path))
    pack = reader.read(0)
    positions, ends = sample_positions(pack.lengths, 4, 64)
    found = find_prefixes(pack.supervised, positions, ends)
    assert found.ends.diff().tolist() == [7, 10, 7, 1]
