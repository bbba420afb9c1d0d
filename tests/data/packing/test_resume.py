"""A packing that is stopped anywhere resumes from what is on the disk, and comes to the same bytes
as one that was not.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megavlm.data.packing import job, scan, work_folder
from megavlm.data.packing.executors import ordered_map
from megavlm.data.packing.job import pack_dataset, plan_dataset
from megavlm.data.records.meta_file import single_source
from megavlm.data.store.reader import Reader
from megavlm.io import atomic
from tests.data.packing.test_job import _job, data  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[3]
SLOW_PACKING = """
import sys, time
from pathlib import Path
from megavlm.data.packing import job, plan, write_shards
from tests.data.packing.test_job import _job
plan.LEAST_PACKS_PER_SHARD = 1
def slowly(task):
    time.sleep(0.2)
    return write_shards.write_shard(task)
job.write_shard = slowly
job.pack_dataset(_job(Path(sys.argv[1]), Path(sys.argv[2])))
"""


class Stop(BaseException):
    """What ends a run in the middle."""


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("megavlm.data.packing.plan.LEAST_PACKS_PER_SHARD", 2)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith("report")
    }


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("seed", range(4))
def test_stopped_anywhere(data, tmp_path, monkeypatch, seed):  # noqa: F811
    """Each run ends after a few results of the workers, of either pass, until one gets through."""
    settings = {"name": "bad" if seed == 0 else "good", "max_rejects": 0.6, "capacity": 1024}
    pack_dataset(_job(data, tmp_path / "whole", **settings))
    rng = random.Random(seed)
    runs = 0
    written = 0
    monkeypatch.setattr(scan, "SAVE_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(scan, "RECORDS_PER_TASK", 3)
    ordered_map = job.ordered_map

    def stopping(function, tasks, workers, executor="processes"):
        nonlocal written
        left = rng.randint(1, 1 if seed == 0 else 6)
        for result in ordered_map(function, tasks, workers, executor):
            if not left:
                raise Stop
            left -= 1
            written += function is job.write_shard
            yield result

    monkeypatch.setattr(job, "ordered_map", stopping)
    monkeypatch.setattr(scan, "ordered_map", stopping)
    while not (tmp_path / "out").exists():
        runs += 1
        assert runs < 60
        try:
            report = pack_dataset(_job(data, tmp_path / "out", **settings))
        except Stop:
            assert not (tmp_path / "out").exists()
    assert runs > 1
    assert report.records == report.packed_records + report.rejected == (10 if seed == 0 else 90)
    expected = files(tmp_path / "whole")
    found = files(tmp_path / "out")
    assert expected.keys() == found.keys() and all(
        expected[name] == found[name] for name in expected
    )
    assert (
        written <= len([name for name in found if name.endswith(".bin")]) + runs
    )  # none twice, but one that a stop may have caught


def test_killed(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("megavlm.data.packing.plan.LEAST_PACKS_PER_SHARD", 1)
    pack_dataset(_job(data, tmp_path / "whole"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_PACKING, data, tmp_path / "out"], env=environment
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial" / "packs-00002.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    with pytest.raises(FileExistsError, match="another process is at work"):
        pack_dataset(_job(data, tmp_path / "out"))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = (tmp_path / "out.partial" / "packs-00001.bin").stat().st_ino
    pack_dataset(_job(data, tmp_path / "out"))
    assert (tmp_path / "out" / "packs-00001.bin").stat().st_ino == kept
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def stop_at(monkeypatch, name: str, run) -> None:
    """Run a job that is stopped where it calls a function of ``job``."""

    def stopped(*arguments, **settings):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(job, name, stopped)
        with pytest.raises(Stop):
            run()


def changed(path: Path, **facts) -> None:
    """Set facts of a file of JSON; those that are None are removed."""
    content = json.loads(path.read_text()) | facts
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_damaged_states_of_a_stopped_job_are_named(data, tmp_path, monkeypatch):  # noqa: F811
    settings = {"name": "bad", "max_rejects": 0.6}
    out = tmp_path / "out"
    stop_at(monkeypatch, "complete", lambda: pack_dataset(_job(data, out, **settings)))
    partial = tmp_path / "out.partial"
    kept = tmp_path / "kept"
    partial.rename(kept)
    state = json.loads((kept / "scan" / "scan.json").read_text())
    source = state["sources"][0]
    scan_json = partial / "scan" / "scan.json"
    rejects = partial / "scan" / "rejects.0.jsonl"
    cases = [
        (lambda: changed(scan_json, rows=None), r"scan.json: facts missing: \['rows'\]"),
        (lambda: changed(scan_json, rows=str(state["rows"])), "scan.json: rows: '5' is no int"),
        (lambda: changed(scan_json, more=1), r"scan.json: facts .*unknown: \['more'\]"),
        (lambda: changed(scan_json, sources={}), "scan.json: sources: {} is no list"),
        (lambda: changed(scan_json, sources=[]), "scan.json: tells of 0 sources, not of 1"),
        (
            lambda: changed(scan_json, sources=[source | {"rejects": {"changed": "many"}}]),
            r"scan.json: sources\[0\]: rejects: changed: 'many' is no int",
        ),
        (lambda: scan_json.write_text("[]"), "scan.json: facts missing"),
        (lambda: (partial / "scan" / "rows.0.bin").unlink(), "rows.0.bin: has 0 of 160 bytes"),
        (lambda: os.truncate(partial / "scan" / "rows.0.bin", 96), "rows.0.bin: has 96 of 160"),
        (lambda: os.truncate(rejects, 40), "rejects.0.jsonl: has 40 of"),
        (lambda: rejects.write_bytes(b" " * 9999), "rejects.0.jsonl: Expecting value"),
    ]
    for damage, words in cases:
        shutil.copytree(kept, partial)
        damage()
        with pytest.raises(ValueError, match=words) as caught:
            pack_dataset(_job(data, out, **settings))
        assert f"--out {out}: " in str(caught.value)
        assert f"; remove {partial} to begin anew" in str(caught.value)
        shutil.rmtree(partial)
    for content in ("[]", '{"sources": [1]}', '{"sources": [{"path": 1}]}', '{"sources": 5}'):
        shutil.copytree(kept, partial)
        (partial / "job.json").write_text(content)
        with pytest.raises(FileExistsError, match="left by another job .* or remove it"):
            pack_dataset(_job(data, out, **settings))
        shutil.rmtree(partial)
    # A shard whose marker is damaged is written again.
    whole = tmp_path / "whole"
    pack_dataset(_job(data, whole, **settings))
    for marker in ('{"sources": {}}', "[]", '{"shard": {"name": 5}}'):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, partial)
        (partial / "packs-00000.json").write_text(marker)
        pack_dataset(_job(data, out, **settings))
        assert files(out) == files(whole)


def test_a_scan_that_begins_anew_keeps_no_shard(data, tmp_path, monkeypatch):  # noqa: F811
    """They were planned with the samples of another scan."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    shutil.copy(folder / "2.png", folder / "cut.png")
    settings = {"name": "bad", "max_rejects": 0.6}
    stop_at(
        monkeypatch, "complete", lambda: pack_dataset(_job(folder, tmp_path / "out", **settings))
    )
    shutil.copy(folder / "0.png", folder / "nowhere.png")
    (tmp_path / "out.partial" / "scan" / "scan.json").write_bytes(b"")
    pack_dataset(_job(folder, tmp_path / "out", **settings))
    pack_dataset(_job(folder, tmp_path / "whole", **settings))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_is_removed_while_a_job_packs_is_not_missing_from_the_result(
    data,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    partial = tmp_path / "out.partial"
    write = job.write_shard

    def run(remove):
        def write_and_remove(task):
            written = write(task)
            remove()
            return written

        with monkeypatch.context() as patch:
            patch.setattr(job, "write_shard", write_and_remove)
            pack_dataset(_job(data, tmp_path / "out"))

    with pytest.raises(FileNotFoundError, match="packs-00000.bin"):
        run((partial / "packs-00000.bin").unlink)
    with pytest.raises(OSError, match="packs-00000.bin: has changed since it was written"):
        run(lambda: os.truncate(partial / "packs-00000.bin", 64))
    run(lambda: shutil.rmtree(partial / "tokenizer"))
    pack_dataset(_job(data, tmp_path / "whole"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert files(tmp_path / "out" / "tokenizer") == files(tmp_path / "whole" / "tokenizer")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("content", [b"", b'{"half'])
@pytest.mark.parametrize("cut", ["scan/scan.json", "packs-00000.json", "job.json"])
def test_a_state_file_that_a_power_cut_emptied_is_as_good_as_absent(
    data,  # noqa: F811
    tmp_path,
    monkeypatch,
    cut,
    content,
):
    stop_at(monkeypatch, "complete", lambda: pack_dataset(_job(data, tmp_path / "out")))
    assert (tmp_path / "out.partial" / cut).stat().st_size > len(content)
    (tmp_path / "out.partial" / cut).write_bytes(content)
    pack_dataset(_job(data, tmp_path / "out"))
    pack_dataset(_job(data, tmp_path / "whole"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_a_packing_that_is_stopped_when_all_is_written_does_none_of_it_again(
    data,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    def stopped(folder, target):
        if target.name == "renamed":
            os.replace(folder, target)
        raise Stop

    for name in ("out", "renamed"):
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "publish", stopped)
            with pytest.raises(Stop):
                pack_dataset(_job(data, tmp_path / name))
    # In the moment after, what only a job that resumes needs is still there, and does no harm.
    assert Reader(tmp_path / "renamed").check() > 1
    before = (tmp_path / "out.partial" / "packs-00001.bin").stat().st_ino
    pack_dataset(_job(data, tmp_path / "out"))
    assert (tmp_path / "out" / "packs-00001.bin").stat().st_ino == before
    pack_dataset(_job(data, tmp_path / "whole"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(work_folder.fcntl, "flock", refuse)
    with (
        pytest.raises(OSError, match="--out x: the file system of .* has no locks"),
        work_folder.partial_folder(tmp_path / "out.partial", {}, flag="--out x"),
    ):
        pass


@pytest.mark.slow
def test_workers_end_with_a_packing_that_is_killed():
    code = (
        "import time; from megavlm.data.packing.executors import ordered_map;"
        " list(ordered_map(time.sleep, [60] * 8, 2))"
    )
    process = psutil.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 120
    started = []
    while (
        len(started) < 4
    ):  # two workers, the process that forks them, and the one that cleans up after all
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
        started = process.children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive


def test_another_job_does_not_go_on(data, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(ValueError, match="no token </s>, which --template llava_v1 needs"):
        pack_dataset(_job(data, tmp_path / "out", template="llava_v1"))  # leaves nothing to resume
    stop_at(monkeypatch, "plan_packs", lambda: pack_dataset(_job(data, tmp_path / "out")))
    with pytest.raises(
        FileExistsError,
        match=r"left by another job \(capacity: 1024 there, 2048 requested\)",
    ):
        pack_dataset(_job(data, tmp_path / "out", capacity=2048))
    with pytest.raises(
        FileExistsError, match=r"other job \(sources\[0\].root: '.*' there, 'other'"
    ):
        sources = single_source(data / "good.jsonl", "other")
        pack_dataset(_job(data, tmp_path / "out", sources=sources))
    (tmp_path / "copy.jsonl").write_bytes((data / "good.jsonl").read_bytes())
    assert pack_dataset(_job(data, tmp_path / "out", max_rejects=0.5)).packed_records == 90


def test_a_dry_run_writes_nothing(data, tmp_path):  # noqa: F811
    bad = single_source(data / "bad.jsonl", data)
    with pytest.raises(ValueError, match="were rejected; .* or give a larger --max_rejects. The"):
        plan_dataset(_job(data, tmp_path / "bad", sources=bad))
    planned = plan_dataset(_job(data, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
    packed = pack_dataset(_job(data, tmp_path / "out"))
    for name in (
        "records",
        "packed_records",
        "rejects",
        "samples",
        "packs",
        "tokens",
        "tiles",
        "fill",
        "tile_cap",
        "lengths",
        "caps",
    ):
        assert getattr(planned, name) == getattr(packed, name)
    assert (
        "dry run" in planned.text()
        and packed.to_json() == (tmp_path / "out" / "report.json").read_text()
    )


@pytest.mark.slow
def test_ray_packs_the_same(data, tmp_path, monkeypatch):  # noqa: F811
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("megavlm.data.packing.plan.LEAST_PACKS_PER_SHARD", 2)
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        report = pack_dataset(_job(data, tmp_path / "ray", executor="ray"))
    finally:
        ray.shutdown()
    pack_dataset(_job(data, tmp_path / "here"))
    assert report.packed_records == 90
    assert files(tmp_path / "ray") == files(tmp_path / "here")


def _signalled(number: int) -> int:
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getppid(), signal.SIGUSR1)  # the server that forks workers
    assert "transformers.utils.type_validators" in sys.modules  # imported by the server, for all
    return number


def pack_under_signals() -> None:
    """Run tasks that send the signal; called in a process of its own, since the server of this one
    may have been started by another test.
    """
    assert list(ordered_map(_signalled, range(3), 2)) == [0, 1, 2]


def test_workers_go_on_after_the_signal_that_asks_for_a_checkpoint() -> None:
    """A scheduler sends it to all processes of a job, which may still pack its data."""
    script = f"from {__name__} import pack_under_signals; pack_under_signals()"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
