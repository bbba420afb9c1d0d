"""Chat exports as transformers 4 loads them: tokenizer, settings, language part."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import InternVLForConditionalGeneration

from megavlm.convert.hf import convert
from megavlm.convert.hf.json_files import read_json
from megavlm.data.loading.rotary_positions import rotary_positions
from megavlm.data.sample import Image
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS, load_tokenizer
from tests.convert.models import KINDS, make_hf
from tests.convert.part_folders import make_tokenizer
from tests.convert.qwen_vl_models import KINDS as QWEN_VL
from tests.convert.qwen_vl_models import make_qwen_vl
from tests.convert.tokenizer_kinds import make_tokenizers

VERSIONS = ("4.37.2", "4.49.0", "4.55.4")
SCRIPT = Path(__file__).parents[1] / "load_elsewhere.py"
TEXTS = (
    "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nthe fox  said\n\n 3?<|im_end|>\n",
    "<|im_start|>assistant\ndef f(x):\n    return 你好 🙂<|im_end|>\n",
    "the quick brown fox",
)
TOKENS = (5, 300, 17, 80, 12, 200, 7)
# tokenizers 0.15, which 4.37 needs, puts a space after a special token of such a tokenizer.
INEXACT = {("4.37.2", "sentencepiece with a space", "fast")}
# LlamaForCausalLM of 4.37 takes heads of hidden_size / heads, whatever head_dim says.
WITHOUT_HEAD_SIZE = {("4.37.2", "mistral"), ("4.37.2", "internlm3")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write chat exports of each family and of each kind of tokenizer."""
    root = tmp_path_factory.mktemp("exported")
    made = {}
    for kind, architecture in KINDS.items():
        native = make_hf(root / f"{kind} hf", architecture, torch.float32)
        start = convert.import_(native, root / f"{kind} start")
        made[kind] = convert.export(start, root / kind, dialect="chat")
    for name, folder in make_tokenizers(root / "tokenizers").items():
        start = convert.import_(root / "qwen2 hf", root / f"{name} start", tokenizer=folder)
        made[name] = convert.export(start, root / name, dialect="chat")
    return made


@pytest.mark.loaders
@pytest.mark.parametrize("version", VERSIONS)
def test_chat_exports_load_in_transformers(version: str, exported: dict[str, Path]) -> None:
    installs = Path(os.environ.get("MEGAVLM_LOADERS", "/nowhere"))
    if not (installs / version).is_dir():
        pytest.skip(f"transformers {version} is not installed apart; run bash tests/loaders.sh")
    folders = {name: str(path) for name, path in exported.items()}
    job = {"folders": folders, "texts": TEXTS, "tokens": TOKENS}
    found = load_elsewhere(job, str(installs / version))
    assert found["version"] == version
    languages = 0
    for name, read in found["folders"].items():
        wanted = [load_tokenizer(exported[name])(text)["input_ids"] for text in TEXTS]
        for speed in ("fast", "slow"):
            assert "error" not in read[speed], f"{name} {speed}: {read[speed]}"
            if (version, name, speed) not in INEXACT:
                assert read[speed]["ids"] == wanted, f"{name} {speed}"
            assert read[speed]["chat"].endswith("<|im_start|>user\nHi<|im_end|>\n"), name
            assert read[speed]["inputs"] == ["attention_mask", "input_ids"], name
        if (version, name) in WITHOUT_HEAD_SIZE:
            assert "size mismatch" in read["logits"]["error"], name
        elif read["logits"] is not None:
            assert "error" not in read["logits"], f"{name}: {read['logits']}"
            logits = _logits(exported[name])
            assert (
                torch.tensor(read["logits"]["values"]) - logits
            ).abs().max() < 1e-4 * logits.abs().max()
            languages += 1
    print(f"transformers {version}: {len(folders)} folders, {languages} language models")
    assert languages >= 4


def load_elsewhere(job: dict[str, Any], path: str) -> dict[str, Any]:
    """Return what another process reads, with ``path`` in front of others."""
    answer = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=json.dumps(job),
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.loaders
@pytest.mark.parametrize(
    ("version", "families"),
    [("4.55.4", ("qwen2_vl", "qwen2_5_vl")), ("4.57.1", ("qwen3_vl",))],
)
def test_exports_of_qwens_load_in_transformers_4(
    tmp_path: Path, version: str, families: tuple[str, ...]
) -> None:
    installs = Path(os.environ.get("MEGAVLM_LOADERS", "/nowhere"))
    if not (installs / version).is_dir():
        pytest.skip(f"transformers {version} is not installed apart; run bash tests/loaders.sh")
    make_tokenizer(tmp_path / "words", IMAGE_TOKEN_SETS["qwen2_vl"].added)
    token = load_tokenizer(tmp_path / "words").convert_tokens_to_ids("<|image_pad|>")
    folders = {}
    for kind, architecture in QWEN_VL.items():
        vision = architecture.vision
        # Image and video have patches for tiles of two by two.
        if vision.grid != 2 or vision.family not in families:
            continue
        source = make_qwen_vl(
            tmp_path / f"{kind} hf", architecture, torch.float32, image_token_id=token
        )
        start = convert.import_(source, tmp_path / f"{kind} start", tokenizer=tmp_path / "words")
        folders[kind] = str(convert.export(start, tmp_path / kind))
    theirs = load_elsewhere({"models": folders}, str(installs / version))
    # transformers 5 would let the text behind the video go on elsewhere.
    positions = {kind: found["positions"] for kind, found in theirs["models"].items()}
    ours = load_elsewhere({"models": folders, "positions": positions}, "")
    assert theirs["version"] == version != ours["version"]
    for kind, found in theirs["models"].items():
        assert not any(found["others"].values()), kind
        vision = QWEN_VL[kind].vision
        marks = read_json(Path(folders[kind]) / "config.json")
        tokens = np.array(found["tokens"])
        tokens[tokens == marks["video_token_id"]] = token
        shown = _image_and_video(apart=vision.family == "qwen3_vl")
        length = np.array([len(tokens)])
        wanted = rotary_positions(tokens, length, shown, token, vision.tokens_per_second)
        assert np.array_equal(np.array(found["positions"])[:, 0], wanted.of_tokens), kind
        expected = torch.tensor(ours["models"][kind]["values"])
        assert (torch.tensor(found["values"]) - expected).abs().max() < 1e-4, kind


def _image_and_video(*, apart: bool) -> list[Image]:
    """Return the image and the frames of ``seeing`` in ``load_elsewhere``; ``apart`` says whether
    each pair of frames is an image of its own in the text.
    """
    still = Image(encoded=b"", width=1, height=1, columns=3, rows=5, tiles=15)
    return [
        still,
        *(
            dataclasses.replace(
                still,
                columns=1,
                rows=2,
                tiles=0 if number % 2 else 2,
                frames=2 - number % 2 if apart else 8 - number,
                interval=2.0,
            )
            for number in range(8)
        ),
    ]


def _logits(exported: Path) -> torch.Tensor:
    """Return the logits of the native folder that an export was made of."""
    native = exported.with_name(f"{exported.name} hf")
    if not native.is_dir():
        native = exported.with_name("qwen2 hf")
    model = InternVLForConditionalGeneration.from_pretrained(native, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([TOKENS])).logits[0]
