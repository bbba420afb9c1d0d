"""Test ``check`` on the files beside the weights, and the refusal of partial folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megavlm.convert.hf import check_files, convert
from tests.convert.chat import make_chat
from tests.convert.models import KINDS, make_hf
from tests.convert.tool import run_tool


@pytest.mark.parametrize("kind", ["qwen2 tied", "internlm2", "mistral"])
def test_files_come_back_equal_in_both_dialects(tmp_path: Path, kind: str) -> None:
    native = make_hf(tmp_path / "native", KINDS[kind])
    chat = make_chat(native, tmp_path / "chat", KINDS[kind])
    for folder in (native, chat):
        found = check_files.check_files(folder)
        assert [file.name for file in found] == ["config", "tokenizer", "usage"]
        assert not any(file.changes or file.note for file in found), found


def test_a_file_that_changes_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_hf(tmp_path / "hf")
    native = check_files.HUB_FORMATS["native"]
    written = native.write_files

    def spoil(out: Path, *arguments: object) -> None:
        written(out, *arguments)
        path = out / "config.json"
        settings = json.loads(path.read_text())
        settings["text_config"]["rms_norm_eps"] = 1e-3
        path.write_text(json.dumps(settings))
        path = out / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_patches": 5}))
        path = out / "tokenizer.json"
        path.write_text(path.read_text().replace("<quad>", "<quod>"))

    spoilt = dataclasses.replace(native, write_files=spoil)
    monkeypatch.setitem(check_files.HUB_FORMATS, "native", spoilt)
    assert run_tool("check", "--hf", str(folder)) == 1
    told = capsys.readouterr().out
    assert "layernorm_epsilon" in told and "max_tiles: 12, 5 once exported" in told
    assert "once exported" in told.split("tokenizer ")[1].split("usage")[0]


def test_an_export_that_would_be_refused_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = make_chat(make_hf(tmp_path / "hf"), tmp_path / "chat", KINDS["qwen2"])
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"template": "vicuna"}))
    assert run_tool("check", "--hf", str(folder)) == 1
    assert "lacks </s>" in capsys.readouterr().out


def test_partial_folders_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf", shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    content = {path: path.read_bytes() for path in shards[1:3]}
    for path in content:
        path.unlink()
    pattern = f"2 of {len(shards)} files of weights are missing: {shards[1].name}, {shards[2].name}"
    with pytest.raises(FileNotFoundError, match=pattern):
        convert.import_(folder, tmp_path / "start")
    for path, data in content.items():
        path.write_bytes(data)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json: no such file, and {shards[0].name}"):
        convert.import_(folder, tmp_path / "start")
    assert not (tmp_path / "start").exists()
