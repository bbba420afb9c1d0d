"""The manifest of a packed dataset says how it was packed, and what training needs to know."""

from __future__ import annotations

import dataclasses
import json
import shutil

from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.job import pack_dataset
from megavlm.data.records.meta_file import single_source
from megavlm.data.store.reader import Reader
from megavlm.data.text.tokenizer import fingerprint, load_tokenizer
from tests.data.packing.test_job import GOLDEN, _job, data  # noqa: F401  (a fixture)


def test_the_manifest_says_what_was_done(data, tmp_path):  # noqa: F811
    pack_dataset(
        _job(data, tmp_path / "out", "bad", max_rejects=0.7, alignment=8, tile_cap=20, seed=5)
    )
    manifest = Reader(tmp_path / "out").manifest
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert (
        manifest.tokenizer_fingerprint
        == fingerprint(tokenizer)
        == fingerprint(load_tokenizer(GOLDEN / "tokenizer"))
    )
    assert (manifest.vocab_size, manifest.context_token_id, manifest.template) == (
        457,
        5,
        "internvl2_5",
    )
    assert (manifest.capacity, manifest.alignment, manifest.tile_cap, manifest.seed) == (
        1024,
        8,
        20,
        5,
    )
    assert (
        manifest.image_size,
        manifest.features_per_tile,
        manifest.max_tiles,
        manifest.thumbnail,
    ) == (16, 4, 4, True)
    (source,) = manifest.sources
    assert (source.annotations, source.records, source.samples) == (str(data / "bad.jsonl"), 10, 4)
    assert manifest.rejects == dict.fromkeys(
        [
            "conversation",
            "malformed_json",
            "missing_image",
            "placeholder_count",
            "too_long",
            "unreadable_image",
        ],
        1,
    )


def test_the_manifest_has_what_training_needs_to_know_of_images_and_sources(data, tmp_path):  # noqa: F811
    tokenizer = shutil.copytree(GOLDEN / "tokenizer", tmp_path / "words")
    path = tokenizer / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|im_start|>"}))
    tiling = Tiling(
        tile_size=16,
        min_tiles=2,
        max_tiles=3,
        thumbnail=False,
        pixel_mean=(0.1, 0.2, 0.3),
        resample="bilinear",
    )
    [source] = single_source(data / "good.jsonl", data)
    source = dataclasses.replace(source, augment=True, repeat_time=2.0)
    options = dict(sources=(source,), tiling=tiling, pixel_std=(0.4, 0.5, 0.6))
    pack_dataset(_job(data, tmp_path / "out", tokenizer=str(tokenizer), **options))
    manifest = Reader(tmp_path / "out").manifest
    assert manifest.pad_token_id == load_tokenizer(tokenizer).pad_token_id > 0
    assert (manifest.min_tiles, manifest.max_tiles, manifest.thumbnail) == (2, 3, False)
    assert (manifest.pixel_mean, manifest.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert manifest.resample == "bilinear"
    [packed] = manifest.sources
    assert (packed.root, packed.repeat_time, packed.augment) == (str(data), 2.0, True)
    assert (packed.records, packed.samples) == (90, 180)
