"""The manifest goes through JSON unchanged, and what is wrong with one is said."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megavlm.config.tiling import VideoPixels
from megavlm.data.store.manifest import FORMAT_VERSION, Level, Manifest, Source, read_manifest

MANIFEST = Manifest(
    tokenizer_fingerprint="0123",
    vocab_size=512,
    context_token_id=500,
    template="internvl2_5",
    system_message="Sei höflich.\n",
    image_size=448,
    features_per_tile=256,
    capacity=4096,
    tile_cap=13,
    sources=(Source(name="a", annotations="a.jsonl", records=3, samples=2, repeat_time=0.5),),
    levels=(Level(packs=2, easiest=-0.5, hardest=3.0),),
    tiling="anyres",
    grids=((2, 1), (1, 3)),
    rejects={"image missing": 1},
)


def test_round_trip(tmp_path):
    MANIFEST.write(tmp_path)
    assert read_manifest(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_manifest_from_before_grids_is_read(tmp_path):
    facts = json.loads(MANIFEST.to_json()) | {"version": 5}
    del facts["grids"]
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    assert read_manifest(tmp_path).grids == ()


def test_a_manifest_from_before_preferences_is_read(tmp_path):
    """As one of a version that has them is refused by an older program, which reads none newer."""
    facts = json.loads(MANIFEST.to_json())
    assert facts["preferences"] is False
    del facts["preferences"]
    (tmp_path / "manifest.json").write_text(json.dumps(facts | {"version": 7}))
    assert read_manifest(tmp_path) == MANIFEST
    dataclasses.replace(MANIFEST, preferences=True).write(tmp_path)
    assert read_manifest(tmp_path).preferences


def test_a_manifest_from_before_images_of_their_own_size_is_read(tmp_path):
    facts = json.loads(MANIFEST.to_json())
    assert (facts["min_pixels"], facts["max_pixels"], facts["version"]) == (3136, 1003520, 10)
    del facts["min_pixels"], facts["max_pixels"]
    (tmp_path / "manifest.json").write_text(json.dumps(facts | {"version": 8}))
    assert read_manifest(tmp_path) == MANIFEST
    dataclasses.replace(MANIFEST, max_pixels=784).write(tmp_path)
    assert read_manifest(tmp_path).max_pixels == 784


def test_a_manifest_from_before_frames_of_their_own_size_is_read(tmp_path):
    facts = json.loads(MANIFEST.to_json())
    assert facts["video"] == {"least": 0, "most": 0, "total": 0}
    del facts["video"]
    (tmp_path / "manifest.json").write_text(json.dumps(facts | {"version": 9}))
    assert read_manifest(tmp_path) == MANIFEST
    bounds = VideoPixels(least=784, most=7840, total=78400)
    dataclasses.replace(MANIFEST, video=bounds).write(tmp_path)
    assert read_manifest(tmp_path).video == bounds


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest.json: missing.*packing did not end"):
        read_manifest(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": FORMAT_VERSION + 1},
            f"format version {FORMAT_VERSION + 1}, but this megavlm reads versions 2, 3, 4",
        ),
        ({"format": "other"}, "not the manifest of a packed dataset"),
        ({"capacity": None}, r"facts missing: \['capacity'\]"),
        ({"capacity": "64"}, "capacity: '64' is no int"),
        ({"pixel_mean": [0.5]}, r"pixel_mean: \[0.5\] is no tuple"),
        ({"sources": [5]}, r"sources\[0\]: 5 is no Source"),
        ({"colour": 1}, r"facts unknown: \['colour'\]"),
        ({"sources": [{"name": "a"}]}, r"sources\[0\]: facts missing: \['annotations'\]"),
    ],
)
def test_wrong_facts(tmp_path, change, message):
    facts = json.loads(MANIFEST.to_json()) | change
    facts = {name: value for name, value in facts.items() if value is not None}
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(tmp_path)
    assert str(tmp_path / "manifest.json") in str(caught.value)


def test_not_json(tmp_path):
    (tmp_path / "manifest.json").write_text(MANIFEST.to_json()[:100])
    with pytest.raises(ValueError, match="manifest.json: not JSON"):
        read_manifest(tmp_path)
