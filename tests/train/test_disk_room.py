"""Warnings of a disk without room for the checkpoints of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from megavlm.config.cli import parse
from megavlm.config.schema import Config
from megavlm.train.disk_room import SPARE_BYTES, checkpoint_bytes, room_warnings


def _config(save: Path, *options: str) -> Config:
    steps = ("--training.steps", "100", "--checkpoint.save_interval", "10")
    return parse(["--stage", "1", "--model", "tiny", "--save", str(save), *steps, *options])


@pytest.mark.parametrize(
    ("options", "step", "there", "room"),
    [
        ((), 0, 0, 4),  # three are kept, and one is written before the oldest goes
        ((), 50, 3, 1),
        ((), 90, 0, 1),
        ((), 100, 3, 1),
        (("--checkpoint.keep", "0"), 0, 0, 10),
        (("--checkpoint.keep", "0"), 50, 5, 5),
        (("--checkpoint.keep", "1"), 0, 0, 2),
        (("--checkpoint.keep_best", "2", "--training.eval_interval", "10"), 0, 0, 6),
        (("--checkpoint.save_interval", "0"), 0, 0, 1),
    ],
)
def test_it_is_told_what_has_no_room(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    step: int,
    there: int,
    room: int,
) -> None:
    config = _config(tmp_path, *options)
    for number in range(there):
        (tmp_path / f"step_{10 * (number + 1):08d}").mkdir()
    needed = room * checkpoint_bytes(config) + SPARE_BYTES
    for free, is_told in ((needed, False), (needed - 1, True)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda folder, usage=usage: usage)
        found = list(room_warnings(config, step))
        assert len(found) == is_told, found
    count = "a checkpoint" if room == 1 else f"{room} checkpoints"
    assert ("--checkpoint.keep" in found[0]) == (room > 1)
    assert found[0].startswith(f"--checkpoint.save {tmp_path}: {count} of about 3 MiB")
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, save=""))
    assert not list(room_warnings(config, step))


def test_checkpoints_hold_weights_master_weights_moments_and_averages(tmp_path: Path) -> None:
    """Of InternVL2.5-8B: 8.1 billion parameters, of which stage 1 trains the connector."""
    parameters = 8_075_365_376
    connector = 33_570_816
    bfloat16 = ("--training.precision", "bfloat16")

    def of(stage: str, *options: str) -> float:
        run = ["--stage", stage, "--model", "internvl2_5-8b", "--save", str(tmp_path)]
        return checkpoint_bytes(parse([*run, *bfloat16, *options]))

    # The vocabulary is padded.
    assert of("2") == pytest.approx(14 * parameters, rel=1e-3)
    assert of("1") == pytest.approx(2 * parameters + 12 * connector, rel=1e-3)
    assert of("1", "--ema.decay", "0.9") - of("1") == 4 * connector
    assert of("1", "--training.precision", "float32") == pytest.approx(
        4 * parameters + 12 * connector, rel=1e-3
    )
    trained = parse(["--stage", "1", "--model", "internvl2_5-8b", *bfloat16])
    assert checkpoint_bytes(trained, trained_only=True) == 14 * connector
