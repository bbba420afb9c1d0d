"""A blend of datasets is a pure function of seed and position, keeps its shares in every batch, and
each dataset's own order.
"""

from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.sampling import BLOCK
from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.blend import BlendedDataset, BlendPlan, open_blend
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.loader import batches
from megavlm.data.loading.order import Plan
from megavlm.data.loading.step_packs import StepPacks
from megavlm.data.loading.weights import weight_of
from megavlm.data.store import manifest, reader
from tests.data.samples import make_dataset, run_over

PLANS = (Plan(num_packs=10, seed=1), Plan(num_packs=1000, seed=1), Plan(num_packs=7, seed=1))
BLEND = BlendPlan(plans=PLANS, weights=(0.6, 0.3, 0.1), seed=1)


def test_every_dataset_comes_in_its_own_order():
    assert BLEND.num_packs == 1017
    ids = BLEND.pack_ids(0, 3000)
    first = 0
    for plan in PLANS:
        own = ids[(ids >= first) & (ids < first + plan.num_packs)] - first
        assert own.tolist() == plan.pack_ids(0, len(own)).tolist() and len(own) > 250
        first += plan.num_packs


def test_shares_are_kept_in_every_batch_and_over_blocks():
    for start in (0, 640, BLOCK - 64, 5 * BLOCK + 128):
        datasets, _ = BLEND.split(np.arange(start, start + 640))
        shares = np.bincount(datasets, minlength=3) / 640
        assert np.abs(shares - [0.6, 0.3, 0.1]).max() < 0.01
    datasets, _ = BLEND.split(np.arange(BLOCK))
    assert np.abs(np.bincount(datasets) - np.array([0.6, 0.3, 0.1]) * BLOCK).max() < 1


def test_shares_are_told_with_the_names_of_the_datasets():
    assert BLEND.describe(("a", "b", "c")) == "60% from a, 30% from b, 10% from c"


def test_equal_remainders_go_to_the_first_dataset():
    """As decimal numbers: the sums of these floats differ between versions of Python."""
    plans = tuple(Plan(num_packs=9, seed=1) for _ in range(10))
    for weight in (0.1, 0.3, 0.7, 1.1):
        counts = BlendPlan(plans=plans, weights=(weight,) * 10).counts
        assert counts.tolist() == [6554] * 6 + [6553] * 4
    three = BlendPlan(plans=plans[:3], weights=(0.1, 0.2, 0.7), block=5).counts
    assert three.tolist() == [1, 1, 3]


def test_a_rank_s_share_has_all_datasets():
    for ranks in (2, 8, 64):
        for rank in (0, ranks - 1):
            datasets, _ = BLEND.split(np.arange(rank, 64 * 300, ranks))
            assert (
                np.abs(np.bincount(datasets, minlength=3) / len(datasets) - [0.6, 0.3, 0.1]).max()
                < 0.1
            )


def test_any_part_is_a_part_of_the_whole():
    whole = BLEND.pack_ids(BLOCK - 500, 1000)
    for start, count in ((0, 1), (63, 2), (499, 3), (500, 200), (999, 1)):
        assert (
            BLEND.pack_ids(BLOCK - 500 + start, count).tolist()
            == whole[start : start + count].tolist()
        )
    assert [int(BLEND.at(position)) for position in range(BLOCK - 500, BLOCK - 490)] == whole[
        :10
    ].tolist()
    assert BLEND.at(np.array([10**15])).shape == (1,)
    assert not np.array_equal(
        BlendPlan(plans=PLANS, weights=(6, 3, 1), seed=2).pack_ids(0, 200), BLEND.pack_ids(0, 200)
    )


@pytest.mark.parametrize(
    "weights",
    [
        (1.0, 1.0),
        (1.0, 0.0, 1.0),
        (1.0, -1.0, 1.0),
        (1.0, 1e-9, 1.0),
        (1.0, float("nan"), 1.0),
        (float("inf"), float("inf"), float("inf")),
    ],
)
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="--data.weights"):
        BlendPlan(plans=PLANS, weights=weights)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    names = []
    for seed, packs in ((0, 5), (1, 9)):
        folder = tmp_path_factory.mktemp("packs")
        make_dataset(folder, packs=packs, seed=seed)
        names.append(str(folder))
    return names


def test_a_blend_answers_as_its_datasets_do(folders):
    first, second = map(PackedDataset, folders)
    blend = BlendedDataset([first, second])
    assert len(blend) == 14 and blend.has_images and blend.manifest == first.manifest
    ids = np.array([13, 0, 4, 5])
    expected = [second.index[8], first.index[0], first.index[4], second.index[0]]
    assert blend.records(ids)["tokens"].tolist() == [int(record["tokens"]) for record in expected]
    assert weight_of(blend.records(ids), "square") == pytest.approx(
        sum(float(record["weight_square"]) for record in expected), rel=1e-12
    )
    batch = pickle.loads(pickle.dumps(blend)).batch(13, 77, BatchOptions(vision_layers=1, seed=3))
    other = second.batch(8, 77, BatchOptions(vision_layers=1, seed=3))
    assert (
        batch.pack_id == 13
        and torch.equal(batch.tokens, other.tokens)
        and torch.equal(batch.drop_path_draws, other.drop_path_draws)
    )
    assert torch.equal(batch.sources, other.sources + len(first.source_names))
    assert blend.origins(13) == second.origins(8)
    assert blend.file_of(13) == second.file_of(8)
    assert len(blend.some_records()) == 14


def test_the_loss_of_each_dataset_is_a_mean_of_its_own_with_its_weight(folders):
    blend = BlendedDataset([PackedDataset(name) for name in folders])
    ids = np.array([0, 7, 4, 13])
    records = blend.records(ids)
    records["weight_sample"] = [3, 5, 4, 1]
    divisors = blend.pack_weights(ids, records, "sample", (1.0, 2.0))
    assert divisors == {0: 7.0, 4: 7.0, 7: 3.0, 13: 3.0}
    records["weight_sample"] = [3, 0, 4, 0]  # without a label
    divisors = blend.pack_weights(ids, records, "sample", (1.0, 2.0))
    assert divisors == {0: 7.0, 4: 7.0, 7: 0.5, 13: 0.5}


def test_sources_are_told_apart_by_as_much_of_their_folders_as_is_needed(tmp_path: Path):
    for name in ("a", "b"):
        make_dataset(tmp_path / name / "packs", packs=1)
    a, b = (PackedDataset(tmp_path / name / "packs") for name in ("a", "b"))
    assert BlendedDataset([a]).source_names == ("packs/random",)
    whole = tuple(f"{tmp_path}/{name}/packs/random" for name in ("a", "b"))
    assert BlendedDataset([a, b]).source_names == whole
    twice = tuple(f"{tmp_path}/a/packs:{index}/random" for index in (0, 1))
    assert BlendedDataset([a, a]).source_names == twice


def test_a_blend_is_described_by_its_first_packs_with_images(folders, tmp_path: Path):
    make_dataset(tmp_path, packs=1, image_share=0.0)
    texts = str(tmp_path)
    for names, expected in (
        ([texts, *folders], folders[0]),
        (folders[::-1], folders[1]),
        ([texts, texts], texts),
        ([texts], texts),
    ):
        blend = BlendedDataset([PackedDataset(name) for name in names])
        assert str(blend.folder) == manifest.first_with_images(names) == expected
        assert blend.manifest == manifest.read_manifest(expected)
        assert blend.has_images == (expected != texts)


def test_a_blend_is_loaded_and_gone_on_with(folders):
    dataset, plan = open_blend(run_over(folders, seed=5, weights=(3.0, 1.0)))
    whole = [batch.pack_id for batch in batches(dataset, plan, range(40))]
    later = [
        batch.pack_id
        for batch in islice(batches(dataset, plan, range(23, 10**9, 1), workers=1), 17)
    ]
    assert whole == plan.pack_ids(0, 40).tolist() and later == whole[23:]
    assert sum(pack_id < 5 for pack_id in whole) in range(27, 34)
    even, order = open_blend(run_over(folders, seed=5))
    assert order.weights == (5.0, 9.0) and len(even) == 14
    alone, plan = open_blend(run_over(folders[:1], seed=5))
    assert isinstance(alone, PackedDataset) and isinstance(plan, Plan)


def test_what_a_blend_is_asked_for_reaches_its_plans_and_its_datasets_in_every_process(folders):
    order = dict(seed=5, shuffle=False, group=3)
    options = order | dict(weights=(1.0, 3.0), augment=("flip",), next_image=0.25)
    dataset, plan = open_blend(run_over(folders, **options))
    plans = (Plan(num_packs=5, **order), Plan(num_packs=9, **order))
    assert plan == BlendPlan(plans=plans, weights=(1.0, 3.0), seed=5, shuffle=False)
    for blend in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert [one.augment for one in blend.datasets] == [("flip",)] * 2
        assert [one.next_image for one in blend.datasets] == [0.25] * 2
        # All of them together may have as many files open as the process.
        assert len({id(one.reader.files.opened) for one in blend.datasets}) == 1


def test_a_group_of_a_dataset_is_its_share_of_a_steps_group(folders):
    order = dict(seed=5, group=16)
    for strata, groups in ((1, (16, 16)), (8, (12, 4))):
        _, plan = open_blend(run_over(folders, weights=(3.0, 1.0), strata=strata, **order))
        assert plan.plans == (
            Plan(num_packs=5, seed=5, group=groups[0], strata=strata),
            Plan(num_packs=9, seed=5, group=groups[1], strata=strata),
        )
    _, plan = open_blend(run_over(folders, weights=(99.0, 1.0), strata=8, **order))
    assert [one.group for one in plan.plans] == [16, 1]


def test_a_blend_is_opened_without_a_look_at_shards_and_parses_each_manifest_once(
    tmp_path, monkeypatch
):
    folders = [str(tmp_path / f"{number}") for number in range(6)]
    for folder in folders:
        make_dataset(Path(folder), packs=2, shard_bytes=1)
    make_dataset(tmp_path / "long", packs=3, shard_bytes=1)
    parsed = []
    parse = manifest.parse_manifest
    monkeypatch.setattr(
        manifest, "parse_manifest", lambda text, path: parsed.append(path) or parse(text, path)
    )
    looked_at = []
    monkeypatch.setattr(reader, "_check_size", lambda path, *sizes: looked_at.append(path))
    reader.check_shards([folders[0], tmp_path / "long", "s3://elsewhere", folders[1]])
    numbers = {folders[0]: 2, str(tmp_path / "long"): 3, folders[1]: 2}
    expected = [
        Path(folder) / f"packs-{number:05d}.bin"
        for folder, count in numbers.items()
        for number in range(count)
    ]
    assert looked_at == expected
    looked_at.clear()
    monkeypatch.setattr(reader, "CHECKED_SHARDS", 5)
    reader.check_shards(folders)
    spread = [str(tmp_path / name) for name in "01245"]
    assert [str(path.parent) for path in looked_at] == spread, "5 of 12 shards"
    monkeypatch.undo()
    (tmp_path / "5" / "packs-00001.bin").unlink()
    with pytest.raises(FileNotFoundError, match="5/packs-00001.bin: missing, but the manifest"):
        reader.check_shards(folders)
    open_blend(run_over(folders, seed=5))
    named = [*folders, str(tmp_path / "long")]
    assert sorted(parsed) == [f"{folder}/manifest.json" for folder in named]


def test_steps_look_many_datasets_up_together(folders, monkeypatch):
    dataset, plan = open_blend(run_over(folders, seed=5, weights=(3.0, 1.0)))
    looks = []
    found = BlendedDataset.records
    monkeypatch.setattr(
        BlendedDataset, "records", lambda self, ids: looks.append(len(ids)) or found(self, ids)
    )
    steps = StepPacks(dataset, plan, 6)
    for start in (*range(0, 300, 6), 1002, 1131, 6):  # forwards, then anywhere
        ids, records = steps.after(start)
        assert ids.tolist() == plan.pack_ids(start, 6).tolist()
        assert records.tolist() == found(dataset, ids).tolist()
    assert looks == [132] * 6, "64 packs of each dataset and a part of a step, not every step"


def test_samples_come_by_the_square_root_of_their_number(tmp_path):
    folders = [str(tmp_path / name) for name in ("large", "small")]
    make_dataset(Path(folders[0]), packs=64, samples_per_pack=4)
    make_dataset(Path(folders[1]), packs=16, samples_per_pack=1)
    dataset, plan = open_blend(run_over(folders, seed=5, sampling="sqrt"))
    ids = plan.pack_ids(0, 20_000)
    drawn = dataset.records(ids)["samples"]
    sizes = [one.manifest.totals.samples for one in dataset.datasets]
    found = drawn[ids < 64].sum() / drawn[ids >= 64].sum()
    assert found == pytest.approx((sizes[0] / sizes[1]) ** 0.5, rel=0.01)
    _, given = open_blend(run_over(folders, seed=5, weights=(1.0, 1.0), sampling="sqrt"))
    assert given.weights == (1.0, 1.0)
