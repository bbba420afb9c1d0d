"""Preferences: every layout trains like one process, a run resumes bit for bit, and the
probabilities of the reference are computed once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from megavlm.checkpoint import lock, train_state
from megavlm.config.evaluation import Eval
from megavlm.config.lora import Lora
from megavlm.config.preference import Preference
from megavlm.config.recipes import recipe
from megavlm.config.schema import Architecture, Checkpoint, Config
from megavlm.data.images.tiling import Tiling
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.packing.job import Job, pack_dataset
from megavlm.data.records.meta_file import read_sources
from megavlm.data.store.manifest import read_manifest
from megavlm.data.store.reference import Reference, reference_folder
from megavlm.train.inspection import find_start
from megavlm.train.reference import ReferenceError
from megavlm.train.reference_pass import _find_or_lock as find_or_lock
from megavlm.train.reference_pass import _refuse_strange as refuse_strange
from megavlm.train.reference_pass import _wait_for as wait_for
from tests.data.preference_packs import make_preferences, make_reference
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, make_packs
from tests.ranks.test_resume import (
    INTERLEAVED,
    LAST,
    PIPELINE,
    STEPS,
    TENSOR,
    forget_the_end,
    make_job,
    resume_bit_for_bit,
    run_job,
)
from tests.ranks.test_whole_way import COLOURS, TOKENIZER, agreement, whole_config

MODEL = dataclasses.replace(TINY, objective="preference")
FIGURES = (
    "loss",
    "grad_norm",
    "valid_loss",
    "dpo_loss",
    "bco_loss",
    "sft_loss",
    "reward_chosen",
    "reward_rejected",
    "reward_accuracy",
    "reward_shift",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packs")
    make_preferences(root / "train", packs=7, alignment=4)
    make_preferences(root / "valid", packs=5, alignment=4, seed=1)
    return root / "train"


def configure(dataset: Path, save: Path, **settings: Any) -> Config:
    """Configure a run of a few steps with large rewards, validated at the start and the end."""
    settings = dict(global_batch_size=6, eval_interval=5, lr=1e-2) | settings
    config = make_job(dataset, save, **settings)
    data = recipe("internvl").data("mpo")
    data = dataclasses.replace(
        data, train=str(dataset), valid=str(dataset.parent / "valid"), workers=0
    )
    return dataclasses.replace(config, stage="mpo", architecture=MODEL, data=data)


def figures(save: Path) -> dict[str, list[float]]:
    """Read what a run has recorded."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines if name in line] for name in FIGURES}


LAYOUTS = {
    "tp2 sp": (2, TENSOR | dict(sequence_parallel=True)),
    "pp2": (2, PIPELINE),
    "cp2": (2, dict(context_parallel_size=2)),
    "dp3": (3, {}),
}
MORE = {
    "cp2 tp2": (4, TENSOR | dict(context_parallel_size=2)),
    "interleaved": (2, INTERLEAVED),
    "pp2 dp3": (6, PIPELINE),
}


@pytest.fixture(scope="module")
def one_process(ranks: Pool, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("one") / "run"
    ranks.run(run_job, 1, configure(dataset, save))
    return save


@pytest.mark.parametrize("name", LAYOUTS | (MORE if asks_for_all() else {}))
def test_every_layout_trains_like_one_process(
    ranks: Pool, dataset: Path, one_process: Path, tmp_path: Path, name: str
) -> None:
    world, layout = (LAYOUTS | MORE)[name]
    ranks.run(run_job, world, configure(dataset, tmp_path / "run", save_interval=0, **layout))
    expected = figures(one_process)
    found = figures(tmp_path / "run")
    for figure, values in expected.items():
        assert len(values) > 1, figure
        assert found[figure] == pytest.approx(values, rel=1e-5, abs=1e-6), figure
    assert expected["reward_accuracy"][-1] > 0.5
    assert abs(expected["reward_shift"][-1]) > 1e-3


def test_resuming_is_bit_for_bit_with_the_mean_of_the_rewards(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    """The mean is on the last pipeline stage alone."""
    saved = resume_bit_for_bit(
        ranks, 2, lambda save: configure(dataset, save, **PIPELINE), tmp_path
    )
    total, count = saved["objective.rewards"].tolist()
    assert count == STEPS * 6 * 2 and total
    began_with = train_state.read(tmp_path / "killed" / LAST).reference
    assert began_with == Reference(folder_of(tmp_path / "killed", dataset)).facts.weights


def test_a_checkpoint_goes_on_at_another_layout(
    ranks: Pool, dataset: Path, one_process: Path, tmp_path: Path
) -> None:
    forget_the_end(one_process, tmp_path / "killed")
    config = configure(dataset, tmp_path / "killed", **PIPELINE | dict(context_parallel_size=2))
    ranks.run(run_job, 4, config)
    expected = figures(one_process)
    for name, values in figures(tmp_path / "killed").items():
        assert values == pytest.approx(expected[name][-len(values) :], rel=1e-5, abs=1e-6), name


def stop_after_a_block(config: Config) -> int:
    """Run a job that has been asked to stop, which it notices after a pack of each rank."""
    from megavlm.parallel import backend
    from megavlm.train import reference_pass
    from megavlm.train.inspection import inspect
    from megavlm.train.run_job import run_job
    from megavlm.train.stop_signal import StopRequest

    start = inspect(config, max(config.parallel.model_parallel_size, dist.get_world_size()))
    with mock.patch.object(reference_pass, "_PACKS_OF_BLOCK", 1), StopRequest() as stop:
        stop._remember(signal.SIGTERM, None)
        return run_job(config, backend.start(5), start, None, stop).step


def test_a_pass_that_was_stopped_goes_on_at_another_layout(
    ranks: Pool, dataset: Path, one_process: Path, tmp_path: Path
) -> None:
    assert ranks.run(stop_after_a_block, 2, configure(dataset, tmp_path / "run")) == [0, 0]
    place = folder_of(tmp_path / "run", dataset)
    begun = (place / "logprobs.bin").read_bytes()
    assert len(begun) == 2 * 2 * 8 and not (place / "reference.json").exists()
    ranks.run(run_job, 2, configure(dataset, tmp_path / "run", **PIPELINE))
    assert (place / "logprobs.bin").read_bytes()[: len(begun)] == begun
    whole = np.fromfile(folder_of(one_process, dataset) / "logprobs.bin", np.float32)
    found = np.fromfile(place / "logprobs.bin", np.float32)
    assert found == pytest.approx(whole, rel=1e-5) and len(whole) == 2 * 7 * 2
    assert figures(tmp_path / "run")["loss"] == pytest.approx(
        figures(one_process)["loss"], rel=1e-5
    )


def folder_of(save: Path, dataset: Path) -> Path:
    return reference_folder(save / "reference", dataset, read_manifest(dataset))


def test_probabilities_are_computed_once_for_the_same_weights(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    """Those of a checkpoint of stage 2 do for runs with other settings, also with LoRA."""
    packs = tmp_path / "plain"
    make_packs(packs, packs=4)
    ranks.run(run_job, 1, make_job(packs, tmp_path / "stage2", steps=1))

    def after(
        save: str, model: Architecture = MODEL, load: str = "stage2", **files: bool
    ) -> Config:
        config = configure(dataset, tmp_path / save, load=tmp_path / load, steps=2, **files)
        data = dataclasses.replace(config.data, reference=str(tmp_path / "of stage 2"))
        return dataclasses.replace(config, data=data, architecture=model)

    ranks.run(run_job, 1, after("first"))
    place = reference_folder(tmp_path / "of stage 2", dataset, read_manifest(dataset))
    facts = Reference(place).facts
    assert facts.weights.startswith("stage 2, step 1, checksum ")
    written = (place / "logprobs.bin").stat()
    adapters = dataclasses.replace(MODEL, lora=Lora(rank=2))
    other = dataclasses.replace(adapters, preference=Preference(beta=0.5, bco=0.0))
    (tmp_path / "stage2").rename(tmp_path / "moved")
    ranks.run(run_job, 1, after("second", other, "moved"))
    assert (place / "logprobs.bin").stat() == written
    assert figures(tmp_path / "second")["reward_accuracy"]
    # Adapters begin as nothing, so a pass with them gives the same.
    shutil.rmtree(place)
    ranks.run(run_job, 1, after("third", other, "moved"))
    again = Reference(place)
    assert again.facts == facts
    with pytest.raises(
        AssertionError, match=r"another reference model \(stage 2, step 1, checksum"
    ):
        ranks.run(run_job, 1, after("fourth", load="first", weights_only=True))


def test_a_run_that_goes_on_needs_its_reference_whole(
    ranks: Pool, dataset: Path, one_process: Path, tmp_path: Path
) -> None:
    forget_the_end(one_process, tmp_path / "killed")
    place = folder_of(tmp_path / "killed", dataset)
    content = bytearray((place / "logprobs.bin").read_bytes())
    content[5] ^= 1
    (place / "logprobs.bin").write_bytes(content)
    with pytest.raises(AssertionError, match=r"logprobs\.bin: damaged"):
        ranks.run(run_job, 1, configure(dataset, tmp_path / "killed"))
    shutil.rmtree(place)
    config = configure(dataset, tmp_path / "killed")
    with pytest.raises(ReferenceError, match="does not start from the reference's weights"):
        find_start(config)  # before anything is built, and by --check


def test_a_pack_that_cannot_be_read_comes_without_an_advice_that_is_refused(
    ranks: Pool, dataset: Path, one_process: Path, tmp_path: Path
) -> None:
    packs = tmp_path / "packs" / "train"
    shutil.copytree(dataset.parent, packs.parent)
    for path in packs.glob("*.bin"):
        path.write_bytes(bytes(path.stat().st_size))
    config = configure(packs, tmp_path / "run", eval_interval=0)
    data = dataclasses.replace(config.data, reference=str(one_process / "reference"))
    with pytest.raises(AssertionError, match="CRC32") as told:
        ranks.run(run_job, 1, dataclasses.replace(config, data=data))
    assert "max_unreadable_packs" not in str(told.value)


def test_one_run_at_a_time_computes(ranks: Pool, dataset: Path, tmp_path: Path) -> None:
    """Another one that names the same folder would write between its blocks."""
    config = configure(dataset, tmp_path / "run", steps=1)
    place = folder_of(tmp_path / "run", dataset)
    with (
        lock.held(place),
        pytest.raises(AssertionError, match=r"--data\.reference .* another run .* or wait until"),
    ):
        ranks.run(run_job, 2, config)
    assert not place.exists()
    ranks.run(run_job, 2, config)
    names = sorted(path.name for path in place.iterdir())
    assert names == ["logprobs.bin", "reference.json", "starts.bin"]


def test_what_another_run_completes_meanwhile_is_taken(dataset: Path, tmp_path: Path) -> None:
    config = configure(dataset, tmp_path / "run")
    place = folder_of(tmp_path / "run", dataset)

    @contextlib.contextmanager
    def completed(*args: Any, **options: Any) -> Iterator[None]:
        make_reference(tmp_path / "run" / "reference", dataset)
        yield

    make_reference(tmp_path / "other", dataset)
    facts = Reference(reference_folder(tmp_path / "other", dataset, read_manifest(dataset))).facts
    with mock.patch.object(lock, "held", completed), contextlib.ExitStack() as stack:
        assert find_or_lock(stack, config, None, place, facts) == facts


def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ReferenceError, match=r"pairs-1: .* does not see .*--data\.reference"):
        wait_for(tmp_path / "pairs-1", patience=0.0)


def test_an_answer_without_a_probability_is_named(dataset: Path) -> None:
    logprobs = np.full((4, 2), -3.0, np.float32)
    logprobs[3, 1] = np.nan
    with pytest.raises(ReferenceError, match=r"random\.jsonl:8 \(pack 3\)"):
        refuse_strange(PackedDataset(dataset), range(2, 4), logprobs)


def write_colours(folder: Path) -> Path:
    """Write images of one colour, with a right and a wrong name of it."""
    lines = []
    for number in range(24):
        name, other = np.random.default_rng(number).permutation(list(COLOURS))[:2].tolist()
        Image.new("RGB", (16 * (1 + number % 3), 16), COLOURS[name]).save(folder / f"{number}.png")
        answers = {"chosen": f"It is {name}.", "rejected": f"It is {other}."}
        lines.append(json.dumps({"image": f"{number}.png", "question": "What is it?"} | answers))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "records.jsonl"


def test_from_records_to_an_export_that_transformers_answers_with(
    ranks: Pool, tmp_path: Path
) -> None:
    packs = tmp_path / "packs"
    pack_dataset(
        Job(
            sources=read_sources(None, str(write_colours(tmp_path)), str(tmp_path)),
            tokenizer=str(TOKENIZER),
            out=str(packs),
            capacity=512,
            features_per_tile=4,
            tiling=Tiling(tile_size=16, max_tiles=4),
            preferences=True,
        )
    )
    assert read_manifest(packs).totals.images == 24
    before = whole_config(packs, tmp_path / "before", export_hf=str(tmp_path / "first"))
    data = dataclasses.replace(recipe("internvl").data("mpo"), train=str(packs), valid=str(packs))
    model = dataclasses.replace(before.architecture, objective="preference")
    training = dataclasses.replace(before.training, steps=12, eval_interval=12)
    first = dataclasses.replace(
        before, stage="mpo", data=dataclasses.replace(data, workers=0), architecture=model
    )
    ranks.run(
        run_job, 1, dataclasses.replace(first, training=dataclasses.replace(training, steps=1))
    )
    files = Checkpoint(
        save=str(tmp_path / "run"), load=str(tmp_path / "first"), export_hf=str(tmp_path / "hf")
    )
    config = dataclasses.replace(first, training=training, checkpoint=files)
    ranks.run(run_job, 2, config)
    [found] = ranks.run(agreement, 1, tmp_path / "run", tmp_path / "hf", packs)
    assert found.samples >= 4 and found.max_abs_difference <= 1e-4 and not found.failures()
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    held_out = [line for line in lines if "valid_loss" in line]
    assert held_out[0]["valid_reward_accuracy"] == 0 < held_out[-1]["valid_reward_accuracy"]
    assert str(tmp_path / "first") in Reference(folder_of(tmp_path / "run", packs)).facts.weights
    answer_questions(ranks, tmp_path, config)


def answer_questions(ranks: Pool, folder: Path, trained: Config) -> None:
    """Answer questions with a run, which asks for no probabilities of its training packs."""
    question = {"image": "1.png", "question": "What is it?", "answer": "It is red."}
    (folder / "exam.jsonl").write_text(json.dumps(question) + "\n")
    config = dataclasses.replace(
        trained,
        data=dataclasses.replace(trained.data, valid=""),
        eval=Eval(only=True, tasks=(str(folder / "exam.jsonl"),)),
        checkpoint=Checkpoint(save=str(folder / "answered"), load=str(folder / "run")),
    )
    ranks.run(run_job, 1, config)
    [line] = (folder / "answered" / "metrics.jsonl").read_text().splitlines()
    assert "exam/accuracy" in json.loads(line)
