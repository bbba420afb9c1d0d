"""Uploads of exports, to a server that speaks the hub's interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import AutoModelForImageTextToText

from megavlm.convert.hf import convert
from tests.convert.hub_server import TOKEN, Hub, hub_server
from tests.convert.models import make_hf
from tests.convert.tool import run_tool


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub for the tool, which has its token."""
    with hub_server() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        # The storage behind xet is not imitated; the hub takes large files by LFS as well.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkpoint."""
    root = tmp_path_factory.mktemp("push")
    return convert.import_(make_hf(root / "hf"), root / "start")


def test_the_uploaded_files_are_those_of_the_export(hub: Hub, start: Path, tmp_path: Path) -> None:
    arguments = ["export", "--load", str(start), "--private", "--push_to_hub", "somebody/tiny"]
    assert run_tool(*arguments, "--out", str(tmp_path / "out")) == 0
    files = {
        str(path.relative_to(tmp_path / "out")): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert hub.repositories == {"somebody/tiny": files}
    assert hub.private == {"somebody/tiny": True}
    for name, content in hub.repositories["somebody/tiny"].items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "downloaded")
    # Again, into the repository that is there now.
    assert run_tool(*arguments, "--out", str(tmp_path / "again")) == 0


def test_a_refusal_of_the_hub_comes_before_the_work(
    hub: Hub,
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    arguments = ["export", "--load", str(start), "--out", str(tmp_path / "out")]
    assert run_tool(*arguments, "--push_to_hub", "somebody/tiny") == 2
    told = capsys.readouterr().err
    assert "--push_to_hub somebody/tiny: " in told and "401" in told and "hf auth login" in told
    assert run_tool(*arguments, "--push_to_hub", "some body") == 2
    assert "nothing was exported" in capsys.readouterr().err
    assert run_tool(*arguments, "--private") == 2
    assert "--private: no effect" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_outlives_an_upload_that_fails(
    hub: Hub, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hub.refuses = "/commit/"
    out = tmp_path / "out"
    arguments = ["export", "--load", str(start), "--out", str(out)]
    assert run_tool(*arguments, "--push_to_hub", "somebody/tiny") == 2
    assert f"upload it with: hf upload somebody/tiny {out} ." in capsys.readouterr().err
    AutoModelForImageTextToText.from_pretrained(out)
