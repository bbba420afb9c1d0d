"""The example for several nodes: what its scripts start, and how a job that must end is told to."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megavlm.config.checks.rules import ConfigError, check
from megavlm.config.cli import parse
from megavlm.config.recipes import RECIPES
from megavlm.config.schema import Config, Init
from megavlm.model_source import image_model
from tools import pack_dataset

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "internvl2_5_8b"
SCRIPTS = [*sorted(ROOT.glob("examples/**/*.sh")), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]
# Stands in for a program: writes down what it was asked, then waits for SIGTERM if it is to, or
# fails, behind a checkpoint of the step that it is to save.
RECORDER = """#!/usr/bin/env bash
trap 'echo TERM >>"$LOG.signals"; exit 1' TERM
printf '%s\\n' "$@" >"$LOG"
if [[ -n "${LINGERS:-}" ]]; then for _ in {1..300}; do sleep 0.1; done; fi
if [[ -n "${SAVES:-}" ]]; then echo "$SAVES" >"$RUNS/stage2/latest"; fi
exit "${STATUS:-0}"
"""
# Slurm's srun, for one node: leaves out its own options and runs the command.
SRUN = """#!/usr/bin/env bash
while [[ "$1" != bash ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) printf 'node7\\nnode8\\n' ;;
    *) printf '%s ' "$@" >"$LOG.scontrol" ;;
esac
"""


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """Make an environment with stand-ins for torchrun, python and Slurm's commands; ``LOG`` names
    the file that records their arguments.
    """
    for name, text in {
        "torchrun": RECORDER,
        "python": RECORDER,
        "srun": SRUN,
        "scontrol": SCONTROL,
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    folders = {"LOG": str(tmp_path / "log"), "RUNS": "runs", "PACKS": "packs"}
    return folders | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STOP_INTERVAL_S": "1"}


def asked(shell: dict[str, str]) -> list[str]:
    """Arguments of the program that was started."""
    return Path(shell["LOG"]).read_text().splitlines()


def asked_packing(shell: dict[str, str]) -> Namespace:
    """Arguments of the packer that was started, if the folders of tokenizers are there."""
    script, *arguments = asked(shell)
    assert Path(script).resolve() == ROOT / "tools" / "pack_dataset.py"
    with contextlib.chdir(Path(shell["LOG"]).parent):
        for flag, value in itertools.pairwise(arguments):
            if flag in ("--tokenizer", "--qformer_tokenizer"):
                Path(value).mkdir(parents=True, exist_ok=True)
        return pack_dataset.parse(arguments)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_is_valid_bash(script: Path):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("stage", "load"), [("1", "weights"), ("1.5", "runs/stage1"), ("2", "runs/stage1_5")]
)
def test_torchrun_and_the_trainer_know_every_option(shell: dict[str, str], stage: str, load: str):
    cluster = {"NNODES": "4", "MASTER_ADDR": "node0", "JOB_ID": "7", "INIT": "weights"}
    subprocess.run(["bash", str(FOLDER / "run.sh"), stage], env=shell | cluster, check=True)
    run = get_args_parser().parse_args(asked(shell))
    assert (run.nnodes, run.nproc_per_node, run.rdzv_endpoint, run.rdzv_id, run.max_restarts) == (
        "4",
        "8",
        "node0:29500",
        "7",
        0,
    )
    assert Path(run.training_script).resolve() == ROOT / "pretrain_vlm.py"
    config = parse(run.training_script_args)
    assert (config.stage, config.checkpoint.load) == (stage, load)
    assert fits(config, ranks=32) and not fits(config, ranks=30)


def test_steps_and_options_reach_the_trainer(shell: dict[str, str]):
    command = ["bash", str(FOLDER / "run.sh"), "2", "--lr", "1e-6", "--training.seed", "9"]
    subprocess.run(command, env=shell | {"STEPS": "7"}, check=True)
    config = parse(get_args_parser().parse_args(asked(shell)).training_script_args)
    assert (config.training.steps, config.training.seed, config.optimizer.lr) == (7, 9, 1e-6)
    subprocess.run(command, env=shell, check=True)
    config = parse(get_args_parser().parse_args(asked(shell)).training_script_args)
    assert config.training.steps == 5500


def test_stage_1_starts_from_parts(shell: dict[str, str]):
    folders = {"VISION": "InternViT", "LANGUAGE": "InternLM", "TOKENIZER": "words"}
    subprocess.run(["bash", str(FOLDER / "run.sh"), "1"], env=shell | folders, check=True)
    config = parse(get_args_parser().parse_args(asked(shell)).training_script_args)
    assert (
        config.init == Init(vision="InternViT", language="InternLM", tokenizer="words")
        and not config.checkpoint.load
    )


def fits(config: Config, ranks: int) -> bool:
    """Whether the layout divides the ranks; the folders of the example need not be there."""
    try:
        check(config, ranks)
    except ConfigError as error:
        return "number of ranks" not in str(error) and "data-parallel ranks" not in str(error)
    return True


def test_the_packer_knows_every_option(shell: dict[str, str]):
    subprocess.run(
        ["bash", str(FOLDER / "run.sh"), "pack", "--workers", "3"],
        env=shell | {"DATA": "data", "TOKENIZER": "tokenizer"},
        check=True,
    )
    args = asked_packing(shell)
    assert (args.model, args.capacity, args.workers) == ("internvl2_5-8b", 16384, 3)
    assert args.out == "packs/stage2"


# Recipes with scripts of their own: for each stage, the stage that it starts from.
STARTS = {
    ("llava", "1"): None,
    ("llava", "2"): "stage1",
    ("llava_next", "2"): "stage1",
    ("paligemma", "1"): None,
    ("paligemma", "2"): "stage1",
    ("paligemma", "2.5"): "stage2",
    ("paligemma", "3"): "stage2",
    ("flamingo", "1"): None,
}


@pytest.mark.parametrize(("recipe", "stage"), STARTS)
def test_the_trainer_knows_every_option_of_a_recipes_script(
    shell: dict[str, str], tmp_path: Path, recipe: str, stage: str
):
    runs = tmp_path / "runs"
    before = STARTS[recipe, stage]
    (runs / f"{before}-hf").mkdir(parents=True)
    parts = {"VISION": "eyes", "LANGUAGE": "words", "RUNS": str(runs), "FROM": "2"}
    script = ROOT / "examples" / recipe.removesuffix("_next") / "run.sh"
    command = ["bash", str(script), stage, "--training.seed", "9"]
    cluster = {"NNODES": "4", "MASTER_ADDR": "node0", "RECIPE": recipe}
    subprocess.run(command, env=shell | parts | cluster, check=True)
    run = get_args_parser().parse_args(asked(shell))
    assert (run.nnodes, run.nproc_per_node, run.max_restarts) == ("4", "8", 0)
    assert Path(run.training_script).resolve() == ROOT / "pretrain_vlm.py"
    config = parse(run.training_script_args, lambda folder, init, default: default)
    assert (config.recipe, config.stage, config.training.seed) == (recipe, stage, 9)
    assert config.checkpoint.load == (str(runs / before) if before else "")
    assert config.init == (Init() if before else Init(vision="eyes", language="words"))
    assert fits(config, ranks=16)


@pytest.mark.parametrize(
    ("recipe", "asks", "expected"),
    [
        ("llava", ["pack"], ["llava_plain", "crop", "stage1"]),
        ("llava_next", ["pack"], ["llava_v1", "anyres", "stage2"]),
        ("paligemma", ["pack", "2.5"], ["paligemma", "stretch", "stage2.5"]),
    ],
)
def test_the_packer_knows_every_option_of_a_recipes_script(
    shell: dict[str, str], tmp_path: Path, recipe: str, asks: list[str], expected: list[str]
):
    # LLaVA packs two sets, of which the other is there already.
    for name in {"stage1", "stage2"} - {expected[-1]}:
        (tmp_path / "packs" / name).mkdir(parents=True)
        (tmp_path / "packs" / name / "manifest.json").touch()
    parts = {"VISION": "eyes", "LANGUAGE": "words", "PACKS": str(tmp_path / "packs")}
    data = {"DATA": "data", "JSONL": "chats.jsonl", "ROOT": "images", "RECIPE": recipe}
    script = ROOT / "examples" / recipe.removesuffix("_next") / "run.sh"
    subprocess.run(["bash", str(script), *asks], env=shell | parts | data, check=True)
    args = asked_packing(shell)
    assert [args.template, args.tiling, Path(args.out).name] == expected
    assert args.image_size == (896 if recipe == "paligemma" else None)


def test_blip2s_scripts_name_options_that_exist(shell: dict[str, str], tmp_path: Path):
    parts = {"QFORMER": "qformer", "LANGUAGE": "words", "DATA": "data", "RUNS": "runs"}
    command = ["bash", str(ROOT / "examples" / "blip2" / "run.sh")]
    subprocess.run([*command, "2", "--training.seed", "9"], env=shell | parts, check=True)
    run = get_args_parser().parse_args(asked(shell))
    config = parse(run.training_script_args, lambda folder, init, default: default)
    assert (config.recipe, config.stage, config.training.seed) == ("blip2", "2", 9)
    assert config.init == Init(vision="qformer", connector="qformer", language="words")
    assert fits(config, ranks=8)
    packs = {"PACKS": str(tmp_path / "packs")}
    subprocess.run([*command, "pack"], env=shell | parts | packs, check=True)
    args = asked_packing(shell)
    assert (args.template, args.model, args.truncate) == ("blip2", "blip2", 64)
    assert image_model(args.model).placeholders_per_tile == 32


@pytest.mark.parametrize(
    ("recipe", "stage", "side", "pairs"),
    [
        ("clip", "1", 224, 256),
        ("siglip", "1", 224, 256),
        ("internvl_c", "1", 196, 256),
        ("internvl_c", "2", 224, 256),
        ("internvl_c", "3", 364, 32),
    ],
)
def test_the_script_for_pairs_names_options_that_exist(
    shell: dict[str, str], tmp_path: Path, recipe: str, stage: str, side: int, pairs: int
):
    runs = tmp_path / "runs"
    for before in ("stage1-hf", "stage2-hf"):
        (runs / before).mkdir(parents=True)
    parts = {"RECIPE": recipe, "LANGUAGE": "words", "TOKENIZER": "words", "RUNS": str(runs)}
    data = {"JSONL": "pairs.jsonl", "ROOT": "images", "PACKS": str(tmp_path / "packs")}
    command = ["bash", str(ROOT / "examples" / "contrastive" / "run.sh")]
    environment = shell | parts | data
    subprocess.run([*command, stage, "--training.seed", "9"], env=environment, check=True)
    run = get_args_parser().parse_args(asked(shell))
    config = parse(
        run.training_script_args, lambda folder, init, default: default or image_model(recipe)
    )
    assert (config.recipe, config.stage, config.training.seed) == (recipe, stage, 9)
    assert config.architecture.vision.image_size == side
    before = {"1": "", "2": "stage1", "3": "stage2"}[stage]
    assert config.checkpoint.load == (str(runs / before) if before else "")
    is_first = recipe == "internvl_c" and stage == "1"
    assert config.init == (Init(language="words") if is_first else Init())
    assert config.checkpoint.moments == ("keep" if stage == "2" else "fresh")
    assert fits(config, ranks=8)
    subprocess.run([*command, "pack", stage], env=environment, check=True)
    args = asked_packing(shell)
    assert (args.template, args.model, args.tile_cap) == (recipe, recipe, str(pairs))
    assert (args.image_size or image_model(args.model).vision.image_size) == side
    assert args.capacity == pairs * {"clip": 77, "siglip": 64, "internvl_c": 80}[recipe]


@pytest.mark.parametrize(("recipe", "stage"), [("clip", "2"), ("blip2", "1"), ("siglip", "")])
def test_the_script_for_pairs_tells_its_stages(shell: dict[str, str], recipe: str, stage: str):
    command = ["bash", str(ROOT / "examples" / "contrastive" / "run.sh"), stage]
    done = subprocess.run(command, env=shell | {"RECIPE": recipe}, capture_output=True, text=True)
    assert done.returncode == 2 and "RECIPE=clip|siglip|internvl_c" in done.stderr
    assert not Path(shell["LOG"]).exists()


def test_blip2s_first_stage_names_options_that_exist(shell: dict[str, str], tmp_path: Path):
    parts = {"VISION": "eyes", "BERT": "bert", "DATA": "data", "PACKS": str(tmp_path / "packs")}
    command = ["bash", str(ROOT / "examples" / "blip2" / "run.sh")]
    subprocess.run([*command, "1", "--training.seed", "9"], env=shell | parts, check=True)
    run = get_args_parser().parse_args(asked(shell))
    config = parse(run.training_script_args, lambda folder, init, default: default)
    assert (config.recipe, config.stage, config.training.seed) == ("blip2", "1", 9)
    assert config.init == Init(vision="eyes", connector="bert")
    assert config.data.augment == ("half_crop", "flip") and fits(config, ranks=8)
    subprocess.run([*command, "pack1"], env=shell | parts, check=True)
    args = asked_packing(shell)
    assert (args.template, args.tile_cap, args.data_augment) == ("blip2_pairs", "42", True)


def test_instructblips_script_names_options_that_exist(shell: dict[str, str], tmp_path: Path):
    parts = {"QFORMER": "qformer", "LANGUAGE": "words", "BERT": str(tmp_path), "DATA": "data"}
    command = ["bash", str(ROOT / "examples" / "instructblip" / "run.sh")]
    subprocess.run([*command, "1", "--training.seed", "9"], env=shell | parts, check=True)
    run = get_args_parser().parse_args(asked(shell))
    config = parse(run.training_script_args, lambda folder, init, default: default)
    assert (config.recipe, config.stage, config.training.seed) == ("instructblip", "1", 9)
    assert config.init == Init(vision="qformer", connector="qformer", language="words")
    assert config.data.sampling == "sqrt" and fits(config, ranks=8)
    subprocess.run([*command, "pack"], env=shell | parts, check=True)
    args = asked_packing(shell)
    assert (args.template, args.qformer_tokenizer) == ("instructblip", str(tmp_path))


def test_fuyus_script_names_options_that_exist(shell: dict[str, str], tmp_path: Path):
    parts = {"MODEL": str(tmp_path), "JSONL": "chats.jsonl", "ROOT": "images"}
    command = ["bash", str(ROOT / "examples" / "fuyu" / "run.sh")]
    subprocess.run([*command, "1", "--training.seed", "9"], env=shell | parts, check=True)
    run = get_args_parser().parse_args(asked(shell))
    config = parse(run.training_script_args, lambda folder, init, default: default)
    assert (config.recipe, config.stage, config.training.seed) == ("fuyu", "1", 9)
    assert fits(config, ranks=8)
    subprocess.run([*command, "pack"], env=shell | parts, check=True)
    args = asked_packing(shell)
    assert (args.template, args.tiling, args.model) == ("fuyu", "patches", str(tmp_path))


@pytest.mark.parametrize("recipe", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwens_script_names_options_that_exist(shell: dict[str, str], tmp_path: Path, recipe: str):
    runs = tmp_path / "runs"
    parts = {"MODEL": str(tmp_path), "VISION": "eyes", "LANGUAGE": "words", "RECIPE": recipe}
    parts |= {"RUNS": str(runs), "PACKS": str(tmp_path / "packs"), "MAX_PIXELS": "784000"}
    parts |= {"JSONL": "chats.jsonl", "ROOT": "images"}
    before = {"2": "1", "3": "2", "sft": "3", "dpo": "sft"}
    if recipe == "qwen2_vl":
        before = {"2": "1", "sft": "2"}
    if recipe == "qwen3_vl":
        before = {"1": "0", "2": "1", "3": "2", "sft": "3"}
    first = "0" if recipe == "qwen3_vl" else "1"
    template = "qwen3_vl" if recipe == "qwen3_vl" else "qwen2_vl"
    command = ["bash", str(ROOT / "examples" / "qwen2_5_vl" / "run.sh")]
    for stage in RECIPES[recipe].stages:
        (runs / f"{stage}-hf").mkdir(parents=True)
        subprocess.run([*command, stage, "--training.seed", "9"], env=shell | parts, check=True)
        run = get_args_parser().parse_args(asked(shell))
        config = parse(run.training_script_args, lambda folder, init, default: default)
        assert (config.recipe, config.stage, config.training.seed) == (recipe, stage, 9)
        start = str(runs / before[stage]) if stage in before else ""
        assert config.checkpoint.load == (str(tmp_path) if stage == "finetune" else start)
        assert config.init == (Init(vision="eyes", language="words") if stage == first else Init())
        assert fits(config, ranks=8)
        subprocess.run([*command, "pack", stage], env=shell | parts, check=True)
        args = asked_packing(shell)
        assert (args.template, args.tiling) == (template, "native")
        assert args.capacity == RECIPES[recipe].stages[stage].capacity
        assert (args.max_pixels, args.preferences) == (784000, stage == "dpo")


@pytest.mark.parametrize(("given", "load"), [({}, "model"), ({"LOAD": "stage2"}, "stage2")])
def test_the_script_for_preferences_names_options_that_exist(
    shell: dict[str, str], tmp_path: Path, given: dict[str, str], load: str
):
    settings = given | {"MODEL": "model", "META": "meta.json", "REFERENCE": "seen", "STEPS": "7"}
    environment = shell | settings | {"PACKS": str(tmp_path / "packs")}
    command = ["bash", str(ROOT / "examples" / "preference" / "mpo.sh")]
    plain = ["--architecture.preference.bco", "0", "--architecture.preference.sft", "0"]
    subprocess.run([*command, "train", *plain], env=environment, check=True)
    config = parse(get_args_parser().parse_args(asked(shell)).training_script_args)
    assert (config.stage, config.checkpoint.load, config.training.steps) == ("mpo", load, 7)
    assert config.reference == "seen" and config.architecture.preference.bco == 0
    assert fits(config, ranks=32) and not fits(config, ranks=30)
    subprocess.run([*command, "pack", "--workers", "3"], env=environment, check=True)
    args = asked_packing(shell)
    assert (args.model, args.template, args.workers) == ("internvl2_5-8b", "internvl2_5", 3)
    assert args.preferences and args.out == str(tmp_path / "packs" / "mpo")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "bash mpo.sh pack | train" in done.stderr


@pytest.mark.parametrize(
    "recipe",
    [
        *("llava", "paligemma", "qwen2_5_vl", "fuyu", "contrastive", "blip2", "instructblip"),
        "preference",
    ],
)
def test_slurm_starts_a_recipes_stage(shell: dict[str, str], tmp_path: Path, recipe: str):
    job = {
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_GPUS_ON_NODE": "4",
    }
    parts = {"VISION": "eyes", "LANGUAGE": "words", "BERT": "bert", "QFORMER": "qformer"}
    asks = {"preference": "train"}
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    subprocess.run(
        ["bash", str(ROOT / "examples" / recipe / "slurm.sh"), asks.get(recipe, "1")],
        env=shell | job | parts | {"MODEL": str(tmp_path)},
        cwd=tmp_path,
        check=True,
    )
    options = get_args_parser().parse_args(asked(shell))
    found = options.nnodes, options.nproc_per_node, options.rdzv_endpoint
    assert found == ("2", "4", "node7:20123")
    config = parse(options.training_script_args, lambda folder, init, default: default)
    others = {"contrastive": ("clip", "1"), "preference": ("internvl", "mpo")}
    assert (config.recipe, config.stage) == others.get(recipe, (recipe, "1"))
