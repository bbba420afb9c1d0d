"""The benchmark of what grows with ranks and data, at small sizes."""

from __future__ import annotations

from pathlib import Path

from tools.benchmark import scale_data, scale_ranks


def test_what_ranks_post_and_read_does_not_grow_with_them(tmp_path: Path) -> None:
    few, many = (scale_ranks.start(ranks) for ranks in (2, 6))
    assert many["posted_mb"] < 1.05 * few["posted_mb"]
    assert many["posted_mb_if_each_posted_all"] > 2.5 * few["posted_mb_if_each_posted_all"]
    few, many = (scale_ranks.loading(ranks) for ranks in (2, 64))
    assert few["read_gb"] == many["read_gb"] > 20 * many["largest_share_gb"]
    assert many["read_gb_if_each_read_all"] == 64 * many["read_gb"]
    found = scale_ranks.folder(3, tmp_path)
    assert found["files"] == 6 and found["finding_s"] > 0


def test_packs_are_looked_up_at_small_sizes(tmp_path: Path) -> None:
    blend = scale_data.blend(3, 8, tmp_path)
    assert blend["packs_a_step"] == 8 and blend["step_s"] > 0
    index = scale_data.large_index(10_000, 8, tmp_path)
    assert index["index_gb"] == 10_000 * 96 / 1e9 and index["step_in_epoch_4_s_any"] > 0
    assert scale_data.manifests(20)["bytes"] > 1000
    assert scale_data.sources(10, tmp_path)["drawing_s"] > 0
    assert not list(tmp_path.glob("tmp*/packs"))
