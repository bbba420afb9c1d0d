"""The figures of a dataset, as text, as JSON and as a picture."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from megavlm.data.inspect.statistics import overview_of, to_text
from megavlm.data.store.reader import Reader
from tests.data.native_packs import write_native
from tests.data.samples import make_dataset, store_packs
from tests.data.store.test_pairs import MANIFEST as PAIRS
from tests.data.store.test_pairs import random_pairs
from tools.inspect_dataset import main

TOOL = Path(__file__).parents[3] / "tools" / "inspect_dataset.py"
TOKENIZER = Path(__file__).parents[2] / "golden" / "tokenizer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    make_dataset(folder, packs=40, samples_per_pack=4, shard_bytes=20000)
    return folder


def test_figures(folder):
    reader = Reader(folder)
    overview = overview_of(reader, check=True)
    packs = [reader.read(pack_id) for pack_id in range(40)]
    tiles = np.array([pack.tiles for pack in packs])
    assert overview.checked_packs == 40
    assert overview.fill == pytest.approx(np.mean([len(pack.tokens) for pack in packs]) / 256)
    assert overview.packs_without_tiles == np.count_nonzero(tiles == 0)
    spread = overview.spreads["tiles"]
    assert (spread.mean, spread.min, spread.max) == (tiles.mean(), tiles.min(), tiles.max())
    assert spread.percentiles[50] == np.median(tiles)
    assert sum(spread.bars) == 40 and len(spread.bar_edges) == len(spread.bars) + 1
    # Drawing 512 of 40 packs all but surely finds the largest.
    assert overview.load_imbalance == pytest.approx(tiles.max() / tiles.mean(), rel=1e-3)


def test_wide_figures_have_few_bars(folder):
    for spread in overview_of(Reader(folder)).spreads.values():
        assert sum(spread.bars) == 40 and len(spread.bars) <= 12


def test_text(folder):
    overview = overview_of(Reader(folder))
    text = to_text(overview)
    # As the packer's report tells it: what the slowest rank has above the mean.
    assert f"load imbalance of 512 ranks {overview.load_imbalance - 1:.1%}\n" in text
    assert "packs 40 of 256 tokens" in text
    assert (
        "random.jsonl" in text and "rejected records: none" in text and "context_token_id" in text
    )
    assert "checksums" not in text


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("option", "status"), [("--check", 0), ("--help", 0), ("--packs=99 --picture=p.png", 1)]
)
def test_a_reader_that_stops_early_is_no_error(folder, unbuffered, option, status):
    """As with ``| head -1``; the pipe breaks at a print, or at the last flush. Errors stay
    errors.
    """
    environment = {
        "PYTHONPATH": str(TOOL.parents[1]),
        "PATH": "/usr/bin:/bin",
        "PYTHONUNBUFFERED": unbuffered,
    }
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, TOOL, folder, *option.split()],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr.count(b"\n")) == (status, status)


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(TOOL.parents[1]), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, TOOL, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_tool(folder, tmp_path):
    done = run(folder, "--json", tmp_path / "overview.json", "--check")
    assert done.returncode == 0, done.stderr
    assert "checksums of all 40 packs are right" in done.stdout
    figures = json.loads((tmp_path / "overview.json").read_text())
    assert (
        figures["manifest"]["totals"]["packs"] == 40
        and figures["spreads"]["tiles"]["percentiles"]["50"] >= 0
    )
    wrong = run(tmp_path)
    assert (
        wrong.returncode == 1
        and wrong.stderr.startswith("error: ")
        and "manifest.json" in wrong.stderr
    )
    far = run(folder, "--packs", "39", "40", "--picture", str(tmp_path / "packs.png"))
    assert (far.returncode, far.stderr) == (1, "error: --packs 40: the packs are 0 to 39\n")


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from megavlm.data.inspect.draw import draw, lay_out, spans
    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.data.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(TOKENIZER)
    context = tokenizer.convert_tokens_to_ids("<img>")  # packs may have any token there
    make_dataset(
        tmp_path, packs=3, image_share=0.9, vocab_size=len(tokenizer), context_token_id=context
    )
    dataset = PackedDataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer: missing"):
        draw(dataset, [0], tmp_path / "packs.png")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    draw(dataset, [0, 2], tmp_path / "packs.png")
    with Picture.open(tmp_path / "packs.png") as picture:
        assert picture.width == 1540 and len(picture.convert("RGB").getcolors(10**6)) > 20
    pack = dataset.reader.read(0)
    pieces = list(spans(dataset, pack, tokenizer.decode))
    supervised = tokenizer.decode(
        pack.tokens[: pack.lengths[0]][pack.supervised[: pack.lengths[0]]].tolist()
    )
    assert pieces[0][0] == f"\n[sample 0: random.jsonl:1, {pack.lengths[0]} tokens]\n"
    assert supervised in [text for text, colour in pieces if colour == "#0a7d33"]
    shown = int((pack.tokens[: pack.lengths[0]] == context).sum())
    assert shown and f"{tokenizer.decode([context])} x {shown}" in dict(pieces)
    runs = list(lay_out(iter([("ab\ncd", "red"), ("x" * 300, "blue")])))
    assert [(run.line, run.column, len(run.text)) for run in runs] == [
        (0, 0, 2),
        (1, 0, 2),
        (1, 2, 138),
        (2, 0, 140),
        (3, 0, 22),
    ]


def test_images_of_any_size_are_drawn_as_a_whole(tmp_path):
    pytest.importorskip("matplotlib")
    from megavlm.data.inspect.draw import draw, pictures
    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.data.text.tokenizer import load_tokenizer

    write_native(tmp_path, [[(140, 84), (28, 56)], *[[(28, 28)]] * 10, [], []], per_pack=11)
    dataset = PackedDataset(tmp_path)
    pack = dataset.reader.read(0)
    found = pictures(dataset, pack)
    assert [picture.shape for picture in found[:3]] == [(84, 140, 3), (56, 28, 3), (28, 28, 3)]
    assert len(found) == 10
    with Picture.open(io.BytesIO(pack.image(0))) as picture:
        assert np.array_equal(found[0], np.asarray(picture))
    assert pictures(dataset, dataset.reader.read(1)) == []
    load_tokenizer(TOKENIZER).save_pretrained(tmp_path / "tokenizer")
    draw(dataset, [0, 1], tmp_path / "packs.png")
    with Picture.open(tmp_path / "packs.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 20


def test_pairs_are_told_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from megavlm.data.inspect.draw import draw, spans
    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.data.text.tokenizer import load_tokenizer

    store_packs(tmp_path, random_pairs(2), PAIRS)
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = to_text(overview_of(Reader(tmp_path), check=True))
    assert "samples 16 in 8 pairs of chosen and rejected, images" in text
    assert "preferences             True" in text
    dataset = PackedDataset(tmp_path)
    draw(dataset, [0, 1], tmp_path / "packs.png")
    with Picture.open(tmp_path / "packs.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    pack = dataset.reader.read(0)
    told = [text for text, _ in spans(dataset, pack, lambda ids: "x") if text.startswith("\n[")]
    assert [each.split(":")[0] for each in told] == [
        f"\n[pair {pair}, {name}" for pair in range(4) for name in ("chosen", "rejected")
    ]


def test_letters_that_no_font_has_are_told_in_one_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from megavlm.data.inspect import draw as drawing
    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.data.text.tokenizer import load_tokenizer

    monkeypatch.setattr(drawing, "CHINESE_FONTS", ("no such font", "Noto Sans CJK SC"))
    monkeypatch.setattr(drawing, "_chinese_fonts", list)
    monkeypatch.setattr(drawing, "spans", lambda *_: iter([("一二", "red")]))
    make_dataset(tmp_path, packs=1)
    load_tokenizer(TOKENIZER).save_pretrained(tmp_path / "tokenizer")
    drawing.draw(PackedDataset(tmp_path), [0], tmp_path / "packs.png")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "2 letters that no installed font has" in told


def test_packs_to_draw_without_a_picture_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--packs", "1"])
    assert "--packs: no effect without --picture" in capsys.readouterr().err
