"""Files that were repaired are read again by the same command, and changed ones are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.data.images.tiling import Tiling
from megavlm.data.packing import job as packing
from megavlm.data.packing import scan_state
from megavlm.data.packing.asked_job import make_job
from megavlm.data.packing.command_line import parse
from megavlm.data.packing.job import Job, pack_dataset, plan_dataset
from megavlm.data.packing.plan import plan_packs
from megavlm.data.packing.windows import Windows
from megavlm.data.records.meta_file import read_meta, single_source
from megavlm.data.store.reader import Reader
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import load_tokenizer
from megavlm.model_source import image_model

GOLDEN = Path(__file__).parents[2] / "golden"


def job(folder: Path, out: str = "out", **settings) -> Job:
    given = {
        "sources": single_source(folder / "a.jsonl", folder),
        "tokenizer": str(GOLDEN / "tokenizer"),
        "out": str(folder / out) if out else "",
        "capacity": 512,
        "features_per_tile": 4,
        "tiling": Tiling(tile_size=16, max_tiles=1),
    }
    return Job(**{**given, **settings})


def chat(**fields) -> str:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    return json.dumps({"conversations": turns, **fields})


def save(path: Path, pixels: np.ndarray | None = None) -> bytes:
    Image.fromarray(np.zeros((20, 20), np.uint8) if pixels is None else pixels).save(path)
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "0.png")
    save(tmp_path / "3.png")
    lines = [chat(image=f"{index}.png", id=index) for index in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return tmp_path


def bytes_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("packs*")}


def test_missing_and_damaged_images_are_read_again(folder: Path):
    with pytest.raises(ValueError, match=r"2 of 4 records .* after missing or damaged media"):
        pack_dataset(job(folder))
    whole = save(folder / "1.png")
    (folder / "2.png").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"1 of 4 records .*(\n.*)*2.png \(image 0 of the record"):
        pack_dataset(job(folder))
    (folder / "2.png").write_bytes(whole)
    report = pack_dataset(job(folder))
    assert (report.records, report.packed_records, report.rejected) == (4, 4, 0)
    assert (folder / "out" / "rejects.jsonl").read_text() == ""
    assert not (folder / "out.rejects.jsonl").exists(), "the list of a run that failed is old"
    pack_dataset(job(folder, "fresh"))
    assert bytes_of(folder / "out") == bytes_of(folder / "fresh")


def test_records_that_are_left_out_for_another_reason_now_say_so(folder: Path):
    """Restored images may be damaged, or such that a filter does not want them."""
    facts = {
        "annotation": str(folder / "a.jsonl"),
        "root": str(folder),
        "filter": {"min_side": 20},
    }
    (folder / "meta.json").write_text(json.dumps({"a": facts}))
    sources = read_meta(folder / "meta.json")
    with pytest.raises(ValueError, match=r"^2 of 4 records .*(\n.*2: missing_image.*)"):
        pack_dataset(job(folder, sources=sources))
    (folder / "1.png").write_bytes(b"no image")
    save(folder / "2.png", np.zeros((19, 20), np.uint8))
    with pytest.raises(ValueError, match=r"^1 of 4 .* filter left 1 out.*(\n.*2: unreadable_ima)"):
        pack_dataset(job(folder, sources=sources))
    report = pack_dataset(job(folder, sources=sources, max_rejects=0.25))
    assert report.rejects == {"filtered_size": 1, "unreadable_image": 1}
    lines = (folder / "out" / "rejects.jsonl").read_text().splitlines()
    reasons = [(each["line"], each["reason"]) for each in map(json.loads, lines)]
    assert reasons == [(2, "unreadable_image"), (3, "filtered_size")]
    pack_dataset(job(folder, "fresh", sources=sources, max_rejects=0.25))
    assert bytes_of(folder / "out") == bytes_of(folder / "fresh")
    assert (folder / "fresh" / "rejects.jsonl").read_text().splitlines() == lines


def test_media_that_change_between_the_passes_are_read_again(folder: Path, monkeypatch):
    frames = folder / "frames"
    frames.mkdir()
    for index in range(3):
        save(frames / f"{index}.png")
    lines = [chat(image="0.png"), chat(video="frames")]
    (folder / "a.jsonl").write_text("\n".join(lines))
    tiling = Tiling(tile_size=16, max_tiles=4)
    before = (frames / "1.png").read_bytes()

    def plan(*samples, **settings):
        (frames / "1.png").unlink()
        save(folder / "0.png", np.zeros((20, 40), np.uint8))
        return plan_packs(*samples, **settings)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="2 of 2 records"):
        patch.setattr(packing, "plan_packs", plan)
        pack_dataset(job(folder, tiling=tiling))
    reasons = [json.loads(line) for line in (folder / "out.rejects.jsonl").open()]
    assert [(each["line"], each["reason"]) for each in reasons] == [(1, "changed"), (2, "changed")]
    (frames / "1.png").write_bytes(before)
    save(folder / "0.png")
    report = pack_dataset(job(folder, tiling=tiling))
    assert (report.packed_records, report.rejected) == (2, 0)
    pack_dataset(job(folder, "fresh", tiling=tiling))
    assert bytes_of(folder / "out") == bytes_of(folder / "fresh")


def test_shards_that_were_written_before_a_repair_are_written_again(folder: Path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "complete", stop)
        pack_dataset(job(folder, max_rejects=0.5))
    for index in (1, 2):
        save(folder / f"{index}.png")
    report = pack_dataset(job(folder, max_rejects=0.5))
    assert (report.packed_records, report.rejected) == (4, 0)
    pack_dataset(job(folder, "fresh"))
    assert bytes_of(folder / "out") == bytes_of(folder / "fresh")


def test_no_shard_of_other_rows_is_left(folder: Path, monkeypatch):
    """An image is gone when the scan begins anew, and there is a shard less."""
    monkeypatch.setattr("megavlm.data.packing.plan.LEAST_PACKS_PER_SHARD", 1)
    save(folder / "1.png")
    save(folder / "2.png")
    wanted = job(folder, max_rejects=0.5, capacity=256)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "complete", stop)
        pack_dataset(wanted)
    assert len(list((folder / "out.partial").glob("packs-*.bin"))) == 4
    (folder / "out.partial" / "scan" / "scan.json").write_bytes(b"")  # a power cut
    (folder / "2.png").unlink()
    assert pack_dataset(wanted).packs == 3
    pack_dataset(job(folder, "fresh", max_rejects=0.5, capacity=256))
    assert bytes_of(folder / "out") == bytes_of(folder / "fresh")


def test_a_changed_annotation_file_is_named(folder: Path):
    with pytest.raises(ValueError, match="2 of 4 records"):
        pack_dataset(job(folder))
    (folder / "a.jsonl").write_text(chat(image="0.png"))
    with pytest.raises(FileExistsError) as caught:
        pack_dataset(job(folder))
    assert f"{folder / 'a.jsonl'} has changed since" in str(caught.value)
    assert f"remove {folder / 'out.partial'}" in str(caught.value)


def test_the_report_lists_sources_and_keys_that_were_not_read(folder: Path):
    save(folder / "1.png")
    save(folder / "2.png")
    (folder / "b.jsonl").write_text('{"text": "hello", "score": 1}\n{"text": "world"}\n')
    meta = folder / "meta.json"
    facts = {
        "pictures": {"annotation": str(folder / "a.jsonl"), "root": str(folder), "length": 4},
        "texts": {"annotation": str(folder / "b.jsonl"), "repeat_time": 3},
    }
    meta.write_text(json.dumps(facts))
    report = pack_dataset(job(folder, sources=read_meta(meta)))
    pictures, texts = report.sources
    assert (pictures.records, pictures.samples, pictures.images, pictures.unread) == (
        4,
        4,
        4,
        {"id": 4},
    )
    assert (texts.records, texts.samples, texts.text_only, texts.unread) == (2, 6, 6, {"score": 1})
    assert pictures.tokens + texts.tokens == report.tokens
    assert pictures.share + texts.share == pytest.approx(1)
    assert "keys not read: id 4" in report.text()
    assert "of all; 4 images of 4 tiles" in report.text()
    facts["pictures"]["length"] = 5
    meta.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="'pictures' has 4 records, but its length is 5"):
        pack_dataset(job(folder, "other", sources=read_meta(meta)))
    del facts["pictures"]["length"]
    meta.write_text(json.dumps(facts))
    assert pack_dataset(job(folder, "other", sources=read_meta(meta))).records == 6


def test_the_figures_of_sources_add_up_to_those_of_all_if_the_second_pass_rejects(folder: Path):
    save(folder / "1.png")
    (folder / "2.png").write_bytes(save(folder / "1.png")[:-30])
    (folder / "b.jsonl").write_text('{"text": "hello"}\n')
    facts = {
        "pictures": {"annotation": str(folder / "a.jsonl"), "root": str(folder), "repeat_time": 2},
        "texts": {"annotation": str(folder / "b.jsonl")},
    }
    (folder / "meta.json").write_text(json.dumps(facts))
    wanted = job(folder, sources=read_meta(folder / "meta.json"), max_rejects=0.5)
    planned = plan_dataset(wanted)
    assert [each.samples for each in planned.sources] == [8, 1]
    report = pack_dataset(wanted)
    pictures, texts = report.sources
    assert (pictures.rejected, pictures.samples, pictures.images, texts.samples) == (1, 6, 6, 1)
    for name in ("samples", "tokens", "tiles", "images"):
        assert sum(vars(each)[name] for each in report.sources) == vars(report)[name], name
    written = json.loads((folder / "out" / "manifest.json").read_text())["sources"]
    assert [each["samples"] for each in written] == [6, 1]


def test_images_of_more_than_eight_bits(folder: Path, capfd):
    values = np.arange(400, dtype=np.uint16).reshape(20, 20) * 150
    save(folder / "0.png", values)
    (folder / "a.jsonl").write_text(chat(image="0.png"))
    report = pack_dataset(job(folder))
    assert report.sources[0].deep_images == 1
    assert "1 images (1 of more than 8 bits a channel) of " in report.text()
    assert "1 images have more than 8 bits" in capfd.readouterr().err
    pack_dataset(job(folder, "scaled", deep_images="scale"))
    assert "more than 8 bits" not in capfd.readouterr().err
    (folder / "scaled.png").write_bytes(Reader(folder / "scaled").read(0).image(0))
    assert np.array_equal(
        np.asarray(Image.open(folder / "scaled.png")), np.rint(values / 257).astype(np.uint8)
    )
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        pack_dataset(job(folder, "refused", deep_images="reject", max_rejects=1.0))
    save(folder / "0.png")
    pack_dataset(job(folder, "taken", deep_images="reject"))
    assert "more than 8 bits" not in capfd.readouterr().err


def test_a_dry_run_can_decode_images(folder: Path):
    save(folder / "1.png")
    (folder / "2.png").write_bytes(save(folder / "3.png")[:-30])
    assert plan_dataset(job(folder, out="")).rejected == 0
    with pytest.raises(ValueError, match="1 of 4 records"):
        plan_dataset(job(folder, out="", scan_pixels=True))


def test_long_documents_become_windows(folder: Path):
    (folder / "a.jsonl").write_text(
        json.dumps(
            {
                "texts": ["one two three " * 30, None, "four five " * 20, None, None, "six"],
                "images": [None, "0.png", None, "3.png", "0.png", None],
            }
        )
    )
    whole = pack_dataset(job(folder, "whole", capacity=4096))
    cut = pack_dataset(job(folder, "cut", windows=Windows(tokens=100, images=1)))
    assert (whole.records, whole.samples, cut.records) == (1, 1, 1)
    assert cut.samples > 4
    assert (cut.tokens, cut.images) == (whole.tokens, 3)
    reader = Reader(folder / "cut")
    for index in range(len(reader)):
        pack = reader.read(index)
        assert pack.lengths.max() <= 100
        assert np.bincount(pack.images["sample"], minlength=1).max() <= 1


def test_repaired_records_go_to_their_places_across_chunks(folder: Path, monkeypatch):
    names = [f"{index}.png" for index in range(23)]
    damaged = {0, 4, 5, 6, 11, 12, 22}
    for index, name in enumerate(names):
        (folder / name).unlink(missing_ok=True)
        if index not in damaged:
            save(folder / name)
    lines = [chat(image=name) for name in names]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl").write_text("\n".join(reversed(lines)))
    sources = (
        *single_source(folder / "a.jsonl", folder),
        *single_source(folder / "b.jsonl", folder),
    )
    monkeypatch.setattr(scan_state, "ROWS_PER_CHUNK", 5)
    with pytest.raises(ValueError, match="14 of 46 records"):
        pack_dataset(job(folder, sources=sources))
    for repaired in ({4, 11, 12}, damaged):
        for index in repaired:
            save(folder / names[index])
        if repaired is not damaged:
            with pytest.raises(ValueError, match="8 of 46 records"):
                pack_dataset(job(folder, sources=sources))
    pack_dataset(job(folder, sources=sources))
    pack_dataset(job(folder, "fresh", sources=sources))
    assert bytes_of(folder / "out") == bytes_of(folder / "fresh")


def test_the_system_message_is_in_packs_manifest_and_template(folder: Path):
    (folder / "a.jsonl").write_text(chat())
    tokenizer = load_tokenizer(str(GOLDEN / "tokenizer"))
    own = "You are 12 {words}'."
    expected = {
        None: chat_format("internvl2_5").system_message,
        own: own,
        "none": "",
    }
    for number, (given, message) in enumerate(expected.items()):
        out = folder / str(number)
        flags = [] if given is None else ["--system", given]
        paths = ["--jsonl", str(folder / "a.jsonl"), "--out", str(out), "--workers", "0"]
        options = parse([*paths, "--tokenizer", str(GOLDEN / "tokenizer"), *flags])
        pack_dataset(make_job(options, image_model("tiny")))
        reader = Reader(out)
        text = tokenizer.decode(reader.read(0).tokens)
        begin = f"<|im_start|>system\n{message}<|im_end|>\n" if message else ""
        assert text == f"{begin}<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        assert reader.manifest.system_message == message
        packed = load_tokenizer(str(out / "tokenizer"))
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        rendered = packed.apply_chat_template(turns, tokenize=False)
        assert rendered.rstrip("\n") == text.rstrip("\n")
