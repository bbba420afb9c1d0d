"""The first pass gives up early where no record can be used, goes on where it was, and keeps little
in memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megavlm.data.packing import job as packing
from megavlm.data.packing import scan
from megavlm.data.packing.executors import ordered_map
from megavlm.data.packing.job import pack_dataset
from megavlm.data.packing.scan_state import MOST_UNREAD_KEYS
from megavlm.data.records.meta_file import read_meta
from megavlm.io.progress import Progress
from tests.data.packing.test_repair import bytes_of, chat, job, save

USELESS = "{}\n"


def test_a_scan_in_which_nothing_can_be_used_ends_early(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(USELESS * 2500 + chat())
    with pytest.raises(ValueError, match=r"^2016 of the first 2016 records \(100.00%\)"):
        pack_dataset(job(tmp_path, max_rejects=1.0))
    (tmp_path / "a.jsonl").write_text(chat() + "\n" + USELESS * 2500)
    assert pack_dataset(job(tmp_path, "other", max_rejects=1.0)).rejected == 2500


def test_a_scan_that_ended_early_goes_on_when_its_images_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "SAVE_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(scan, "RECORDS_PER_TASK", 20)
    monkeypatch.setattr(scan, "HOPELESS_RECORDS", 60)
    (tmp_path / "a.jsonl").write_text((chat(image="0.png") + "\n") * 90)
    with pytest.raises(ValueError, match=r"^60 of the first 60 records "):
        pack_dataset(job(tmp_path))
    save(tmp_path / "0.png")
    report = pack_dataset(job(tmp_path))
    assert (report.records, report.packed_records) == (90, 90)


def test_records_that_a_filter_leaves_out_are_no_reason_to_give_up(tmp_path: Path) -> None:
    long = '{"text": "' + "long " * 100 + '"}'
    (tmp_path / "a.jsonl").write_text((chat() + "\n") * 2100 + f"{USELESS}{long}")
    facts = {"annotation": str(tmp_path / "a.jsonl"), "filter": {"min_tokens": 300}}
    (tmp_path / "meta.json").write_text(json.dumps({"a": facts}))
    sources = read_meta(tmp_path / "meta.json")
    report = pack_dataset(job(tmp_path, sources=sources))
    assert (report.records, report.packed_records) == (2102, 1)
    with pytest.raises(ValueError, match=r"^1 of 2102 records .*filter left 2100 out") as caught:
        pack_dataset(job(tmp_path, "strict", sources=sources, max_rejects=0))
    # What ends the job is shown first.
    first, *others = str(caught.value).partition("The first:\n")[2].splitlines()
    assert "a.jsonl:2101: conversation: " in first
    assert len(others) == 4 and all(": filtered_length: " in line for line in others)
    (tmp_path / "a.jsonl").write_text((chat() + "\n") * 2100)
    with pytest.raises(ValueError, match=r"^0 of 2100 records .*filter left 2100 out"):
        pack_dataset(job(tmp_path, "none", sources=read_meta(tmp_path / "meta.json")))


def test_more_samples_than_rows_can_be_counted_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([chat()] * 5))
    monkeypatch.setattr(scan, "MOST_SAMPLES", 4)
    with pytest.raises(ValueError, match=r"^more than 4 samples, .*--data\.train$"):
        pack_dataset(job(tmp_path))
    monkeypatch.setattr(scan, "MOST_SAMPLES", 5)
    assert pack_dataset(job(tmp_path, "most")).packed_records == 5


def test_names_that_are_data_are_not_all_kept(tmp_path: Path) -> None:
    """Keys of records are, since there are few of them."""
    lines = [{"text": "a", "kept": 1, **{f"{n}.{k}": 1 for k in range(9)}} for n in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (source,) = pack_dataset(job(tmp_path)).sources
    assert source.unread["kept"] == 100 and len(source.unread) == MOST_UNREAD_KEYS


class Stop(BaseException):
    """What ends a run in the middle."""


def test_progress_goes_on_where_a_stopped_packing_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, int, list[int], list[str]]] = []

    class Seen(Progress):
        def __init__(self, what: str, unit: str, total: int, done: int = 0) -> None:
            super().__init__(what, unit, total, done)
            self.amounts = [done]
            self.notes: list[str] = []
            shown.append((what, total, self.amounts, self.notes))

        def add(self, amount: int, note: str = "") -> None:
            super().add(amount, note)
            self.amounts.append(amount)
            self.notes.append(note)

    left = 0

    def stopping(function, tasks, workers, executor="processes"):
        nonlocal left
        for task in tasks:
            if not left:
                raise Stop
            left -= 1
            yield function(task)

    for module in (scan, packing):
        monkeypatch.setattr(module, "Progress", Seen)
        monkeypatch.setattr(module, "ordered_map", stopping)
    monkeypatch.setattr(scan, "SAVE_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(scan, "RECORDS_PER_TASK", 2)
    monkeypatch.setattr("megavlm.data.packing.plan.LEAST_PACKS_PER_SHARD", 2)
    save(tmp_path / "0.png")
    lines = [chat(image="0.png")] * 4 + ["{}"] + [chat()] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    settings = {"max_rejects": 0.5, "capacity": 256}
    for results in (3, 2, 99):  # of workers, before the run ends
        left = results
        try:
            report = pack_dataset(job(tmp_path, **settings))
        except Stop:
            continue
    runs = {
        work: [each[1:] for each in shown if each[0] == work] for work in ("reading", "writing")
    }
    size = (tmp_path / "a.jsonl").stat().st_size
    for work, total in (("reading", size), ("writing", report.packs)):
        (_, first, _), (whole, second, notes) = runs[work]
        assert second[0] == sum(first) > 0
        assert sum(second) == whole == total
        assert len(second) > 1 and notes
    assert runs["reading"][1][2][-1] == "8 records, 1 rejected"
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("packs*.bin"))
    assert runs["writing"][1][2][-1] == f"{stored / 1e6:,.0f} MB, 0 rejected"
    pack_dataset(job(tmp_path, "whole", **settings))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_what_was_written_after_the_last_save_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [chat(), "{}"] * 5
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def stopping(function, tasks, workers, executor="processes"):
        for number, task in enumerate(tasks):
            if number == 8:
                raise Stop
            yield function(task)
            monkeypatch.setattr(scan, "SAVE_INTERVAL_SECONDS", 0.0 if number < 3 else 1e9)

    with monkeypatch.context() as patch:
        patch.setattr(scan, "RECORDS_PER_TASK", 1)
        patch.setattr(scan, "ordered_map", stopping)
        with pytest.raises(Stop):
            pack_dataset(job(tmp_path, max_rejects=0.5))
        state = json.loads((tmp_path / "out.partial" / "scan" / "scan.json").read_text())
        assert state["tasks"] == 4
        assert len((tmp_path / "out.partial" / "scan" / "rows.0.bin").read_bytes()) == 4 * 32
        patch.setattr(scan, "ordered_map", ordered_map)
        pack_dataset(job(tmp_path, max_rejects=0.5))
    pack_dataset(job(tmp_path, "whole", max_rejects=0.5))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    rejects = [(tmp_path / name / "rejects.jsonl").read_text() for name in ("out", "whole")]
    assert rejects[0] == rejects[1] and rejects[0].count("\n") == 5


@pytest.mark.parametrize(
    ("length", "repeat", "is_right"), [(5, 1, True), (4, 1, False), (6, 2, False), (9, 0.5, True)]
)
def test_the_files_of_a_source_have_its_length_together(
    tmp_path: Path, length: int, repeat: float, is_right: bool
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([chat()] * 3))
    (tmp_path / "a-1.jsonl").write_text("\n".join([chat()] * 2))
    facts = {"annotation": str(tmp_path / "a*.jsonl"), "length": length, "repeat_time": repeat}
    (tmp_path / "meta.json").write_text(json.dumps({"a": facts}))
    wanted = job(tmp_path, sources=read_meta(tmp_path / "meta.json"))
    if is_right:
        assert pack_dataset(wanted).records == (5 if repeat == 1 else 2)
        return
    with pytest.raises(ValueError, match=f"'a' has 5 records, but its length is {length}"):
        pack_dataset(wanted)
