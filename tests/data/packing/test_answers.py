"""Records of two answers become samples: both answers, the images once, measured as encoded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers.normalizers import NFC

from megavlm.data.packing.media import Images
from megavlm.data.records.filters import Filter
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.parse import parse_record
from megavlm.data.records.raw_record import RawRecord
from megavlm.data.records.reject import Reject
from megavlm.data.text.tokenizer import load_tokenizer
from tests.data.preferences import (
    BOTH,
    CONTEXT,
    FEATURES,
    TOKENIZER,
    make_encoder,
    source_of,
    write_records,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("pairs"))


def test_a_sample_has_both_answers_and_its_images_once(data):
    source, raws = source_of(data)
    encoder = make_encoder()
    for raw in raws:
        (sample,) = encoder.encode_raw(raw, source, source=0, images=Images.LOAD)
        record = parse_record(raw.fields(), root=source.root, preferences=True)
        other = sample.rejected
        assert record.videos or len(sample.images) == len(record.images)
        assert (other.images, other.rejected, len(other.instruction)) == ((), None, 0)
        assert (other.source, other.line) == (sample.source, sample.line) == (0, raw.number)
        for each, last in ((sample, record.conversations[-1]), (other, record.rejected)):
            learned = each.tokens[each.supervised].tolist()
            (place,) = np.flatnonzero(np.diff(each.supervised, prepend=False)).tolist()[:1]
            assert each.supervised[place:].sum() == len(learned)  # one answer, the last
            assert encoder.template.text(learned).strip() == last.text.strip()
        # The same up to the answer, images and all.
        start = int(sample.supervised.argmax())
        assert np.array_equal(sample.tokens[:start], other.tokens[:start])
        assert not sample.supervised[:start].any() and not other.supervised[:start].any()
        shown = [np.count_nonzero(each.tokens == CONTEXT) for each in (sample, other)]
        assert shown == [FEATURES * sample.tiles] * 2


@pytest.mark.parametrize("alignment", [1, 8, 64])
@pytest.mark.parametrize("images", [Images.HEADER, Images.DECODE])
def test_measured_as_encoded(data, alignment, images):
    source, raws = source_of(data)
    for settings in ({}, {"capacity": 64 * 8}, {"tile_cap": 3}):
        encoder = make_encoder(alignment=alignment, **settings)
        results = Counter()
        for raw in raws:
            sizes = encoder.measure_raw(raw, source, source=0, images=images)
            samples = encoder.encode_raw(raw, source, source=0, images=images)
            results[type(samples)] += 1
            if isinstance(samples, Reject):
                assert sizes == samples
                continue
            (size,) = sizes
            (sample,) = samples
            lengths = (sample.length, sample.rejected.length)
            assert size.length == -(-lengths[0] // alignment) * alignment + lengths[1]
            assert (size.images, size.tiles, size.unread) == (
                sample.images,
                sample.tiles,
                sample.unread,
            )
        assert results[tuple] and (results[Reject] or not settings)


def _outcomes(fields: dict, **settings) -> list:
    """Return what measuring and encoding a record come to."""
    raw = RawRecord(offset=0, number=1, content=json.dumps(fields).encode())
    source = Annotations(name="a", path="a.jsonl", keep=settings.pop("keep", Filter()))
    encoder = make_encoder(**settings)
    ways = (encoder.measure_raw, encoder.encode_raw)
    return [way(raw, source, source=0, images=Images.HEADER) for way in ways]


def test_answers_that_become_the_same_tokens_are_refused():
    """As by a tokenizer that composes letters and their accents, which Qwen's does."""
    fields = {"question": "q", "chosen": "\u00e9", "rejected": "e\u0301"}
    assert not any(isinstance(each, Reject) for each in _outcomes(fields))
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.backend_tokenizer.normalizer = NFC()
    for outcome in _outcomes(fields, tokenizer=tokenizer):
        assert outcome.reason == "same_answers" and "both become the same" in outcome.detail
    same_length = {"question": "q", "chosen": "five", "rejected": "sign"}
    assert not any(isinstance(each, Reject) for each in _outcomes(same_length))


def test_a_pair_is_told_how_much_of_it_its_images_are(data):
    fields = {"image": str(data / "0.png"), "question": "<image>\nq", **BOTH}
    (size,), _ = _outcomes(fields)
    features = FEATURES * size.tiles
    for each in _outcomes(fields, capacity=size.length - 1):
        told = f"both answers, {2 * features} of them for {size.tiles} tiles"
        assert each.reason == "too_long" and told in each.detail


def test_a_rejected_answer_with_a_token_of_images_is_refused():
    for outcome in _outcomes({"question": "q", "chosen": "a", "rejected": "<IMG_CONTEXT>"}):
        assert outcome.reason == "image_token_in_text"


def test_a_pair_that_fills_a_pack_exactly():
    fields = {"question": "q", **BOTH}
    (size,), (sample,) = _outcomes(fields)
    lengths = (sample.length, sample.rejected.length)
    whole = sum(lengths)
    assert size.length == whole
    for each in _outcomes(fields, capacity=whole):
        assert not isinstance(each, Reject)
    for each in _outcomes(fields, capacity=whole - 1):
        assert each.reason == "too_long" and f"{whole} tokens of both answers" in each.detail
    aligned = [-(-length // 64) * 64 for length in lengths]
    for each in _outcomes(fields, capacity=sum(aligned), alignment=64):
        assert not isinstance(each, Reject)
    for each in _outcomes(fields, capacity=aligned[0], alignment=64):
        assert each.reason == "too_long"
    # A filter sees what the tokenizer makes, whatever the alignment.
    for alignment in (1, 64):
        for most, reason in ((whole, None), (whole - 1, "filtered_length")):
            keep = Filter(max_tokens=most)
            for each in _outcomes(fields, keep=keep, alignment=alignment):
                assert (each.reason if isinstance(each, Reject) else None) == reason
