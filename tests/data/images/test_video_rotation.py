"""Videos whose file says how they are to be turned and mirrored, as those of phones do."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megavlm.data.images.tiling import Tiling
from megavlm.data.images.video import read_frames, unread_frames
from megavlm.data.records.record import MediaFile

# What of a picture with a bright corner, dim to its right and dark below, is shown.
CORNERS = [[200, 100], [10, 50]]


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True)])
def test_a_video_is_shown_upright(tmp_path: Path, turn: int, flips: tuple[bool, bool]) -> None:
    """Its file says how it is to be turned, against the clock, and then mirrored."""
    path = tmp_path / "a.mp4"
    whole = np.repeat(np.repeat(np.array(CORNERS, np.uint8), 24, 0), 32, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        stream.set_display_rotation(turn, *flips)
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(np.stack([whole] * 3, -1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    shown = np.rot90(np.array(CORNERS), turn // 90)
    shown = shown[:, ::-1] if flips[0] else shown
    shown = shown[::-1] if flips[1] else shown
    file = MediaFile(path=str(path))
    size = (48, 64) if turn % 180 else (64, 48)
    for tiling in (Tiling(tile_size=16, mode="stretch"), Tiling(tile_size=16, mode="native")):
        for number, one in enumerate(read_frames(file, lambda times: [0, 3], tiling)):
            assert (one.width, one.height) == size and one.seconds == pytest.approx(0.3 * number)
            found = np.asarray(Image.open(io.BytesIO(one.encoded)).convert("L").resize((8, 8)))
            assert np.abs(found[1::5, 1::5].astype(int) - shown).max() < 9
    unread = unread_frames(file, lambda times: [0, 3], tiling)
    assert {(one.width, one.height, one.encoded) for one in unread} == {(*size, b"")}
