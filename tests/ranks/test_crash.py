"""``kill -9`` at random moments, also inside a save, of one rank or of all: torchrun starts them
again, and the end is the same.

``MEGAVLM_CRASHES=20`` kills each run twenty times, also one that saves beside training; the
default is one kill, since each start costs seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megavlm.config.cli import to_yaml
from megavlm.config.schema import Checkpoint, Config, Logging
from tests.data.samples import make_dataset
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for
from tests.ranks.test_resume import run_job

ROOT = Path(__file__).parents[2]
CRASHES = int(os.environ.get("MEGAVLM_CRASHES", "1"))
STEPS = 8 + 12 * CRASHES
INTERVAL = 3
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# A life of the run has each of these in turn.
LAYOUTS = (
    dict(),
    dict(tensor_model_parallel_size=2),
    dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3"),
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# For a step, a save or a start; a whole run may take as long as it makes progress.
_PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crash") / "train"
    make_dataset(
        folder,
        packs=8,
        vocab_size=199,
        context_token_id=7,
        tile_size=16,
        features_per_tile=4,
        capacity=128,
    )
    return folder


def _config(dataset: Path, save: Path, *, beside: bool, **layout: Any) -> Config:
    # Layouts add up in other orders, and a high learning rate makes such rounding grow: at 3e-3,
    # runs at DP2, TP2 and PP2 that nobody kills differ by 5e-5 after 260 steps, at 3e-4 by 3e-6.
    config = config_for(dataset, steps=STEPS, global_batch_size=2, drop_path=0.1, lr=3e-4, **layout)
    files = Checkpoint(save=str(save), save_interval=INTERVAL, keep=2, asynchronous=beside)
    return dataclasses.replace(config, checkpoint=files, logging=Logging(interval=1))


@pytest.fixture(scope="module")
def undisturbed(ranks: Pool, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("undisturbed") / "run"
    assert ranks.run(run_job, 2, _config(dataset, save, beside=False)) == [STEPS] * 2
    return save


def _weights_and_moments(save: Path) -> dict[str, list[int]]:
    assert (save / "latest").read_text() == f"step_{STEPS:08d}\n"
    sums = json.loads((save / f"step_{STEPS:08d}" / "checksums.json").read_text())
    return {name: found for name, found in sums.items() if name.endswith(".distcp")}


class _Killer:
    """Kills ranks of a run at moments that a random generator chooses.

    Args:
        run: torchrun.
        save: the run's save folder.
        seed: of the generator.
    """

    def __init__(self, run: subprocess.Popen, save: Path, seed: int):
        self._run = psutil.Process(run.pid)
        self._save = save
        self._random = random.Random(seed)
        self._dead: set[int] = set()
        self.inside_saves = 0

    def kill(self) -> None:
        """Wait for a moment of the next life of the run, and end it."""
        alive = self._ranks()
        wanted = self._lines() + self._random.randint(2, 8)
        self._wait(lambda: self._lines() >= wanted)  # it trains
        if self._random.random() < 0.5:
            self._wait(lambda: any(self._save.glob(".growing_*/shards")))
            time.sleep(self._random.uniform(0, 0.1))
        else:
            time.sleep(self._random.uniform(0, 0.1))
        self.inside_saves += any(self._save.glob(".growing_*"))
        chosen = alive if self._random.random() < 0.5 else [self._random.choice(alive)]
        for rank in chosen:
            rank.send_signal(signal.SIGKILL)
        self._dead |= {rank.pid for rank in alive}

    def _ranks(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []

        def are_there() -> bool:
            found[:] = [
                child
                for child in self._run.children()
                if child.pid not in self._dead and _is_rank(child)
            ]
            return len(found) == 2

        self._wait(are_there)
        return list(found)

    def _lines(self) -> int:
        return _lines(self._save)

    def _wait(self, happened) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not happened():
            assert self._run.is_running() and self._run.status() != psutil.STATUS_ZOMBIE, (
                "the run ended before all kills"
            )
            assert time.monotonic() < deadline, f"nothing happened for {_PATIENCE_SECONDS} s"
            time.sleep(0.005)


def _lines(save: Path) -> int:
    path = save / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _wait_for_the_end(run: subprocess.Popen, save: Path) -> int:
    """Return the exit status of a run, for which it has as long as it makes progress.

    Raises:
        subprocess.TimeoutExpired: nothing was recorded for ``_PATIENCE_SECONDS``.
    """
    seen = -1
    while True:
        try:
            return run.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            lines = _lines(save)
            if lines == seen:
                raise
            seen = lines


def _is_rank(process: psutil.Process) -> bool:
    try:
        return any(part.endswith("pretrain_vlm.py") for part in process.cmdline())
    except psutil.Error:
        return False


@pytest.mark.parametrize("beside", [False, True] if "MEGAVLM_CRASHES" in os.environ else [False])
def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_as_if_it_had_not_been(
    dataset: Path, undisturbed: Path, tmp_path: Path, beside: bool
) -> None:
    save = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(to_yaml(_config(dataset, save, beside=beside)))
    torchrun = [*TORCHRUN, "--max-restarts", str(CRASHES)]
    command = [*torchrun, str(ROOT / "pretrain_vlm.py"), "--config", str(tmp_path / "run.yaml")]
    log = tmp_path / "log"
    # The ranks give way to this process, or on few cores they would be done before it sees what
    # they do.
    command = ["nice", "-n", "10", *command]
    with (
        log.open("w") as output,
        subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT) as run,
    ):
        try:
            killer = _Killer(run, save, seed=CRASHES + beside)
            for _ in range(CRASHES):
                killer.kill()
            assert _wait_for_the_end(run, save) == 0, log.read_text()
        finally:
            run.terminate()
    words = log.read_text()
    starts = re.findall(r"^start: (.*)$", words, re.MULTILINE)
    assert len(starts) == CRASHES + 1, words
    # Nothing but whole checkpoints was seen, and nothing is left of the others.
    assert "cannot be used" not in words and "damaged" not in words, words
    assert all(
        int(step) % INTERVAL == 0 for step in re.findall(r"resuming after step (\d+)", words)
    )
    assert not list(save.glob(".*"))
    assert _weights_and_moments(save) == _weights_and_moments(undisturbed)
    print(f"{CRASHES} kills, {killer.inside_saves} of them inside a save; starts: {starts}")


@pytest.mark.skipif("MEGAVLM_CRASHES" not in os.environ, reason="long; MEGAVLM_CRASHES=20 runs it")
def test_a_run_that_is_killed_and_changes_its_layout_ends_as_if_it_had_not(
    dataset: Path, undisturbed: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    inside_saves = 0
    starts: list[str] = []
    for life in range(CRASHES + 1):
        layout = LAYOUTS[life % len(LAYOUTS)]
        file = tmp_path / f"life-{life}.yaml"
        file.write_text(to_yaml(_config(dataset, save, beside=True, **layout)))
        command = [*TORCHRUN, str(ROOT / "pretrain_vlm.py"), "--config", str(file)]
        log = tmp_path / f"life-{life}.log"
        with (
            log.open("w") as output,
            subprocess.Popen(
                ["nice", "-n", "10", *command], env=ENVIRONMENT, stdout=output, stderr=output
            ) as run,
        ):
            try:
                if life < CRASHES:
                    killer = _Killer(run, save, seed=life)
                    killer.kill()
                    inside_saves += killer.inside_saves
                # torchrun ends the other rank if one is killed, and has no restarts left.
                ended = _wait_for_the_end(run, save)
                assert (ended == 0) == (life == CRASHES), log.read_text()
            finally:
                run.terminate()
        words = log.read_text()
        assert "cannot be used" not in words and "damaged" not in words, words
        starts += re.findall(r"^start: (.*)$", words, re.MULTILINE)
    assert len(starts) == CRASHES + 1
    assert not list(save.glob(".*"))
    found = _losses_by_step(save)
    expected = _losses_by_step(undisturbed)
    assert found.keys() == expected.keys()
    farthest = max(abs(found[step] / expected[step] - 1) for step in expected)
    print(
        f"{CRASHES} kills, {inside_saves} inside a save; losses differ by {farthest:.1e}; {starts}"
    )
    assert farthest <= 1e-5


def _losses_by_step(save: Path) -> dict[int, float]:
    """Read the last record of each step's loss."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
