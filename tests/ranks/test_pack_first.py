"""``--data.train`` names an annotation file: it is packed at its first use, then trained on, in one
command with two ranks.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from megavlm import pack_first
from megavlm.config.cli import parse
from megavlm.config.stages import parse_stages
from megavlm.data.packing import job, scan
from megavlm.data.store.reader import Reader
from megavlm.model_source import read_model
from tests.ranks import commands

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = random.Random(0)
    (tmp_path / "images").mkdir()
    for number in range(8):
        pixels = np.full((20 + number, 30, 3), 9 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    lines = []
    for number in range(60):
        words = " ".join(rng.choices(["red", "fox", "over", "dog"], k=rng.randint(1, 30)))
        turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": words}]
        lines.append(json.dumps({"image": f"{number % 8}.png", "conversations": turns}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def flags(folder: Path, packing: str = "") -> list[str]:
    options = f"--tokenizer {TOKENIZER} --root {folder / 'images'} --capacity 512 --workers 0"
    run = "--stage 1 --model tiny --training.steps 2 --training.global_batch_size 2"
    run += " --optimizer.warmup_steps 0 --checkpoint.save_interval 0"
    given = {
        "train": folder / "train.jsonl",
        "packing": f"{options} {packing}",
        "cache": folder / "cache",
        "workers": 0,
    }
    named = [f"--data.{name}={value}" for name, value in given.items()]
    precision = ["--training.precision", "float32"]
    return [*run.split(), *precision, *named]


def made(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").glob("train-*") if path.suffix == "")


def packed(folder: Path, packing: str = "") -> str:
    return pack_first.pack_annotations(parse(flags(folder, packing))).data.train


def test_one_command_packs_and_trains_and_the_next_one_finds_the_packs(folder: Path):
    done = commands.run([flags(folder)] * 2, folder / "told")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("60 read, 0 rejected") == 1  # one rank packs
    assert "the other ranks wait" in done.stderr
    (out,) = made(folder)
    assert Reader(out).manifest.totals.samples == 60
    before = (out / "manifest.json").stat().st_mtime_ns
    assert packed(folder) == str(out)
    assert (out / "manifest.json").stat().st_mtime_ns == before


def test_changed_content_and_settings_are_packed_anew(folder: Path, capfd):
    first = packed(folder)
    os.utime(folder / "train.jsonl", (1, 1))
    assert packed(folder) == first  # the content is what counts
    other = packed(folder, "--max_tiles 2")
    text = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(text.replace("fox", "cat"))
    changed = packed(folder)
    assert len({first, other, changed}) == 3
    assert capfd.readouterr().err.count(f" packs {folder / 'train.jsonl'} into") == 3


def test_later_stages_pack_theirs_with_the_tokenizer_of_the_first(folder: Path):
    given = [word.replace(f"--tokenizer {TOKENIZER} ", "") for word in flags(folder)[2:]]
    command = ["--stage", "1,2", *given, "--checkpoint.save", str(folder / "runs")]
    whole = [*command, "--load", str(TOKENIZER), "--checkpoint.save_interval", "2"]
    (folder / "later.jsonl").write_text((folder / "train.jsonl").read_text())
    whole += ["--for", "2", f"--data.train {folder / 'later.jsonl'}"]
    runs = parse_stages(whole, read_model, pack_first.problems)
    first, second = (pack_first.pack_annotations(run, runs[0]) for run in runs)
    assert first.data.train == str(made(folder)[0])
    assert Path(second.data.train).name.startswith("later-")
    assert Reader(second.data.train).manifest.totals.samples == 60
    assert second.checkpoint.load == str(folder / "runs" / "stage_1")


def kill_while_packing(folder: Path, monkeypatch):
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(
                job, "_write_shards", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            )
            packed(folder)
        finally:
            os._exit(0)  # or the tests would go on twice
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_a_killed_packing_is_taken_up(folder: Path, monkeypatch):
    kill_while_packing(folder, monkeypatch)
    (partial,) = (folder / "cache").glob("*.partial")
    assert not made(folder)
    # The first pass is not made again.
    monkeypatch.setattr(scan, "measure", None)
    out = packed(folder)
    assert [Path(out)] == made(folder) and not partial.exists()
    assert Reader(out).manifest.totals.samples == 60


def test_what_was_begun_of_a_file_that_was_written_again_is_packed_anew(folder: Path, monkeypatch):
    kill_while_packing(folder, monkeypatch)
    os.utime(folder / "train.jsonl", (1, 1))
    assert Reader(packed(folder)).manifest.totals.samples == 60


def test_a_process_waits_for_another_one_that_packs(folder: Path, monkeypatch, capfd):
    monkeypatch.setattr(pack_first, "POLL_SECONDS", 0.05)
    out = Path(packed(folder))
    hidden = out.with_name("hidden")
    out.rename(hidden)
    with open(f"{out}.lock", "w", encoding="utf-8") as lock:
        lock.write("rank 8 (node1)")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        finish = threading.Timer(1.0, lambda: hidden.rename(out))
        finish.start()
        assert packed(folder) == str(out)
    assert f"waits for rank 8 (node1), which packs into {out}" in capfd.readouterr().err


def test_ranks_that_do_not_pack_give_up_if_the_first_of_their_machine_does_not(
    folder: Path, monkeypatch, capfd
):
    monkeypatch.setattr(pack_first, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        packed(folder)
    assert not made(folder)


def test_a_meta_file_is_packed(folder: Path):
    entry = {"annotation": str(folder / "train.jsonl"), "root": str(folder / "images")}
    (folder / "train.json").write_text(json.dumps({"a": entry, "b": {**entry, "repeat_time": 2}}))
    named = f"--data.train={folder / 'train.json'}"
    options = flags(folder)
    options[-3] = f"--data.packing=--tokenizer {TOKENIZER} --capacity 512 --workers 0"
    config = parse([*options, named], find_problems=pack_first.problems)
    assert Reader(pack_first.pack_annotations(config).data.train).manifest.totals.samples == 180


def test_a_stage_of_preferences_packs_pairs_of_answers(folder: Path, capfd):
    pairs = [{"image": "0.png", "question": "what", "chosen": "a fox", "rejected": "a dog"}] * 8
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    with pytest.raises(SystemExit):  # the stage would learn both answers
        packed(folder, "--preferences --max_tiles 1")
    assert "packed with --preferences, each answer beside" in capfd.readouterr().err
    stage = ["--stage", "mpo", f"--data.reference={folder / 'reference'}"]
    config = parse([*flags(folder, "--max_tiles 1"), *stage])
    manifest = Reader(pack_first.pack_annotations(config).data.train).manifest
    assert manifest.preferences and manifest.totals.samples == 16


def test_packs_are_as_long_as_the_stage_has_them(folder: Path):
    name = str(folder / "train.jsonl")
    stage = ["--recipe", "qwen2_5_vl", "--stage", "3", f"--data.train={name}"]
    for words, tokens in (("", 32768), (" --capacity 512", 512)):
        config = parse([*stage, f"--data.packing=--tokenizer {TOKENIZER}{words}"])
        assert pack_first._job(config, name).capacity == tokens


@pytest.mark.parametrize(
    ("packing", "words"),
    [
        ("--model tiny", "--model is not for a training run"),
        ("--stage 1", "--stage is not for a training run"),
        ("--out there", "--out is not for a training run"),
        ("--capacity many", "argument --capacity: invalid int value"),
        ("--tokenizer nowhere", "nowhere"),
        ("--max_tile 3 --what", "unrecognized arguments: --what"),
    ],
)
def test_options_that_cannot_be_are_told(folder: Path, packing: str, words: str, capfd):
    with pytest.raises(SystemExit) as caught:
        parse(flags(folder, packing), find_problems=pack_first.problems)
    assert caught.value.code == 2
    assert words in capfd.readouterr().err


def test_packing_options_without_annotations_are_refused(folder: Path):
    config = parse([*flags(folder), f"--data.train={folder}"])
    found = pack_first.problems(config, 1)
    assert sum("has no effect: neither --data.train nor" in each for each in found) == 2


def test_who_waits_for_an_hour_does_not_look_at_the_folder_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packs"
    now = [0.0]
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        now[0] += seconds
        if now[0] > 3600:
            out.mkdir()

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(pack_first, "time", clock)
    monkeypatch.setattr(pack_first, "_lock", lambda lock, kind: False)  # another machine packs
    monkeypatch.setenv("LOCAL_RANK", "1")
    with open(tmp_path / "lock", "a+") as lock:
        pack_first._pack_or_wait(lock, out, lambda: pytest.fail("it is not the first"))
    assert len(looks) < 500 and looks[0] < 1 and now[0] < 3620
