"""Every option that the examples and the documents name exists."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megavlm.config.cli import parse
from megavlm.config.options import options
from megavlm.config.recipes import RECIPES
from megavlm.convert.hf import command_line as convert_command_line
from megavlm.data.packing import command_line
from megavlm.planner.estimate import Hardware
from megavlm.score import command_line as score_line

ROOT = Path(__file__).parents[2]
TEXTS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "Dockerfile",
    *sorted(ROOT.glob("examples/**/*.sh")),
]
# Those of lmms_eval are lmms-eval's.
YAMLS = sorted(set(ROOT.glob("examples/**/*.yaml")) - set(ROOT.glob("examples/lmms_eval/*")))
# Options of programs that are not ours: docker, pip, useradd; sbatch, srun, scancel and pyxis;
# lmms-eval and VLMEvalKit.
_OTHERS = """
    --all --gpus --ipc --ulimit --network --device --cap-add --build-arg --format --quiet
    --disable-pip-version-check --no-compile --uid --create-home
    --shell --nodes --job-name --ntasks-per-node --gpus-per-node --cpus-per-task --exclusive
    --time --signal --requeue --open-mode --output
    --kill-on-bad-exit --container-image --container-mounts --container-workdir
    --model_args --include_path --batch_size --output_path --log_samples --judge
"""
OTHERS = set(_OTHERS.split())


def known() -> set[str]:
    """Options of the trainer, of torchrun, and of the scripts in tools and examples."""
    found = {flag for option in options().values() for flag in option.flags} | {
        "--config",
        "--for",
        "--print_config",
        "--help",
        "--quick",  # of tests/run.sh
    }
    # Documents also name sections, such as ``--fp8.*``.
    found |= {flag.rpartition(".")[0] for flag in found if "." in flag}
    found |= {flag for action in get_args_parser()._actions for flag in action.option_strings}
    for parser in (command_line.make_parser(), score_line.make_parser()):
        found |= {flag for action in parser._actions for flag in action.option_strings}
    found |= {f"--{field.name}" for field in dataclasses.fields(Hardware)}
    for path in [
        *ROOT.glob("tools/**/*.py"),
        *ROOT.glob("examples/**/*.py"),
        Path(command_line.__file__),
        Path(convert_command_line.__file__),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Constant(value=str(text)) if re.fullmatch(r"--[a-z_]+", text):
                    found.add(text)
                case ast.Call(func=ast.Name(id="parse_parts"), keywords=counts):
                    found |= {f"--{count.arg}" for count in counts}
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_option_that_a_text_names_exists(path: Path):
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*[\w]", path.read_text()))
    assert not named - known() - OTHERS


def test_an_option_that_does_not_exist_is_seen():
    assert (
        "--parallel.recompute" in known() and "--parallel.recompute_layers" not in known() | OTHERS
    )


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_is_a_configuration(path: Path):
    # One that several stages share leaves the stage to the command.
    shared = [] if "stage:" in path.read_text() else ["--stage", "1"]
    config = parse(["--config", str(path), "--data.train", "packs", *shared])
    assert config.model or RECIPES[config.recipe].architecture


def test_what_the_image_copies_is_there():
    copied = [
        line.split()[1:-1]
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
    ]
    assert copied and all((ROOT / name).exists() for names in copied for name in names)


def test_the_programs_inside_the_dockerfile_are_python():
    programs = re.findall(
        r"<<'PYTHON'.*?\n(.*?)\nPYTHON\n", (ROOT / "Dockerfile").read_text(), re.DOTALL
    )
    assert len(programs) == 2
    for program in programs:
        compile(program, "Dockerfile", "exec")
