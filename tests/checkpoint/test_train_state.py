"""The state of a run comes back as it was written, and that of earlier versions too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megavlm.checkpoint import train_state
from megavlm.checkpoint.base_files import Base
from megavlm.checkpoint.train_state import State

STATE = State(
    step=9,
    consumed=36,
    stage="2",
    tokenizer="abc",
    packs=(4, 5),
    indexes=(6, 7),
    valid_loss=1.5,
    figures=(("exam/accuracy", 0.5), ("pope/f1", 0.25)),
    history=((3, ("connector",)), (4, ("vision", "connector"))),
    trained_only=True,
    base=Base(folders=("/a",), beside=("../a",), files=(("0/b.bin", 8, 9), ("0/c.bin", 10, -1))),
    skipped=2,
    skipped_in_a_row=1,
    skipped_steps=(3, 8),
    recent_losses=(2.5, 2.25),
    unreadable_packs=(2, 6),
    reference="stage 2, step 4",
)


def test_all_of_a_state_comes_back(tmp_path: Path) -> None:
    assert all(
        vars(STATE)[name] != value for name, value in vars(State()).items() if name != "format"
    )
    train_state.write(STATE, tmp_path)
    assert train_state.read(tmp_path) == STATE
    assert STATE.updates == 7
    names = ("valid_loss", "pope/f1", "none")
    assert [STATE.figure(name) for name in names] == [1.5, 0.25, None]


def test_what_was_measured_after_a_step_is_not_of_the_next() -> None:
    after = STATE.after(4)
    assert (after.step, after.consumed, after.valid_loss, after.figures) == (10, 40, None, ())
    assert after.history == STATE.history and after.skipped_steps == STATE.skipped_steps


def test_states_of_earlier_versions_are_read_and_of_later_ones_refused(tmp_path: Path) -> None:
    old = {"step": 3, "consumed": 6, "stage": "1", "tokenizer": None, "format": 1}
    path = tmp_path / train_state.FILE_NAME
    path.write_text(json.dumps(old | {"history": [[2, ["projector"]]], "base": "/my runs/b 4f"}))
    read = train_state.read(tmp_path)
    assert read.history == ((2, ("connector",)),)
    assert read.base == Base(folders=("/my runs/b",))
    train_state.write(read, tmp_path)  # as the newest
    assert json.loads(path.read_text())["format"] == train_state.FORMAT_VERSION
    path.write_text(json.dumps(old | {"format": 3}))
    with pytest.raises(ValueError, match=r"written in format 3; this version .* reads 1 and 2"):
        train_state.read(tmp_path)
