"""The loss of each source: right against a sum by hand, and the same at every layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.schema import Checkpoint, Logging
from megavlm.data.loading.batch import BatchOptions
from tests.data.samples import make_dataset
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, build, config_for
from tests.ranks.test_resume import run_job

SIZES = dict(
    vocab_size=199,
    context_token_id=7,
    tile_size=16,
    features_per_tile=TINY.features_per_tile,
    capacity=128,
    alignment=4,
)
LAYOUTS = {
    "one": (1, {}),
    "tp2 sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline_model_parallel_size=2, layout="v*2|v,c,t*3,h")),
    "pp2 vp2": (
        2,
        dict(
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            layout="v*2|v|c,t*2|t,h",
        ),
    ),
    "dp2": (2, {}),
    "cp2 dp2": (4, dict(context_parallel_size=2)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two packed datasets, of two and of three sources; the same name is in both."""
    parent = tmp_path_factory.mktemp("packs")
    for place, sources in enumerate((("chats", "scans"), ("scans", "web", "web"))):
        make_dataset(
            parent / "ab"[place],
            packs=9,
            samples_per_pack=4,
            image_share=0.5,
            seed=place,
            sources=sources,
            **SIZES,
        )
    return [parent / "a", parent / "b"]


def run_steps(config) -> tuple[dict, dict, list[float]]:
    """Two steps of a job on this rank, without updates: the report of each source, and the
    losses.
    """
    from megavlm.data.loading.blend import open_blend
    from megavlm.data.loading.weights import weight_of
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.source_losses import SourceLosses
    from megavlm.train.step import run_packs

    job = build(
        dataclasses.replace(
            config, data=dataclasses.replace(config.data, train=config.data.train_folders[0])
        )
    )
    data = config.data
    size = 6
    drawn = dataclasses.replace(data, weights=(2.0, 1.0), group=1)
    training = dataclasses.replace(config.training, seed=1)
    packs, order = open_blend(dataclasses.replace(config, data=drawn, training=training))
    by_source = SourceLosses(packs.source_names, job.backend.device)
    losses = []
    world = job.groups.data_size
    for step in range(2):
        positions = range(step * size + job.groups.data_rank, (step + 1) * size, world)
        options = BatchOptions(
            reduction=data.loss_reduction, vision_layers=3, rank_slice=job.groups.rank_slice
        )
        arriving = iter(
            [packs.batch(int(order.at(position)), position, options) for position in positions]
        )
        weight = weight_of(packs.records(order.pack_ids(step * size, size)), data.loss_reduction)
        loss = run_packs(
            job.ddp_chunks,
            Microbatches(arriving, size // world, weight),
            job.backend,
            forward_only=True,
            meters=(by_source,),
        )
        losses.append(float(job.groups.sum_over_data(loss)))
    means, parts = by_source.report(job.groups, 2).values()
    assert by_source.report(job.groups) == {"loss": {}, "loss_part": {}}
    return means, parts, losses if job.groups.is_writer else []


@pytest.mark.parametrize("reduction", ["square", *(["token"] if asks_for_all() else [])])
def test_losses_of_sources_add_up_to_the_loss_and_are_the_same_at_every_layout(
    ranks: Pool, folders: list[Path], reduction: str
) -> None:
    whole = None
    for name, (world, layout) in LAYOUTS.items():
        config = config_for(folders[0], **layout)
        data = dataclasses.replace(
            config.data, train=",".join(map(str, folders)), loss_reduction=reduction
        )
        answers = ranks.run(run_steps, world, dataclasses.replace(config, data=data))
        [(means, parts, losses)] = [answer for answer in answers if answer[2]]
        assert list(means) == list(parts) == ["a/chats", "a/scans", "b/scans", "b/web"], name
        assert sum(parts.values()) == pytest.approx(np.mean(losses), rel=1e-6), name
        whole = whole or (means, parts)
        for mine, expected in zip((means, parts), whole, strict=True):
            assert mine == (
                expected if name in ("pp2", "pp2 vp2", "dp2") else pytest.approx(expected, rel=1e-5)
            ), name
        if world == 2 and "pipeline_model_parallel_size" in layout:
            assert (
                sum(bool(answer[0]) for answer in answers) == 1
            )  # the chunk that knows no loss reports none


def losses_by_hand(config) -> dict[str, float]:
    """Mean loss of each source's supervised tokens of all packs, in plain Python."""
    job = build(config)
    sums: dict[str, list[float]] = {}
    for pack in range(len(job.train)):
        batch = job.train.batch(pack, pack, BatchOptions(reduction="square", vision_layers=3))
        stored = job.train.reader.read(pack)
        ends = batch.sample_ends.tolist()
        losses = job.chunks[0](batch).tolist()
        for sample, source in enumerate(stored.provenance["source"].tolist()):
            name = job.train.manifest.sources[source].name
            places = [
                place
                for place in range(ends[sample], ends[sample + 1])
                if batch.loss_weights[place] > 0
            ]
            sums.setdefault(name, []).extend(losses[place] for place in places)
    return {name: float(np.mean(values)) for name, values in sums.items()}


def test_a_run_reports_the_losses_that_a_sum_by_hand_gives(
    ranks: Pool, folders: list[Path], tmp_path: Path
) -> None:
    config = config_for(folders[1], lr=1e-3, steps=3, global_batch_size=9, trainable=("language",))
    save = Checkpoint(save=str(tmp_path / "run"), save_interval=0)
    data = dataclasses.replace(config.data, valid=str(folders[0]))
    job = dataclasses.replace(config, data=data, checkpoint=save, logging=Logging(interval=1))
    ranks.run(run_job, 1, job)
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    [first, *_], [valid, *_] = (
        [record for record in records if key in record] for key in ("loss", "valid_loss")
    )
    for record, key, folder in ((first, "loss", folders[1]), (valid, "valid_loss", folders[0])):
        [expected] = ranks.run(
            losses_by_hand,
            1,
            dataclasses.replace(config, data=dataclasses.replace(data, train=str(folder))),
        )
        assert {name: record[f"{key}/{name}"] for name in expected} == pytest.approx(
            expected, rel=1e-5
        )
    assert sum(
        value for name, value in first.items() if name.startswith("loss_part/")
    ) == pytest.approx(first["loss"], rel=1e-5)
