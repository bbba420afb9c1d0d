"""Values of the tools' options are refused before anything is computed."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

from megavlm.config import option_types
from megavlm.config.option_types import count_from, new_file, new_picture

RUN = ["--stage", "1", "--model", "internvl2_5-1b"]
# A tool, its arguments but the file that it writes, and the options that name that file.
WRITERS = {
    "inspect_dataset": (["."], ["--json", "--picture"]),
    "pack_dataset": ([], ["--json", "--picture"]),
    "plan_parallel": ([*RUN, "--gpus", "8"], ["--json", "--picture"]),
    "plot_schedule": (RUN, ["--json", "--picture"]),
    "report": (["."], ["--out"]),
    "show_parameters": (RUN, ["--json"]),
    "verify_export": (["--load", ".", "--hf", ".", "--data", "."], ["--json"]),
}
EVALUATED = [".", "--tasks", __file__, "--out", "out"]
COUNTS = [
    ("chat", [".", "What?", "--ranks", "0"], "--ranks: 0: must be at least 1"),
    ("chat", [".", "What?", "--image"], "--image: expected at least one argument"),
    ("evaluate", [*EVALUATED, "--ranks", "two"], "--ranks: 'two' is no whole number"),
    ("evaluate", [*EVALUATED, "--max_new_tokens", "0"], "--max_new_tokens: 0: must be at least 1"),
    ("evaluate", [*EVALUATED, "--shown", "-1"], "--shown: -1: must be at least 0"),
    ("inspect_dataset", [".", "--packs", "-1"], "--packs: -1: must be at least 0"),
    ("report", [".", "--answers", "-2"], "--answers: -2: must be at least 0"),
]


def _refusal(
    tool: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Return what a tool says of arguments with which it ends at once."""
    monkeypatch.setattr("sys.argv", [tool, *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tools.{tool}").main()
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "flag"), [(tool, flag) for tool, (_, flags) in WRITERS.items() for flag in flags]
)
def test_a_file_that_cannot_be_written_is_refused_first(
    tool: str,
    flag: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "missing" / "file.png"
    said = _refusal(tool, [*WRITERS[tool][0], flag, str(file)], monkeypatch, capsys)
    assert f"argument {flag}: {file}: there is no folder {file.parent}; make it first" in said
    assert not file.parent.exists()


@pytest.mark.parametrize(("tool", "arguments", "words"), COUNTS)
def test_a_count_that_cannot_be_is_refused(
    tool: str,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert f"argument {words}" in _refusal(tool, arguments, monkeypatch, capsys)


def test_what_a_new_file_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.json").touch()
    assert new_file("old.json") == Path("old.json")
    assert new_file("new.json") == Path("new.json") and not Path("new.json").exists()
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder; name a file in it"):
        new_file(str(tmp_path))
    monkeypatch.setattr(option_types.os, "access", lambda path, mode: False)  # root may do all
    for name in ("old.json", "new.json"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{name}: no permission to write"):
            new_file(name)


def test_a_picture_is_of_a_kind_that_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert new_picture(str(tmp_path / "a.PNG")) == tmp_path / "a.PNG"
    for name in ("a.foo", "a"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must end with \..*\.png"):
            new_picture(str(tmp_path / name))
    monkeypatch.setattr(option_types, "find_spec", lambda name: None)
    with pytest.raises(argparse.ArgumentTypeError, match=r"pip install 'megavlm\[quickstart\]'"):
        new_picture(str(tmp_path / "a.png"))


def test_a_count_begins_where_it_says() -> None:
    assert (count_from(0)("0"), count_from(1)("12")) == (0, 12)
