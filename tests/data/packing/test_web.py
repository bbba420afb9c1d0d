"""Annotations, images and packs from a web server that fails now and then."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from megavlm.data.packing.asked_job import make_job
from megavlm.data.packing.command_line import parse
from megavlm.data.packing.job import pack_dataset
from megavlm.data.packing.report import Report
from megavlm.data.records import readers
from megavlm.data.store.reader import Reader
from megavlm.io import remote
from megavlm.model_source import image_model
from tests.data.packing.faulty_server import Faulty

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install -e .[dev]")

RECORDS = 4
TOKENIZER = Path(__file__).parents[2] / "golden" / "tokenizer"


def pack(out: Path, annotation: str, *options: str) -> Report:
    arguments = f"--model tiny --tokenizer {TOKENIZER} --capacity 512 --workers 0".split()
    parsed = parse([*arguments, "--jsonl", annotation, "--out", str(out), *options])
    return pack_dataset(make_job(parsed, image_model("tiny")))


class Web:
    """Serve files by their paths, whole or in ranges.

    Args:
        has_ranges: whether the server answers a request for a range with that range.
    """

    def __init__(self, *, has_ranges: bool):
        self.has_ranges = has_ranges
        self.files: dict[str, bytes] = {}

    def __call__(self, environ: dict, start) -> list[bytes]:
        content = self.files.get(environ["PATH_INFO"])
        if content is None:
            start("404 Not Found", [("Content-Length", "0")])
            return [b""]
        wanted = environ.get("HTTP_RANGE", "").removeprefix("bytes=")
        headers = [("Accept-Ranges", "bytes")] if self.has_ranges else []
        if wanted and self.has_ranges:
            first, _, last = wanted.partition("-")
            end = min(int(last or len(content) - 1) + 1, len(content))
            headers.append(("Content-Range", f"bytes {first}-{end - 1}/{len(content)}"))
            content = content[int(first) : end]
        status = "206 Partial Content" if wanted and self.has_ranges else "200 OK"
        start(status, [*headers, ("Content-Length", str(len(content)))])
        return [content if environ["REQUEST_METHOD"] != "HEAD" else b""]


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def web(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Faulty, Web, str]]:
    """Serve the same records as lines and as an archive."""
    pytest.importorskip("werkzeug", reason="werkzeug is not installed: pip install -e .[dev]")
    from fsspec.config import conf
    from werkzeug.serving import make_server

    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(
        conf, "http", {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=2)}}
    )
    remote._remote_state.cache_clear()
    readers._look_into.cache_clear()
    site = Web(has_ranges=request.param)
    lines = []
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for number in range(RECORDS):
            file = io.BytesIO()
            Image.new("RGB", (50, 40), (number, 9, 9)).save(file, "PNG")
            site.files[f"/images/{number}.png"] = file.getvalue()
            lines.append(json.dumps({"image": f"{number}.png", "caption": f"picture {number}"}))
            for ending, content in (("png", file.getvalue()), ("txt", b"picture")):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    site.files["/lines.jsonl"] = "\n".join(lines).encode()
    site.files["/shard.tar"] = archive.getvalue()
    faulty = Faulty(site)
    server = make_server("127.0.0.1", 0, faulty, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield faulty, site, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("name", ["lines.jsonl", "shard.tar"])
def test_records_come_from_a_web_server_that_fails(
    web: tuple[Faulty, Web, str], tmp_path: Path, name: str
) -> None:
    faulty, site, address = web
    faulty.faults = {name: ["503", "cut"], "2.png": ["503"]}
    root = () if name.endswith("tar") else ("--root", f"{address}/images")
    if name.endswith("tar") and not site.has_ranges:
        with pytest.raises(ValueError, match="its server sends the whole file"):
            pack(tmp_path / "packs", f"{address}/{name}")
        return
    report = pack(tmp_path / "packs", f"{address}/{name}", *root)
    assert report.records == RECORDS and not report.rejects
    assert sum(faulty.seen.values()) == (2 if name.endswith("tar") else 3)
    reader = Reader(tmp_path / "packs")
    assert reader.check() and reader.manifest.totals.images == RECORDS


def test_packs_are_not_read_from_the_web(web: tuple[Faulty, Web, str]) -> None:
    with pytest.raises(ValueError, match="/packs: packs cannot be read from the web"):
        Reader(f"{web[2]}/packs")


def test_a_server_without_ranges_is_told(web: tuple[Faulty, Web, str]) -> None:
    _, site, address = web
    site.files["/long.txt"] = bytes(range(256)) * 1000
    with remote.open_file(f"{address}/long.txt") as file:
        assert file.read(10) == bytes(range(10))
        file.seek(128_000)
        if site.has_ranges:
            assert file.read(10) == bytes(range(10))
        else:
            with pytest.raises(OSError, match="sends the whole file .256,000 bytes"):
                file.read(10)


def test_a_file_that_is_not_there_is_told(web: tuple[Faulty, Web, str], tmp_path: Path) -> None:
    _, site, address = web
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        pack(tmp_path / "packs", f"{address}/nothing.jsonl")
    del site.files["/images/1.png"]
    report = pack(
        *(tmp_path / "packs", f"{address}/lines.jsonl", "--root", f"{address}/images"),
        "--max_rejects=1",
    )
    assert report.rejects == {"missing_image": 1}
