"""Annotations, images and packs in a local S3 server, which also fails on purpose: with 503, with
bodies that end too early, and with answers that never come.
"""

from __future__ import annotations

import io
import json
import tarfile
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.loader import batches
from megavlm.data.loading.order import Plan
from megavlm.data.packing.asked_job import make_job
from megavlm.data.packing.command_line import parse
from megavlm.data.packing.job import pack_dataset
from megavlm.data.packing.report import Report
from megavlm.data.records import readers
from megavlm.data.store.reader import Reader
from megavlm.io import remote
from megavlm.model_source import image_model
from tests.data.packing.faulty_server import Faulty

pytest.importorskip("moto", reason="moto is not installed: pip install -e .[dev]")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e .[remote]")

TOKENIZER = Path(__file__).parents[2] / "golden" / "tokenizer"
IMAGES = 6


@pytest.fixture(scope="module")
def server():
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    faulty = Faulty(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, faulty, threaded=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{http.server_port}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/data", method="PUT"))
    yield faulty, address
    http.shutdown()


@pytest.fixture
def bucket(server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Fill a bucket with the same records as lines, as a list, as an archive and as a table."""
    import fsspec
    from fsspec.config import conf

    faulty, address = server
    faulty.faults.clear()
    faulty.seen.clear()
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    remote._remote_state.cache_clear()
    readers._look_into.cache_clear()
    settings = {
        "key": "k",
        "secret": "s",
        "client_kwargs": {"endpoint_url": address, "region_name": "us-east-1"},
        "config_kwargs": {"read_timeout": 1, "retries": {"max_attempts": 0}},
    }
    monkeypatch.setitem(conf, "s3", settings)
    store = fsspec.filesystem("s3")
    records = []
    parts = io.BytesIO()
    with tarfile.open(fileobj=parts, mode="w") as archive:
        for number in range(IMAGES):
            file = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(file, "JPEG")
            store.pipe_file(f"data/images/{number}.jpg", file.getvalue())
            records.append({"image": f"{number}.jpg", "caption": f"picture {number}"})
            for ending, content in (("jpg", file.getvalue()), ("txt", b"picture")):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    store.pipe_file("data/lines.jsonl", "\n".join(map(json.dumps, records)).encode())
    store.pipe_file("data/list.json", json.dumps(records).encode())
    store.pipe_file("data/shard-0.tar", parts.getvalue())
    store.pipe_file("data/shard-1.tar", parts.getvalue())
    store.pipe_file("data/table.parquet", _table(records))
    store.invalidate_cache()
    return faulty, store


def _table(records: list[dict]) -> bytes:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(records), file, row_group_size=2)
    return file.getvalue()


def pack(out: Path, annotation: str, *options: str) -> Report:
    arguments = f"--model tiny --tokenizer {TOKENIZER} --capacity 512 --workers 0".split()
    options = parse([*arguments, "--jsonl", annotation, "--out", str(out), *options])
    return pack_dataset(make_job(options, image_model("tiny")))


@pytest.mark.parametrize(
    ("name", "records"),
    [
        ("lines.jsonl", IMAGES),
        ("list.json", IMAGES),
        ("table.parquet", IMAGES),
        ("shard-*.tar", 2 * IMAGES),
    ],
)
def test_annotations_and_images_in_a_store_that_fails_now_and_then(
    bucket, tmp_path: Path, name: str, records: int
):
    faulty, _ = bucket
    ending = name.rpartition(".")[2]
    faulty.faults = {f".{ending}": ["503", "cut", "silence"], "3.jpg": ["cut", "503", "cut"]}
    root = () if ending == "tar" else ("--root", "s3://data/images")
    report = pack(tmp_path / "packs", f"s3://data/{name}", *root)
    assert sum(faulty.seen.values()) == (3 if ending == "tar" else 6)
    assert report.records == records and not report.rejects
    reader = Reader(tmp_path / "packs")
    assert reader.check() and reader.manifest.totals.images == records


def test_packs_are_read_from_a_store_that_fails(bucket, tmp_path: Path):
    faulty, store = bucket
    pack(tmp_path / "packs", "s3://data/lines.jsonl", "--root", "s3://data/images")
    store.put(f"{tmp_path / 'packs'}/", "data/packs/", recursive=True)
    faulty.faults = {".bin": ["503", "cut"], ".idx": ["cut"]}
    assert Reader("s3://data/packs").check() == Reader(tmp_path / "packs").check()
    assert sum(faulty.seen.values()) == 3


def test_loader_workers_read_packs_from_a_store(bucket, tmp_path: Path):
    """They are forked, and a client of S3 does not survive that."""
    faulty, store = bucket
    pack(tmp_path / "packs", "s3://data/lines.jsonl", "--root", "s3://data/images")
    store.put(f"{tmp_path / 'packs'}/", "data/trained/", recursive=True)
    faulty.faults = {".bin": ["503"]}
    local = PackedDataset(tmp_path / "packs")
    plan = Plan(num_packs=len(local), seed=1)
    found = list(batches(PackedDataset("s3://data/trained/"), plan, range(3), workers=1))
    assert found == list(batches(local, plan, range(3)))
    assert faulty.seen["503"] == 1


def test_what_does_not_come_is_rejected_with_its_place_and_read_again_later(bucket, tmp_path: Path):
    faulty, store = bucket
    faulty.faults = {"2.jpg": ["503"] * 99}
    store.rm("data/images/4.jpg")
    arguments = ("s3://data/lines.jsonl", "--root", "s3://data/images")
    with pytest.raises(ValueError, match="2 of 6 records"):
        pack(tmp_path / "packs", *arguments)
    lines = (tmp_path / "packs.rejects.jsonl").read_text().splitlines()
    rejects = {each["line"]: each for each in map(json.loads, lines)}
    assert {line: each["reason"] for line, each in rejects.items()} == {
        3: "unreachable",
        5: "missing_image",
    }
    assert rejects[3]["file"] == "s3://data/lines.jsonl"
    assert "s3://data/images/2.jpg" in rejects[3]["detail"]
    faulty.faults.clear()
    report = pack(tmp_path / "packs", *arguments, "--max_rejects", "0.5")
    assert report.rejects == {"missing_image": 1}


def test_annotations_that_do_not_come_end_the_job(bucket, tmp_path: Path):
    faulty, _ = bucket
    for name in ("lines.jsonl", "shard-0.tar"):
        faulty.faults = {name: ["503"] * 99}
        with pytest.raises(OSError, match=f"s3://data/{name}: no answer after 5 attempts"):
            pack(tmp_path / name, f"s3://data/{name}", "--root", "s3://data/images")
        remote._remote_state.cache_clear()
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        pack(tmp_path / "packs", "s3://data/nothing.jsonl")


def test_a_url_in_a_record_must_lie_below_the_root(bucket, tmp_path: Path):
    _, store = bucket
    records = [
        {"image": "s3://data/images/1.jpg", "caption": "inside"},
        {"image": "s3://other/1.jpg", "caption": "outside"},
        {"image": "s3://data/images/../lines.jsonl", "caption": "outside"},
    ]
    store.pipe_file("data/urls.jsonl", "\n".join(map(json.dumps, records)).encode())
    report = pack(
        tmp_path / "packs",
        "s3://data/urls.jsonl",
        "--root=s3://data/images",
        "--max_rejects=1",
    )
    assert report.rejects == {"outside_root": 2}
