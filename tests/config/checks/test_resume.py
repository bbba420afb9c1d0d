"""Every option is taken, refused, or told to be free, when a run resumes."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest

from megavlm.config.checks import resume
from megavlm.config.checks.resume import (
    KINDS,
    changes,
    refusals,
    with_origin,
)
from megavlm.config.cli import from_yaml, parse, to_yaml
from megavlm.config.options import options
from megavlm.config.schema import Config

NAMES = ["--stage", "2", "--model", "tiny", "--data.train", "packs", "--save", "runs/a"]
OWN = Path("runs/a/step_00000001")


@cache
def run(*arguments: str) -> Config:
    return parse([*NAMES, *arguments])


def another(key: str) -> str:
    """Return a value of the option that is not its default."""
    option = options()[key]
    value = resume._value(run(), key)
    kinds = {int: "123", float: "0.123", bool: "false" if value else "true", str: "another"}
    others = {
        "stage": "1",
        "model": "internvl2_5-1b",
        "data.weights": "1,2",
        "data.loss_weights": "1,2",
        "eval.shots": "4",
        "training.trainable": "connector",
        "parallel.recompute_parts": "vision",
        "profile.ranks": "1",
    }
    if key in others:
        return others[key]
    if option.kind in kinds:
        return kinds[option.kind]
    chosen = getattr(option.kind, "__args__", ())
    return next((text for text in chosen if isinstance(text, str) and text != value), "jpeg")


def test_no_option_is_forgotten() -> None:
    # Those of the architecture are compared as a whole.
    assert KINDS.keys() == {key for key in options() if not key.startswith("architecture.")}
    assert set(KINDS.values()) == {"taken", "refused", "origin", "free"}


@pytest.mark.parametrize("key", [key for key in KINDS if key not in ("recipe", "stage", "model")])
def test_each_option_has_the_effect_that_the_table_says(key: str) -> None:
    old = run()
    new = run(f"--{key}", another(key))
    assert old != new
    refused = [line for line in refusals(old, new, own=OWN) if line.startswith(f"--{key}:")]
    shown = [line for line in changes(old, new) if line.split()[0] == f"--{key}"]
    assert (len(refused), len(shown)) == {
        "refused": (1, 0),
        "origin": (1, 0),
        "taken": (0, 1),
        "free": (0, 0),
    }[KINDS[key]]
    assert refusals(new, new, own=OWN) == [] == changes(new, new)


def test_a_table_says_what_changed() -> None:
    old = run("--lr", "1e-3", "--training.steps", "50")
    new = run("--lr", "2e-3", "--training.steps", "50", "--training.precision", "float32")
    assert changes(old, new) == [
        "  option                checkpoint  now",
        "  --optimizer.lr        0.001       0.002",
        "  --training.precision  bfloat16    float32",
    ]


def test_settings_without_effect_may_change() -> None:
    shares = ("--data.weights", "1,2")
    assert not refusals(run(*shares, "--data.sampling", "sqrt"), run(*shares), own=None)
    stored = ("--data.shuffle", "false")
    assert not refusals(run(*stored, "--data.group", "8"), run(*stored), own=None)
    for before, now in (((), shares), ((), ("--data.sampling", "sqrt")), ((), stored)):
        assert refusals(run(*before), run(*now), own=None)


def test_the_batch_may_change_if_the_order_of_the_packs_stays() -> None:
    old = run("--global-batch-size", "64")
    [refused] = refusals(old, run("--global-batch-size", "128"), own=None)
    assert refused.startswith("--data.group: 8 in the checkpoint, 16 asked for")
    assert refused.endswith("to change the batch size alone, add --data.group 8")
    [refused] = refusals(old, run("--data.group", "4"), own=None)
    assert "add --data.group" not in refused  # the command gives it already
    assert not refusals(old, run("--global-batch-size", "128", "--data.group", "8"), own=None)
    few = run("--global-batch-size", "4")
    refused = refusals(few, run("--global-batch-size", "64"), own=None)
    assert refused[0].endswith("alone, add --data.group 1")
    assert refused[1].endswith("to change the batch size alone, add --data.strata 4")
    order = ("--data.group", "1", "--data.strata", "4")
    assert not refusals(few, run("--global-batch-size", "64", *order), own=None)
    shared = ["--data.group", "8", "--data.batch_shares", "true"]
    [refused] = refusals(
        run("--global-batch-size", "8", *shared),
        run("--global-batch-size", "16", *shared),
        own=None,
    )
    assert refused.startswith("--training.global_batch_size: 8 in the checkpoint")


def test_a_run_that_an_earlier_version_began_keeps_its_order_of_packs() -> None:
    text = to_yaml(run("--global-batch-size", "64"))
    old = from_yaml("".join(line for line in text.splitlines(True) if "  strata:" not in line))
    refused = refusals(old, run("--global-batch-size", "64"), own=None)
    assert [line.partition(":")[0] for line in refused] == ["--data.group", "--data.strata"]
    assert refused[0].startswith("--data.group: 64 in the checkpoint, 8 asked for")
    assert "global_batch_size" not in refused[0]  # that is as it was
    assert refused[1].endswith("a run that an earlier version began had none: add --data.strata 1")
    now = run("--global-batch-size", "64", "--data.strata", "1")
    assert refusals(old, now, own=None) == []
    shuffled = ("--global-batch-size", "64", "--data.group", "1")
    text = to_yaml(run(*shuffled))
    old = from_yaml("".join(line for line in text.splitlines(True) if "  strata:" not in line))
    assert refusals(old, run(*shuffled), own=None) == []


def test_weights_of_4_bits_keep_the_dtype_that_they_were_rounded_from() -> None:
    lora = ["--architecture.lora.rank", "4", "--architecture.lora.nf4", "language"]
    old = run("--training.precision", "bfloat16", *lora)
    [refused] = refusals(old, run("--training.precision", "float32", *lora), own=OWN)
    assert refused.startswith("--training.precision: bfloat16 in the checkpoint, float32 asked for")
    assert "--architecture.lora.nf4" in refused
    old = run("--training.precision", "bfloat16", *lora[:2])
    assert not refusals(old, run("--training.precision", "float32", *lora[:2]), own=OWN)


def test_where_a_run_began_may_be_left_out_or_said_again(tmp_path: Path) -> None:
    began = tmp_path / "one"
    save = tmp_path / "two"
    own = save / "step_00000003"
    old = run("--load", str(began), "--save", str(save))
    for load in ("", str(began), f"{began}/", str(save), str(save / "step_00000003")):
        assert not refusals(old, run("--load", load, "--save", str(save)), own=own), load
    other = run("--load", str(tmp_path / "three"), "--save", str(save))
    [refused] = refusals(old, other, own=own)
    assert "says where it began" in refused and "latest" not in refused
    earlier = run("--load", str(save / "step_00000002"), "--save", str(save))
    [refused] = refusals(old, earlier, own=own)  # which would be ignored
    assert f"write step_00000002 into {save}/latest" in refused
    assert not refusals(earlier, earlier, own=own)
    assert not refusals(old, other, own=None)  # it is what the run loads
    kept = dataclasses.replace(old.checkpoint, moments="keep")
    assert refusals(old, dataclasses.replace(old, checkpoint=kept), own=OWN)


def test_checkpoints_may_become_whole_on_the_way_but_not_the_other_way_round() -> None:
    only = run("--checkpoint.trained_only", "true")
    assert not refusals(only, run(), own=OWN) and refusals(run(), only, own=OWN)


def test_folders_of_weights_are_left_to_who_knows_their_content_but_nothing_else_is(
    tmp_path: Path,
) -> None:
    save = str(tmp_path / "two")
    own = tmp_path / "two" / "step_00000003"
    names = ["--load", "one", "--save", save]
    old = run(*names)
    for moved in (["--load", "three"], ["--init.vision", "three"]):
        assert not refusals(old, run(*names, *moved), own=own, by_content=True), moved
    for other in (
        ["--load", f"{save}/step_00000002"],
        ["--checkpoint.weights_only", "true"],
        ["--checkpoint.moments", "keep"],
        ["--init.tokenizer", "three"],
    ):
        assert refusals(old, run(*names, *other), own=own, by_content=True), other


def test_where_a_run_began_stays_on_record_if_the_command_leaves_it_out(tmp_path: Path) -> None:
    before = run("--load", str(tmp_path), "--checkpoint.moments", "keep")
    after = with_origin(run("--lr", "1e-3"), before)
    assert after.checkpoint == before.checkpoint and after.optimizer.lr == 1e-3
    assert refusals(before, after, own=OWN) == []
