"""Annotations and images in a local server of Google's storage, which also fails on purpose: with
503, with bodies that end too early, and with answers that never come.
"""

from __future__ import annotations

import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.data.records import readers
from megavlm.data.store.reader import Reader
from megavlm.io import remote
from tests.data.packing.faulty_server import Faulty
from tests.data.packing.test_remote import pack

# Not imported here: what is set for it must be set before.
pytestmark = pytest.mark.skipif(
    find_spec("gcsfs") is None or find_spec("gcp_storage_emulator") is None,
    reason="not installed: pip install -e .[gcs] gcp-storage-emulator",
)

IMAGES = 6


class Forward:
    """A WSGI application that asks another server for files and facts."""

    def __init__(self, address: str) -> None:
        self.address = address

    def __call__(self, environ: dict, start: Callable) -> Iterable[bytes]:
        request = urllib.request.Request(f"{self.address}{environ['RAW_URI']}")
        if "HTTP_RANGE" in environ:
            request.add_header("Range", environ["HTTP_RANGE"])
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        body = answer.read()
        kind = answer.headers.get("Content-Type") or "application/octet-stream"
        start(
            f"{answer.status} {answer.reason}",
            [("Content-Type", kind), ("Content-Length", str(len(body)))],
        )
        return [body]


@pytest.fixture(scope="module")
def server():
    from gcp_storage_emulator.server import create_server
    from werkzeug.serving import make_server

    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket="data")
    emulator.start()
    port = emulator._api._httpd.server_address[1]
    inside = f"http://127.0.0.1:{port}"
    faulty = Faulty(Forward(inside))
    http = make_server("127.0.0.1", 0, faulty, threaded=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield faulty, inside, f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    emulator.stop()


@pytest.fixture
def bucket(server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Fill a bucket with records as lines, and their images."""
    import aiohttp
    from fsspec.config import conf

    faulty, inside, address = server
    faulty.faults.clear()
    faulty.seen.clear()
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    remote._remote_state.cache_clear()
    readers._look_into.cache_clear()
    limit = aiohttp.ClientTimeout(total=None, sock_read=1)
    settings = {"token": "anon", "endpoint_url": address, "requests_timeout": limit}
    monkeypatch.setitem(conf, "gs", settings)
    for number in range(IMAGES):
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        put(inside, f"images/{number}.jpg", file.getvalue())
    records = [{"image": f"{n}.jpg", "caption": f"picture {n}"} for n in range(IMAGES)]
    put(inside, "lines.jsonl", "\n".join(map(json.dumps, records)).encode())
    remote.open_system("gs://data")[0].invalidate_cache()
    return faulty, inside


def put(address: str, name: str, content: bytes) -> None:
    url = f"{address}/upload/storage/v1/b/data/o?uploadType=media&name={name}"
    kind = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(url, content, kind, method="POST"))


def test_annotations_and_images_in_a_store_that_fails_now_and_then(bucket, tmp_path: Path):
    faulty, _ = bucket
    faulty.faults = {".jsonl": ["503", "cut", "silence"], "3.jpg": ["cut", "503", "cut"]}
    report = pack(tmp_path / "packs", "gs://data/lines.jsonl", "--root", "gs://data/images")
    assert sum(faulty.seen.values()) == 6
    assert report.records == IMAGES and not report.rejects
    reader = Reader(tmp_path / "packs")
    assert reader.check() and reader.manifest.totals.images == IMAGES


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_what_does_not_come_is_rejected_with_its_place_and_read_again_later(
    bucket, tmp_path: Path, fault: str
):
    faulty, inside = bucket
    faulty.faults = {"2.jpg": [fault] * 99}
    url = f"{inside}/storage/v1/b/data/o/images%2F4.jpg"
    urllib.request.urlopen(urllib.request.Request(url, method="DELETE"))
    arguments = ("gs://data/lines.jsonl", "--root", "gs://data/images")
    with pytest.raises(ValueError, match="2 of 6 records"):
        pack(tmp_path / "packs", *arguments)
    # The client makes no attempts of its own, but asks twice for facts that end too early.
    assert faulty.seen[fault] == remote.ATTEMPTS * (2 if fault == "cut" else 1)
    lines = (tmp_path / "packs.rejects.jsonl").read_text().splitlines()
    rejects = {each["line"]: each for each in map(json.loads, lines)}
    assert {line: each["reason"] for line, each in rejects.items()} == {
        3: "unreachable",
        5: "missing_image",
    }
    assert "gs://data/images/2.jpg" in rejects[3]["detail"]
    faulty.faults.clear()
    report = pack(tmp_path / "packs", *arguments, "--max_rejects", "0.5")
    assert report.rejects == {"missing_image": 1}


def test_annotations_that_do_not_come_end_the_job(bucket, tmp_path: Path):
    faulty, _ = bucket
    faulty.faults = {"lines.jsonl": ["503"] * 99}
    with pytest.raises(OSError, match="gs://data/lines.jsonl: no answer after 5 attempts"):
        pack(tmp_path / "packs", "gs://data/lines.jsonl", "--root", "gs://data/images")
