"""Packs of questions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from megavlm.config.tiling import VideoPixels
from megavlm.data.images import video
from megavlm.data.images.decode import decode_pixels
from megavlm.data.images.tiling import Tiling
from megavlm.data.images.video import frame_times
from megavlm.data.loading.dataset import sample_positions
from megavlm.data.loading.prefixes import find_prefixes
from megavlm.data.store.manifest import read_manifest
from megavlm.data.text.templates import FORMATS
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS, add_special_tokens, load_tokenizer
from megavlm.evaluate import media
from megavlm.evaluate.packs import Request, RequestReader, arrange, prepare
from megavlm.evaluate.task import Task, read_task
from megavlm.io.storage import ReadError
from tests.data.images.test_video import level, write_folder, write_video
from tests.data.samples import make_dataset


def test_a_prefix_ends_where_an_answer_begins(tmp_path: Path) -> None:
    make_dataset(tmp_path, packs=1, capacity=64, alignment=4)
    requests = [
        Request(
            path=Path("task.jsonl"),
            line=number + 1,
            tokens=np.arange(2, 2 + length, dtype=np.int32),
            supervised=np.arange(length) >= learned,
            images=(),
            room=room,
        )
        # Two questions with room for an answer, and a choice of five tokens behind a question.
        for number, (length, learned, room) in enumerate([(7, 7, 6), (10, 10, 6), (12, 7, 0)])
    ]
    trained = dataclasses.replace(read_manifest(tmp_path), preferences=True)
    reader = RequestReader(requests, [[0, 1, 2]], trained)
    assert not reader.manifest.preferences  # questions have no rejected answers beside them
    pack = reader.read(0)
    positions, ends = sample_positions(pack.lengths, 4, 64)
    found = find_prefixes(pack.supervised, positions, ends)
    assert found.ends.diff().tolist() == [7, 10, 7, 1]


def test_a_pack_holds_no_more_tokens_and_tiles_than_those_of_training() -> None:
    manifest = SimpleNamespace(capacity=16, tile_cap=4, alignment=4)

    def arranged(*sizes: tuple[int, int]) -> list[list[int]]:
        """Arrange questions of so many tokens and tiles."""
        asked = [
            SimpleNamespace(tokens=range(tokens), room=1, tiles=tiles, where="exam.jsonl:1")
            for tokens, tiles in sizes
        ]
        return arrange(asked, manifest)

    assert arranged((7, 1), (7, 3), (7, 0)) == [[0, 1], [2]]
    assert arranged((3, 3), (3, 2), (3, 2)) == [[0], [1, 2]]
    with pytest.raises(ValueError, match="jsonl:1: 20 tokens and 1 tiles"):
        arranged((16, 1))
    with pytest.raises(ValueError, match="8 tokens and 5 tiles") as raised:
        arranged((7, 5))
    assert "fewer frames, or name packs of larger --capacity" in str(raised.value)
    assert "(--packs of tools/chat.py" in str(raised.value)


def test_what_stands_for_an_answer_is_neither_an_end_nor_an_image(tmp_path: Path) -> None:
    make_dataset(tmp_path, packs=1, context_token_id=0)
    manifest = read_manifest(tmp_path)
    manifest = dataclasses.replace(manifest, end_token_id=manifest.pad_token_id)
    asked = Request(
        path=Path("task.jsonl"),
        line=1,
        tokens=np.array([5, 6], np.int32),
        supervised=np.zeros(2, bool),
        images=(),
        room=1,
    )
    (sample,) = RequestReader([asked], [[0]], manifest).samples(0, load=False)
    assert sample.tokens[:2].tolist() == [5, 6]
    assert sample.tokens[2] not in (manifest.end_token_id, manifest.context_token_id)


def make_packs(folder: Path, template: str, tokenizer: str, context: str) -> Path:
    """Make a packed dataset of a template, with its tokenizer."""
    golden = Path(__file__).parents[1] / "golden" / tokenizer
    loaded = load_tokenizer(golden)
    add_special_tokens(loaded, context)
    loaded.add_tokens(list(FORMATS[template].markers), special_tokens=True)
    token = loaded.convert_tokens_to_ids(IMAGE_TOKEN_SETS[context].context)
    make_dataset(folder, packs=1, context_token_id=token, vocab_size=len(loaded))
    dataclasses.replace(read_manifest(folder), template=template).write(folder)
    loaded.save_pretrained(folder / "tokenizer")
    return folder


def make_task(folder: Path, *questions: str) -> Task:
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    rows = [dict(question=text, image="a.png", answer="x") for text in questions]
    (folder / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_task(folder / "exam.jsonl")


def test_there_is_room_for_one_token(tmp_path: Path) -> None:
    packs = make_packs(tmp_path / "packs", "internvl2_5", "tokenizer", "internvl")
    task = prepare(make_task(tmp_path, "Who?", "Where?"), packs)
    packs = [task.packs.reader.read(number) for number in range(len(task.packs))]
    lengths = [length for pack in packs for length in pack.lengths.tolist()]
    assert lengths == [len(one.tokens) + 1 for one in task.requests]
    assert sum(pack.supervised.sum() for pack in packs) == 2


def test_a_video_that_cannot_be_read_is_told_with_its_line(tmp_path: Path) -> None:
    packs = make_packs(tmp_path / "packs", "internvl2_5", "tokenizer", "internvl")
    (tmp_path / "empty").mkdir()
    for name, told in (("exam.jsonl", "exam.jsonl: not a video"), ("empty", "empty: it has no f")):
        row = dict(question="Who?", video=name, answer="x")
        (tmp_path / "exam.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=rf"--eval.tasks .*exam.jsonl:1: .*{told}"):
            prepare(read_task(tmp_path / "exam.jsonl"), packs)
    manifest = dataclasses.replace(read_manifest(packs), tiling="patches", image_limit=(64, 64))
    manifest.write(packs)
    with pytest.raises(ValueError, match="of --tiling patches, which takes images alone"):
        prepare(read_task(tmp_path / "exam.jsonl"), packs)


def test_frames_of_a_video_are_those_in_the_middles_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = make_packs(tmp_path / "packs", "internvl2_5", "tokenizer", "internvl")
    dataclasses.replace(read_manifest(packs), tile_cap=16, capacity=400).write(packs)
    write_video(tmp_path / "a.mp4", 40)
    write_folder(tmp_path / "b", 3)
    make_task(tmp_path, "Who?")
    row = dict(question="<video>, <image>, <video>, <video>?", image="a.png", frames=4, answer="x")
    row |= dict(video=["b", "a.mp4", "a.mp4"])
    (tmp_path / "exam.jsonl").write_text(json.dumps(row) + "\n")
    read = []

    def times(*asked):
        read.append(len(frame_times(*asked)))
        return frame_times(*asked)

    monkeypatch.setattr(video, "frame_times", times)
    task = prepare(read_task(tmp_path / "exam.jsonl"), packs)
    # Every process prepares all questions, and so reads no more of a video than that it is one.
    assert read[0] == 3 and all(4 < count < 20 for count in read[1:])
    [one] = task.requests
    middles = [4, 14, 24, 34]
    assert [clip and len(clip.frames) for clip in one.clips] == [3, None, 4, 4]
    text = task.template.tokenizer.decode(one.tokens)
    assert [f"Frame-{number}: <img>" in text for number in (0, 1, 4, 5)] == [
        False,
        True,
        True,
        False,
    ]
    found = task.packs.batch(0, 0).tiles.float().mean(dim=(1, 2, 3)).tolist()
    bright = [level(place) for place in middles]
    assert found == pytest.approx([*map(level, range(3)), 0, *bright, *bright], abs=3)
    write_video(tmp_path / "a.mp4", 3)
    with pytest.raises(ReadError, match="a.mp4: it has changed since the run began: 3 frames, of"):
        task.packs.batch(0, 0)


def test_images_and_frames_come_in_the_order_of_the_text_each_with_its_content(
    tmp_path: Path,
) -> None:
    Image.new("RGB", (64, 16), "white").save(tmp_path / "white.png")
    Image.new("RGB", (16, 48)).save(tmp_path / "black.png")
    write_video(tmp_path / "a.mp4", 40)
    tiling = Tiling(tile_size=16, max_tiles=6)

    def asked(text: str, start: float, **fields: object) -> media.Media:
        row = dict(question=text, image=["white.png", "black.png"], answer="x", **fields)
        if "video" in fields:
            row["clip"] = [start, start + 1]
        (tmp_path / "exam.jsonl").write_text(json.dumps(row) + "\n")
        (question,) = read_task(tmp_path / "exam.jsonl").questions
        return media.media_of(question, tiling, "exam.jsonl:1", with_times=False)

    clip = dict(video="a.mp4", frames=2)
    for text, fields, frames in (
        ("<image><video><image>", clip, [("a.mp4", 64, 48)] * 2),  # behind much of the video
        ("<image><image>", {}, []),
    ):
        found = asked(text, 3, **fields)
        # Several images share the tiles, as when they are packed.
        assert [image.tiles for image in found.images] == [4, *(1 for _ in frames), 4]
        loaded = list(media.loaded(found.images, found.clips if fields else (), tiling))
        assert [(Path(one.name).name, one.width, one.height) for one in loaded] == [
            ("white.png", 64, 16),
            *frames,
            ("black.png", 16, 48),
        ]
        assert loaded[0].encoded == (tmp_path / "white.png").read_bytes()
        assert loaded[-1].encoded == (tmp_path / "black.png").read_bytes()
    bounded = Tiling(tile_size=16, mode="anyres_max_9")
    white = tmp_path / "white.png"
    assert [media.image_of(white, bounded, count, "").tiles for count in (1, 2)] == [4, 1]
    with pytest.raises(ValueError, match=r"exam.jsonl:1: \S*/a.mp4: no frame between 30 and 31 s"):
        asked("<image><video><image>", 30, **clip)


@pytest.mark.parametrize("with_times", [False, True])
def test_frames_that_are_read_in_pairs_come_with_their_times(
    tmp_path: Path, with_times: bool
) -> None:
    write_video(tmp_path / "a.mp4", 40)  # ten a second
    row = dict(question="<video>\nWho?", video="a.mp4", frames=5, answer="x")
    (tmp_path / "exam.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = read_task(tmp_path / "exam.jsonl").questions
    bounds = VideoPixels(least=8**2, most=8 * 8**2, total=8 * 8**2)
    tiling = Tiling(tile_size=8, mode="native", video=bounds)
    found = media.media_of(question, tiling, "exam.jsonl:1", with_times=with_times)
    # Four of five frames, since they come in pairs: 4, 14, 24 and 34; eight tiles of two pairs.
    assert [(one.columns, one.rows, one.tiles) for one in found.images] == [
        (2, 1, 2),
        (2, 1, 0),
    ] * 2
    assert [one.frames for one in found.images] == ([2, 1, 2, 1] if with_times else [4, 3, 2, 1])
    assert [one.interval for one in found.images] == pytest.approx([2.0] * 4)
    text = "<0.9 seconds><image><2.9 seconds><image>" if with_times else "<image>\n"
    assert found.turns[0].text == f"{text}Who?"
    loaded = list(media.loaded(found.images, found.clips, tiling))
    assert [decode_pixels(one.encoded).shape for one in loaded] == [(8, 16, 3)] * 4
    bright = [decode_pixels(one.encoded).mean() for one in loaded]
    assert bright == pytest.approx([level(place) for place in (4, 14, 24, 34)], abs=3)


def test_an_answer_ends_at_a_special_token(tmp_path: Path) -> None:
    packs = make_packs(tmp_path / "packs", "internvl2_5", "tokenizer", "internvl")
    task = prepare(make_task(tmp_path, "Who?"), packs)
    tokens = task.template.tokenizer("a\nb")["input_ids"]
    assert not task.is_over(tokens)
    assert task.is_over([*tokens, task.template.end_token_id])
    assert task.text([*tokens, task.template.end_token_id]) == "a\nb"


def test_an_answer_ends_at_either_end_and_begins_behind_its_channel(tmp_path: Path) -> None:
    packs = make_packs(tmp_path / "packs", "internvl3_5_gpt_oss", "tokenizer", "internvl")
    task = prepare(make_task(tmp_path, "Who?"), packs)
    tokens = task.template.tokenizer("<|channel|>final<|message|>a\nb")["input_ids"]
    assert not task.is_over(tokens)
    for end in ("<|return|>", "<|end|>"):
        ended = [*tokens, task.template.tokenizer.convert_tokens_to_ids(end), tokens[-1]]
        assert task.is_over(ended[:-1])
        assert task.text(ended) == "a\nb"


def test_an_answer_ends_at_a_line_break_that_another_token_holds(tmp_path: Path) -> None:
    packs = make_packs(tmp_path / "packs", "llava_plain", "llava_tokenizer", "llava")
    task = prepare(make_task(tmp_path, "<image>"), packs)
    tokens = task.template.tokenizer("a\nb", add_special_tokens=False)["input_ids"]
    vars(task)["ends"] = frozenset()  # as if the line break were part of another token
    assert task.is_over(tokens) and not task.is_over(tokens[:1])
    assert task.text(tokens) == "a"


def test_a_question_that_the_template_would_leave_out_is_refused(tmp_path: Path) -> None:
    packs = make_packs(tmp_path / "packs", "llava_plain", "llava_tokenizer", "llava")
    with pytest.raises(ValueError, match=r"exam.jsonl:2: the template llava_plain .* 'Who\?'"):
        prepare(make_task(tmp_path, "<image>", "Who?"), packs)
