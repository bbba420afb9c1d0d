"""Which frames of a video are chosen, and how they stand in the text."""

from __future__ import annotations

import numpy as np
import pytest

from megavlm.data.images.frame_sampling import FrameChoice, show_frames
from megavlm.data.records.record import Turn
from megavlm.data.records.reject import RejectError


def test_one_frame_of_each_equal_part():
    times = [place / 10 for place in range(100)]
    for seed in range(20):
        chosen = FrameChoice(min_frames=8, max_frames=12).choose(
            times, None, np.random.default_rng(seed)
        )
        borders = np.linspace(0, 100, len(chosen) + 1).astype(int)
        assert 8 <= len(chosen) <= 12
        assert all(
            low <= place < high
            for low, place, high in zip(borders, chosen, borders[1:], strict=False)
        )
    middle = FrameChoice(min_frames=4, max_frames=4, sampling="middle").choose(
        times, None, np.random.default_rng(0)
    )
    assert middle == [12, 37, 62, 87]
    counts = {
        len(FrameChoice(sampling="middle").choose(times, None, np.random.default_rng(seed)))
        for seed in range(200)
    }
    assert counts == set(range(8, 33))


def test_a_clip_bounds_the_frames():
    times = [place / 10 for place in range(100)]
    chosen = FrameChoice(min_frames=5, max_frames=5).choose(
        times, (2.0, 3.0), np.random.default_rng(0)
    )
    assert len(chosen) == 5 and all(20 <= place <= 30 for place in chosen)
    with pytest.raises(RejectError, match=r"no frame between 20 and 30 s; the last is at 9.9 s"):
        FrameChoice().choose(times, (20.0, 30.0), np.random.default_rng(0))
    with pytest.raises(RejectError, match="it has no frames"):
        FrameChoice().choose([], None, np.random.default_rng(0))


def test_a_short_video_gives_all_its_frames_once():
    for sampling in ("rand", "middle", "fps10"):
        choice = FrameChoice(sampling=sampling)
        assert choice.choose([0.0, 0.1, 0.2], None, np.random.default_rng(0)) == [0, 1, 2]
        assert choice.choose([0.0], None, np.random.default_rng(0)) == [0]


def test_frames_at_a_rate():
    times = [place / 10 for place in range(100)]
    assert FrameChoice(sampling="fps1").choose(times, None, np.random.default_rng(0)) == list(
        range(5, 100, 10)
    )
    assert FrameChoice(sampling="fps0.5").choose(times, (0.0, 4.0), np.random.default_rng(0)) == [
        10,
        30,
    ]
    chosen = FrameChoice(sampling="fps10", max_frames=10).choose(
        times, None, np.random.default_rng(0)
    )
    assert len(chosen) == 10 and chosen[0] == 0 and chosen[-1] == 99


@pytest.mark.parametrize(
    ("settings", "there", "count"),
    [
        # Three frames at the rate.
        ({"sampling": "fps1", "min_frames": 8}, 30, 8),
        ({"sampling": "fps1", "min_frames": 8}, 6, 6),
        ({"sampling": "fps1", "min_frames": 3}, 30, 3),
        ({"sampling": "fps1", "multiple": 2}, 30, 2),
        ({"sampling": "fps1", "multiple": 2, "min_frames": 3}, 30, 4),
        ({"sampling": "fps1", "multiple": 2, "min_frames": 5, "max_frames": 5}, 30, 4),
        ({"sampling": "fps1", "multiple": 2, "min_frames": 4}, 3, 2),
        ({"sampling": "fps1", "multiple": 2, "min_frames": 4}, 1, 1),
        ({"sampling": "fps10", "multiple": 2, "max_frames": 7}, 30, 6),
        ({"sampling": "middle", "multiple": 2, "min_frames": 7, "max_frames": 7}, 30, 6),
        ({"sampling": "middle", "multiple": 2, "min_frames": 7, "max_frames": 8}, 30, 8),
        ({"sampling": "rand", "multiple": 2, "min_frames": 9}, 9, 8),
        ({"sampling": "rand", "multiple": 2}, 1, 1),
    ],
)
def test_how_many_frames_are_chosen(settings: dict, there: int, count: int) -> None:
    times = [place / 10 for place in range(there)]
    chosen = FrameChoice(**settings).choose(times, None, np.random.default_rng(0))
    assert len(set(chosen)) == len(chosen) == count
    assert chosen == sorted(chosen) and chosen[0] >= 0 and chosen[-1] < there
    if settings.get("min_frames", 0) > 5 and settings["sampling"] == "fps1":
        assert chosen[0] < there / 3 and chosen[-1] >= there * 2 / 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampling": "fps"}, "fps: must be rand"),
        ({"sampling": "fps0"}, "fps0: must be"),
        ({"sampling": "fps100000000"}, "fps100000000: must be"),
        ({"max_frames": 10**30}, "--max_frames 10{30}: must be"),
        ({"min_frames": 9, "max_frames": 8}, "--min_frames 9 and --max_frames 8"),
    ],
)
def test_bad_choices(settings, words):
    with pytest.raises(ValueError, match=words):
        FrameChoice(**settings)


def test_frames_stand_in_lines():
    turns = [Turn(role="human", text="<video>\nwhat"), Turn(role="gpt", text="a <video>")]
    assert [turn.text for turn in show_frames(turns, [[0.0, 1.0]])] == [
        "Frame-1: <image>\nFrame-2: <image>\nwhat",
        "a <video>",
    ]
    assert (
        show_frames([Turn(role="pretrain", text="a <video> b")], [[0.0]])[0].text
        == "a Frame-1: <image>\n b"
    )
    both = show_frames([Turn(role="human", text="<video><image><video>")], [[0.0], [0.0, 1.0]])
    assert both[0].text == "Frame-1: <image>\n<image>Frame-1: <image>\nFrame-2: <image>\n"
    for text in ("<video><video>", "a"):
        with pytest.raises(RejectError, match="<video> placeholders, but 1 videos"):
            show_frames([Turn(role="human", text=text)], [[0.0, 1.0]])
