"""Packs that cannot be read: a run that may leave them out trains as on packs without a loss in
their place, on all ranks alike, and resumes bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import socket
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megavlm.checkpoint.train_state import State
from megavlm.config.schema import Config, Experts
from megavlm.data.loading.batch import Batch
from megavlm.data.loading.blend import open_blend
from megavlm.data.store.index_format import FORM, INDEX_NAME, RECORD
from megavlm.data.store.pack_format import sections
from megavlm.data.store.reader import Reader
from megavlm.io.open_files import OpenFiles
from megavlm.train.metrics import Metrics
from megavlm.train.resume import index_sums, pack_counts, unreadable_packs
from megavlm.train.unreadable_packs import UnreadablePacks
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, build, make_packs
from tests.ranks.test_experts import MODEL
from tests.ranks.test_resume import (
    INTERLEAVED,
    PIPELINE,
    TENSOR,
    forget_the_end,
    losses,
    make_job,
    resume_bit_for_bit,
    run_job,
)

OPTION = "--data.max_unreadable_packs"
PACKS = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=PACKS, image_share=0.8, alignment=4, shard_bytes=4000)
    assert len(list(folder.glob("*.bin"))) > 1
    return folder


def rewrite(
    folder: Path,
    pack_id: int,
    change: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
    *,
    keeps_checksums: bool = False,
) -> None:
    """Change a pack on the disk: its record in the index, what stands before its images, and its
    encoded images, uint8; the checksums of the record are made right afterwards unless they are
    kept.
    """
    path = Path(Reader(folder).bin_path(pack_id))
    place = FORM.header_bytes + pack_id * RECORD.itemsize
    index = np.fromfile(folder / INDEX_NAME, np.uint8)
    record = index[place : place + RECORD.itemsize].view(RECORD)
    content = np.fromfile(path, np.uint8)
    block = content[int(record["offset"][0]) :][: int(record["bytes"][0])]
    head = sections_of(record).encoded
    change(record, block[:head], block[head:])
    if not keeps_checksums:
        record["crc_tokens"] = zlib.crc32(block[:head])
        record["crc_images"] = zlib.crc32(block[head:])
    index.tofile(folder / INDEX_NAME)
    content.tofile(path)


def sections_of(record: np.ndarray):
    return sections(*(int(record[name][0]) for name in ("tokens", "samples", "images")))


def damage_tokens(folder: Path, pack_id: int) -> None:
    def change(record: np.ndarray, head: np.ndarray, images: np.ndarray) -> None:
        head[5] ^= 1

    rewrite(folder, pack_id, change, keeps_checksums=True)


def damage_images(folder: Path, pack_id: int) -> None:
    def change(record: np.ndarray, head: np.ndarray, images: np.ndarray) -> None:
        images[20] ^= 1

    rewrite(folder, pack_id, change, keeps_checksums=True)


def spoil_last_picture(folder: Path, pack_id: int) -> None:
    """Make the last image of a pack one that no decoder takes, of right checksums."""

    def change(record: np.ndarray, head: np.ndarray, images: np.ndarray) -> None:
        images[-100:] = 0

    rewrite(folder, pack_id, change)


def remove_loss(folder: Path, pack_id: int) -> None:
    """Let no token of a pack be supervised."""

    def change(record: np.ndarray, head: np.ndarray, images: np.ndarray) -> None:
        layout = sections_of(record)
        head[layout.supervised : layout.lengths] = 0
        for name in ("supervised", "weight_token", "weight_sample", "weight_square"):
            record[name] = 0

    rewrite(folder, pack_id, change)


def with_images(folder: Path) -> list[int]:
    """Return the packs with at least two images, of which one may be another rank's."""
    return np.flatnonzero(Reader(folder).index["images"] > 1).tolist()


def copy_of(dataset: Path, folder: Path, change: Callable[[Path, int], None], *ids: int) -> Path:
    shutil.copytree(dataset, folder)
    for pack_id in ids:
        change(folder, pack_id)
    return folder


def tolerant(
    dataset: Path, save: Path, most: int, workers: int = 0, *, experts: bool = False, **settings
) -> Config:
    """Configure a run that may leave out ``most`` packs; with experts, whose balance has no loss,
    which is a mean over packs; other arguments as for ``make_job``.
    """
    config = make_job(dataset, save, global_batch_size=4, **settings)
    data = dataclasses.replace(config.data, max_unreadable_packs=most, workers=workers)
    model = MODEL if experts else TINY
    no_loss = Experts(balance_loss=0.0) if experts else Experts()
    return dataclasses.replace(config, data=data, architecture=model, experts=no_loss)


def run_shown(config: Config, broken: tuple[int, str] = (-1, "")) -> str:
    """Run a job and return what it printed; the disk of one rank fails whenever it reads a file.

    Args:
        config: the job.
        broken: the rank, and the file's name.
    """
    import torch.distributed as dist

    rank, name = broken
    read = OpenFiles.read

    def failing(self: OpenFiles, path: Path, start: int, end: int) -> bytes:
        if path.name == name and dist.get_rank() == rank:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(self, path, start, end)

    shown = io.StringIO()
    with mock.patch.object(OpenFiles, "read", failing), contextlib.redirect_stdout(shown):
        run_job(config)
    return shown.getvalue()


# By what is wrong with a pack: what makes it so, and what is told.
DAMAGES = {
    "tokens": (damage_tokens, "CRC32 of its tokens is"),
    "images": (damage_images, "CRC32 of its images is"),
    "picture": (spoil_last_picture, r"from the sample at random.jsonl:\d+, cannot be decoded"),
}
LAYOUTS = {
    "data": (2, dict()),
    "tensor": (2, TENSOR),
    "tiles": (2, TENSOR | dict(vision="data")),
    "context": (2, dict(context_parallel_size=2)),
    "pipeline": (2, PIPELINE),
    "both": (4, dict(tensor_model_parallel_size=2, vision="data")),
    "interleaved": (2, INTERLEAVED),
    "experts": (
        4,
        dict(
            experts=True,
            expert_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            layout="v*2,t|t",
        ),
    ),
}
CASES = [
    ("tokens", "tensor"),
    ("images", "data"),
    ("images", "pipeline"),
    ("picture", "tiles"),
    ("picture", "context"),
    ("picture", "both"),
    ("images", "interleaved"),
    ("images", "experts"),
]
# A process that loads packs imports torch for two seconds, so one case of each damage has some.
LOADED_BESIDE = [("tokens", "tensor"), ("images", "data"), ("picture", "tiles")]


@pytest.mark.parametrize(("damage", "layout"), CASES)
def test_a_step_goes_on_as_if_the_pack_had_no_loss(
    ranks: Pool, dataset: Path, tmp_path: Path, damage: str, layout: str
) -> None:
    world, parallel = LAYOUTS[layout]
    spoil, told = DAMAGES[damage]
    # The third of each of its steps, so not where it stands among those of a data-parallel rank.
    bad = with_images(dataset)[-1]
    workers = int((damage, layout) in LOADED_BESIDE)
    # The pack is in one of the first two steps, whose update the loss of the next one shows.
    parallel = dict(steps=3) | parallel
    clean = copy_of(dataset, tmp_path / "clean", remove_loss, bad)
    broken = copy_of(dataset, tmp_path / "broken", spoil, bad)
    ranks.run(run_job, world, tolerant(clean, tmp_path / "expected", 0, **parallel))
    config = tolerant(broken, tmp_path / "run", 1, workers, **parallel)
    shown = "".join(ranks.run(run_shown, world, config))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "expected"), rel=1e-6)
    assert len(re.findall(f"WARNING: step .*{told}", shown)) == 1, shown
    assert f"pack {bad} of " in shown and f"1 of at most 1 ({OPTION})" in shown
    assert shown.count("WARNING: 1 packs could not be read and were left out") == 1
    if damage == "tokens":  # which no rank can read
        assert f"({OPTION}): rank 0 ({socket.gethostname()}): " in shown


def seen(save: Path) -> tuple[list[int], list[int]]:
    """Return how many packs each record of a run says could not be read, and which ones its last
    checkpoint names.
    """
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    last = sorted(save.glob("step_*"))[-1]
    state = json.loads((last / "state.json").read_text())
    return [line["unreadable_packs"] for line in lines if "loss" in line], state["unreadable_packs"]


def test_each_pack_counts_once_and_a_run_resumes_bit_for_bit(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    """Of 20 packs in 5 steps each of the 8 comes two or three times."""
    bad = with_images(dataset)[:2]
    broken = copy_of(dataset, tmp_path / "broken", damage_images, *bad)

    def job(save: Path) -> Config:
        return tolerant(broken, save, 2, tensor_model_parallel_size=2, vision="data")

    resume_bit_for_bit(ranks, 2, job, tmp_path)
    counts, kept = seen(tmp_path / "whole")
    assert counts == sorted(counts) and counts[-1] == 2 and kept == bad
    # What comes again after the checkpoint is known and not told of.
    again, kept = seen(tmp_path / "killed")
    assert again == counts[3:] and kept == bad


def test_packs_of_a_folder_that_was_packed_again_are_others(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    """The pack that could not be read before is gone, and does not count."""
    packs = shutil.copytree(dataset, tmp_path / "packs")
    config = tolerant(packs, tmp_path / "killed", 1)
    bad = int(open_blend(config)[1].at(np.array(12)))  # the first after the checkpoint of step 3
    damage_tokens(packs, (bad + 1) % PACKS)
    ranks.run(run_job, 1, tolerant(packs, tmp_path / "whole", 1))
    forget_the_end(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(packs)
    make_packs(packs, packs=PACKS, alignment=4, seed=1)
    damage_tokens(packs, bad)
    [shown] = ranks.run(run_shown, 1, config)
    assert f"step 4: pack {bad} of " in shown and f"1 of at most 1 ({OPTION})" in shown
    assert seen(tmp_path / "killed") == ([1, 1], [bad])


def test_packs_of_other_folders_than_the_one_packed_again_stay_known(
    dataset: Path, tmp_path: Path
) -> None:
    make_packs(tmp_path / "second", packs=3)
    config = tolerant(dataset, "", 9)
    folders = f"{dataset},{tmp_path / 'second'},{dataset}"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=folders))
    now = index_sums(config)
    state = State(
        packs=pack_counts(config), indexes=(now[0], 1, now[2]), unreadable_packs=(0, 7, 8, 10, 11)
    )
    assert unreadable_packs(state, now) == (0, 7, 11)


def kept_of_a_step(config: Config) -> list[bool]:
    """Return which packs of a step are in memory while the second one is trained on."""
    job = build(config)
    ids = np.arange(config.training.global_batch_size)
    made: list[weakref.ref] = []

    def loaded() -> Iterator[Batch]:
        for pack_id in ids.tolist():
            batch = job.train.batch(pack_id, pack_id, job.training_options)
            made.append(weakref.ref(batch.tokens))
            yield batch
            del batch

    with Metrics(config, job.groups.is_writer) as metrics:
        unreadable = UnreadablePacks(job, State(), metrics)
        packs, _ = unreadable.replace(State(), ids, job.train.records(ids), loaded())
    pack = next(packs)
    pack = next(packs)
    kept = [tokens() is not None for tokens in made]
    del pack
    return kept


def test_packs_of_a_step_are_let_go_one_by_one(ranks: Pool, dataset: Path, tmp_path: Path) -> None:
    [kept] = ranks.run(kept_of_a_step, 1, tolerant(dataset, "", 1))
    assert kept == [False, True, True, True]


def test_one_pack_too_many_ends_the_run_on_all_ranks(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    bad = with_images(dataset)[:2]
    broken = copy_of(dataset, tmp_path / "broken", damage_images, *bad)
    told = (
        r"StepError: step \d: pack \d of .*.bin cannot be read \(rank .*; with it there are 2 such"
        rf" packs, more than {OPTION} 1; mend the data"
    )
    with pytest.raises(AssertionError, match=told) as caught:
        ranks.run(run_shown, 2, tolerant(broken, tmp_path / "run", 1, **PIPELINE))
    assert "CRC32 of its images is" in str(caught.value)


def test_a_limit_that_is_passed_already_ends_a_run_that_resumes(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    first = int(open_blend(tolerant(dataset, "", 1))[1].at(np.array(12)))  # after the checkpoint
    packs = copy_of(dataset, tmp_path / "packs", damage_tokens, first, (first + 1) % PACKS)
    ranks.run(run_job, 1, tolerant(packs, tmp_path / "whole", 2))
    forget_the_end(tmp_path / "whole", tmp_path / "killed")
    told = f"step 4: pack {first} of .* with it there are 2 such packs, more than {OPTION} 1;"
    with pytest.raises(AssertionError, match=told):
        ranks.run(run_job, 1, tolerant(packs, tmp_path / "killed", 1))


def test_a_step_of_unreadable_packs_alone_ends_the_run(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    broken = copy_of(dataset, tmp_path / "broken", damage_tokens, *range(PACKS))
    with pytest.raises(AssertionError, match="StepError: step 1: none of its packs can be read"):
        ranks.run(run_shown, 1, tolerant(broken, tmp_path / "run", PACKS))


def test_a_disk_that_fails_on_one_rank_leaves_its_packs_out_on_all(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    """The second pipeline stage cannot read a shard at all, and the first can."""
    reader = Reader(dataset)
    name = Path(reader.bin_path(PACKS - 1)).name
    lost = [pack for pack in range(PACKS) if Path(reader.bin_path(pack)).name == name]
    clean = copy_of(dataset, tmp_path / "clean", remove_loss, *lost)
    ranks.run(run_job, 2, tolerant(clean, tmp_path / "expected", 0, **PIPELINE))
    config = tolerant(dataset, tmp_path / "run", len(lost), **PIPELINE)
    shown = "".join(ranks.run(run_shown, 2, config, (1, name)))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "expected"), rel=1e-6)
    assert len(re.findall(rf"rank 1 .*: pack \d: .*Input/output error: .*{name}", shown)) == len(
        lost
    )
    assert seen(tmp_path / "run")[1] == lost


def test_the_first_such_pack_ends_a_run_that_may_not_leave_it_out(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    broken = copy_of(dataset, tmp_path / "broken", damage_tokens, *range(PACKS))
    with pytest.raises(
        AssertionError,
        match=rf"ReadError: .*CRC32 .*; to train on without up to 10 such packs: {OPTION} 10",
    ):
        ranks.run(run_shown, 1, tolerant(broken, tmp_path / "run", 0))
