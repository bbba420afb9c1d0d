"""What ``--check`` says of the save folder and of what a run would start from: the run's own words,
and nothing is written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megavlm.config.checks.rules import ConfigError
from megavlm.config.cli import from_yaml, to_yaml
from megavlm.config.schema import Checkpoint, Config, Init
from megavlm.config.stages import parse_stages
from megavlm.data.store.reader import Reader
from megavlm.pack_first import problems
from megavlm.start_check import check_start
from megavlm.train.inspection import inspect
from megavlm.train.resume import index_sums
from megavlm.train.start_point import find_named
from tests.convert.qwen_vl_models import SMALL, make_qwen_vl
from tests.data.native_packs import write_native
from tests.ranks.runs import config_for, make_packs
from tests.train.test_launch import _fake_checkpoint, dataset  # noqa: F401


@pytest.fixture
def command(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """Make a folder with a run of stage 2 after its first step, and one with other things; return
    the options of that run.
    """
    monkeypatch.chdir(tmp_path)
    config = config_for(dataset, global_batch_size=4)
    Path("run.yaml").write_text(to_yaml(config))
    _fake_checkpoint(Path("run"), config)
    Path("images").mkdir()
    Path("images/cat.png").touch()
    return ["--config", "run.yaml"]


def parsed(arguments: list[str]) -> list[Config]:
    return parse_stages(arguments, _read_nothing, problems, check_start)


def _read_nothing(folder: str, init: Init, default: object) -> None:
    raise FileNotFoundError(f"{folder or init}: no such folder")


def checked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the status of a check and what it says, and see that it writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.raises(SystemExit) as ended:
        parsed([*arguments, "--check"])
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    shown = capsys.readouterr()
    return ended.value.code, shown.err if ended.value.code else shown.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--stage 1 --save run", "it holds checkpoints of stage 2, and this is stage 1"),
        ("--save images", "the folder holds something else already (cat.png)"),
        ("--save run --training.global_batch_size 16", "alone, add --data.group 1"),
        ("--save run --training.seed 7", "--training.seed: "),
        ("--save run --architecture.vision.num_layers 2", "of another model"),
        ("--save new --load images", "--checkpoint.load images: no checkpoint and no"),
        ("--save new --load run --training.seed 7", "--training.seed: "),
        ("--save new --load run --architecture.vision.num_layers 2", "2 asked for"),
    ],
)
def test_a_check_refuses_what_the_run_refuses_in_the_same_words(
    command: list[str], options: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*command, *options.split()]
    [config] = parsed(arguments)
    with pytest.raises(ValueError) as error:
        inspect(config, 1)
    status, said = checked(arguments, capsys)
    assert status == 2
    assert told in said
    assert f"1 problem with the configuration:\n  {error.value}\n" in said


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ("--save run --training.seed 7", "--checkpoint.weights_only true, and a new"),
        ("--save new --load run --training.seed 7", "run/step_00000001 --checkpoint.weights_only"),
        ("--save new --load run --lora.rank 2 --training.trainable connector", "weights_only"),
        ("--save new --load run --architecture.vision.num_layers 2", ""),
    ],
)
def test_what_cannot_be_resumed_names_the_way_to_start_from_its_weights(
    command: list[str], options: str, way: str
) -> None:
    options = options.replace("--lora", "--architecture.lora")
    [config] = parsed([*command, *options.split()])
    with pytest.raises(ValueError) as error:
        inspect(config, 1)
    assert way in str(error.value)
    assert ("to start a new run from its weights" in str(error.value)) == bool(way)


def test_packs_that_were_replaced_by_as_many_others_are_told_by_one_rank(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [config] = parsed([*command, "--save", "run"])
    path = Path("run/step_00000001/state.json")
    state = json.loads(path.read_text()) | {"packs": [4]}
    path.write_text(json.dumps(state))
    inspect(config, 1)
    assert "WARNING" not in capsys.readouterr().err
    for index, is_other in ((index_sums(config)[0], False), (7, True)):
        path.write_text(json.dumps(state | {"indexes": [index]}))
        inspect(config, 1)
        said = capsys.readouterr().err
        assert (f"--data.train {config.data.train}: its packs are others" in said) == is_other
    monkeypatch.setenv("RANK", "1")
    inspect(config, 1)
    monkeypatch.delenv("RANK")
    path.write_text(json.dumps(state | {"packs": [5], "indexes": [7]}))
    with pytest.raises(ValueError, match="has 4 packs, and the run began with 5"):
        inspect(config, 1)
    assert capsys.readouterr().err == ""


def test_folders_in_another_order_are_refused(command: list[str]) -> None:
    make_packs(Path("second"), packs=4, seed=1)
    [config] = parsed([*command, "--save", "run"])
    first = config.data.train
    [config] = parsed([*command, "--save", "run", "--data.train", f"{first},second"])
    path = Path("run/step_00000001/state.json")
    facts = {"packs": [4, 4], "indexes": index_sums(config)}
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    inspect(config, 1)
    [config] = parsed([*command, "--save", "run", "--data.train", f"second,{first}"])
    with pytest.raises(
        ValueError, match=f"--data.train second,{first}: names the folders in anoth"
    ):
        inspect(config, 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--save new", "it would start with random weights; new is new or empty"),
        ("--checkpoint.save_interval 0", "it would start with random weights"),
        ("--save run --training.steps 9", "it would resume run after step 1 of 9"),
        (
            "--save run --training.steps 9 --training.global_batch_size 16 --data.group 1"
            " --data.strata 4",
            "it would resume run after step 1 of 9",
        ),
        (
            "--save new --load run --training.steps 9",
            "it would resume run/step_00000001 after step 1 of 9",
        ),
        ("--stage 1 --save new --load run", "it would start from the weights of run/step_00000001"),
    ],
)
def test_the_last_line_of_a_check_says_what_the_run_would_start_from(
    command: list[str], options: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = checked([*command, *options.split()], capsys)
    assert status == 0, said
    first, *warnings, last = said.splitlines()
    assert (first, last) == ("nothing is wrong with the configuration for 1 rank", told)
    # A step of 16 packs, of a dataset of 4, is the only thing to be warned of.
    assert len(warnings) == options.count("batch_size 16"), said
    assert all("has 4 packs, and a step of --training.global" in line for line in warnings)


@pytest.mark.parametrize("stages", ["2", "1,2"])
def test_a_run_resumes_without_the_folders_that_its_model_was_made_of(
    command: list[str], capsys: pytest.CaptureFixture[str], stages: str
) -> None:
    """Those of parts, and the folder of a whole model that ``--checkpoint.load`` names, too."""
    settings = yaml.safe_load(Path("run.yaml").read_text())
    model = {name: settings.pop(name) for name in ("architecture", "stage", "model")}
    Path("rest.yaml").write_text(yaml.safe_dump(settings))
    save = "all" if stages == "1,2" else "run"
    step = Path("run/step_00000001")
    if save == "all":
        Path("all").mkdir()
        Path("run").rename("all/stage_2")
        step = Path("all/stage_2/step_00000001")
    parts = {"vision": "gone/vision", "language": "gone/language"}
    snapshots = "cache/models--org--gone/snapshots"  # of the hub, as was noted while it was there
    of_parts = [word for part, folder in parts.items() for word in (f"--init.{part}", folder)]
    for named, noted, load in (
        (of_parts, {} if save == "all" else {"init": parts}, ""),
        (["--model", "gone", "--load", "gone"], {"model": "gone"}, "gone"),
        (["--model", "org/gone"], {"model": f"{snapshots}/1f"}, ""),
    ):
        files = settings["checkpoint"] | {"load": "all/stage_1" if save == "all" else load}
        written = settings | model | noted | {"checkpoint": files}
        (step / "config.yaml").write_text(yaml.safe_dump(written))
        arguments = ["--config", "rest.yaml", "--stage", stages, *named]
        status, said = checked([*arguments, "--save", save], capsys)
        assert status == 0, said
        assert f"it would resume {step.parent} after step 1" in said
        run = parsed([*arguments, "--save", save])[-1]
        assert run.architecture == from_yaml(step / "config.yaml").architecture
        told = capsys.readouterr().err
        assert told.startswith(f"WARNING: {' '.join(named[:2])}")
        assert f": no such folder; the model is that of {step}/config.yaml, with" in told
        status, said = checked([*arguments, "--save", "new"], capsys)
        assert status == 2 and "gone" in said


@pytest.mark.parametrize("factor", ["1", "2"])
@pytest.mark.parametrize("name", ["train", "valid"])
def test_samples_that_are_longer_than_the_language_model_was_made_for_are_told(
    command: list[str], capsys: pytest.CaptureFixture[str], factor: str, name: str
) -> None:
    [config] = parsed([*command, "--save", "new"])
    longest = Reader(config.data.train, with_shards=False).index.largest("longest")
    flag = "--architecture.language.max_position_embeddings"
    arguments = [*command, "--save", "new", f"--data.{name}", config.data.train]
    arguments += ["--architecture.language.rotary_dynamic_factor", factor]
    _, said = checked([*arguments, flag, str(longest)], capsys)
    assert "warning" not in said
    _, said = checked([*arguments, flag, str(longest - 1)], capsys)
    of = [line for line in said.splitlines() if f": --data.{name} {config.data.train}: " in line]
    assert len(of) == 1 and f"holds a sample of {longest} tokens, and {flag} is" in of[0]
    assert f"; give {flag} {longest}," in of[0]
    assert ("rotary_dynamic_factor 2, training does not" in of[0]) == (factor == "2")
    # Weights are no others, so a run that has begun takes it, too.
    status, said = checked([*command, "--save", "run", flag, str(longest)], capsys)
    assert status == 0 and "it would resume run" in said


def test_the_folder_of_each_stage_is_looked_at(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*command, "--stage", "2,1", "--save", "both"]
    Path("both").mkdir()
    assert "it would start with random weights" in checked(arguments, capsys)[1]
    Path("images").rename("both/stage_1")
    status, said = checked(arguments, capsys)
    assert status == 2
    assert "stage 1: --checkpoint.save both/stage_1: the folder holds something else" in said
    Path("both/stage_1").rename("images")
    Path("run").rename("both/stage_2")
    status, said = checked(arguments, capsys)
    assert status == 0, said
    assert "stage 2 comes first: it would resume both/stage_2 after step 1" in said
    # It is done.
    one_step = ["--training.steps", "1"]
    status, said = checked([*arguments, *one_step], capsys)
    assert status == 0, said
    weights = "it would start from the weights of both/stage_2/step_00000001"
    assert f"stage 1 comes first: {weights}" in said
    # Unless it is to be exported.
    exported = ["--for", "2", "--checkpoint.export_hf exported"]
    packs = Path(parsed(arguments)[0].data.train)
    (packs / "tokenizer").mkdir()
    status, said = checked([*arguments, *one_step, *exported], capsys)
    (packs / "tokenizer").rmdir()
    assert status == 0, said
    assert "stage 2 comes first: it would resume both/stage_2 after step 1 of 1" in said
    # The last one has begun, and is done.
    backwards = [*command, "--stage", "1,2", "--save", "both"]
    written = Path("both/stage_2/step_00000001/config.yaml")
    settings = yaml.safe_load(written.read_text())
    settings["checkpoint"]["load"] = "both/stage_1"
    written.write_text(yaml.safe_dump(settings))
    for options, end in (([], "10"), (one_step, "1")):
        status, said = checked([*backwards, *options], capsys)
        assert status == 0, said
        assert f"stage 2 comes first: it would resume both/stage_2 after step 1 of {end}" in said
    # Both have begun.
    shutil.copytree("both/stage_2", "both/stage_1")
    status, said = checked(backwards, capsys)
    assert "stage 2 comes first" in said and "stage 1 is at step 1 of 10 and stays so" in said


@pytest.mark.parametrize("is_readable", [True, False])
def test_a_stage_whose_checkpoints_cannot_be_read_comes_first_and_is_refused(
    command: list[str], capsys: pytest.CaptureFixture[str], is_readable: bool
) -> None:
    """Whether it is done nobody knows, so that the next one does not start from it."""
    Path("both").mkdir()
    Path("run").rename("both/stage_2")
    state = Path("both/stage_2/step_00000001/state.json")
    state.unlink()
    if is_readable:
        state.write_text("[]")
    else:
        state.mkdir()  # as a disk that fails: an OSError
    one_step = ["--training.steps", "1"]
    status, said = checked([*command, "--stage", "2,1", "--save", "both", *one_step], capsys)
    assert status == 2
    assert "--checkpoint.save both/stage_2: no checkpoint of this run can be used" in said


def test_annotations_are_not_packed_to_look_at_a_checkpoint(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes.jsonl").write_text("{}\n")
    arguments = [*command, "--save", "run", "--data.train", "notes.jsonl"]
    with pytest.raises(SystemExit) as ended:
        parse_stages([*arguments, "--check"], lambda *_: None, lambda *_: (), check_start)
    assert ended.value.code == 0
    assert "it would resume run after step 1" in capsys.readouterr().out


def test_without_anything_to_look_at_no_torch_is_imported(command: list[str]) -> None:
    code = f"""
import sys
from megavlm.start_check import check_start
from megavlm.config.stages import parse_stages
from megavlm.pack_first import problems
try:
    parse_stages({[*command, "--save", "new", "--check"]!r}, None, problems, check_start)
finally:
    assert "torch" not in sys.modules
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0 and told.stderr == ""
    assert "new is new or empty" in told.stdout


def test_packs_with_another_token_for_images_than_the_folder_are_refused(tmp_path: Path) -> None:
    folder = make_qwen_vl(tmp_path / "hf", SMALL)
    facts = dict(tile_size=SMALL.vision.image_size, vocab_size=461)
    config = dataclasses.replace(config_for(tmp_path / "packs"), architecture=SMALL)
    config = dataclasses.replace(config, checkpoint=Checkpoint(load=str(folder)))
    write_native(tmp_path / "packs", [((16, 8),)], context_token_id=7, **facts)
    assert find_named(config) == folder
    shutil.rmtree(tmp_path / "packs")
    write_native(tmp_path / "packs", [((16, 8),)], context_token_id=9, **facts)
    with pytest.raises(ConfigError, match="its token for images is 9, and that of .* is 7, as its"):
        find_named(config)
    shutil.rmtree(tmp_path / "packs")
    write_native(tmp_path / "packs", [()], context_token_id=9, **facts)  # which no text has
    assert find_named(config) == folder
