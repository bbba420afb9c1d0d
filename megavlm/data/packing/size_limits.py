"""Samples that no pack can hold, and what makes them smaller."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.config.tiling import VideoPixels
from megavlm.data.images.feature_layout import FeatureLayout
from megavlm.data.images.frame_sampling import show_frames
from megavlm.data.images.native import PAIR, frame_grid
from megavlm.data.images.tiling import Tiling
from megavlm.data.records.record import VIDEO_PLACEHOLDER, Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.sample import Image
from megavlm.data.text.chat_tokens import ChatTemplate


@dataclass(frozen=True, kw_only=True)
class SizeLimits:
    """What a sample may have.

    Args:
        capacity: most tokens.
        tile_cap: most tiles; None: any number.
        tiling: how images became tiles.
        layout: how many placeholder tokens an image has.
        template: makes tokens of texts.
    """

    capacity: int
    tile_cap: int | None
    tiling: Tiling
    layout: FeatureLayout
    template: ChatTemplate

    def check(
        self,
        length: int,
        images: Sequence[Image],
        videos: Sequence[str] = (),
        answers: int = 1,
    ) -> None:
        """Raise RejectError for a sample that no pack can hold.

        Args:
            length: number of tokens, of all answers.
            images: its images, and the frames of its videos.
            videos: names of the videos, each as often as it is shown.
            answers: 2 if a rejected answer stands beside it, with placeholders of the same images.
        """
        tiles = sum(image.tiles for image in images)
        if self.tile_cap is not None and tiles > self.tile_cap:
            sizes = [image.tiles for image in images]
            advice = self._advice(images, videos, sizes, tiles - self.tile_cap, of_tile=1)
            raise RejectError(
                "too_many_tiles",
                f"{tiles} tiles of {len(images)} images, but a pack holds {self.tile_cap}: raise"
                f" --tile_cap{advice}",
            )
        if length > self.capacity:
            features = [answers * self.layout.count(image) for image in images]
            line = answers * self._frame_line(images) if videos else 0
            sizes = [
                count + (line if image.name in videos and image.tiles else 0)
                for count, image in zip(features, images, strict=True)
            ]
            excess = length - self.capacity
            advice = self._advice(images, videos, sizes, excess, of_tile=answers, of_line=line)
            raise RejectError(
                "too_long",
                f"{length} tokens{' of both answers' if answers > 1 else ''}, {sum(features)} of"
                f" them for {tiles} tiles, but a pack holds {self.capacity}: raise"
                f" --capacity{advice}",
            )

    def _advice(
        self,
        images: Sequence[Image],
        videos: Sequence[str],
        sizes: Sequence[float],
        excess: int,
        *,
        of_tile: int,
        of_line: float = 0.0,
    ) -> str:
        """Return which options, if any, make a sample smaller by ``excess``, if they leave as
        little as they can of its images and frames, which have these ``sizes``; one of their tiles
        has that of ``of_tile``, and the text beside a frame, or a pair of them, ``of_line``.
        """
        least = self.tiling.least_tiles
        stills = 0.0
        frames = []
        for image, size in zip(images, sizes, strict=True):
            if image.name in videos:
                frames.append(size)
            else:
                stills += size * max(0, 1 - least / image.tiles)
        of_frames = {
            "--max_frames": sum(frames) * max(0, 1 - len(videos) / max(1, len(frames))),
        }
        if self.tiling.pairs_frames:
            of_frames = self._of_pairs(images, videos, sum(frames), of_tile, of_line)
        spare = {self.tiling.size_flag: stills} | of_frames
        enough = [flag for flag, most in spare.items() if most >= excess]
        if enough:
            return f" or lower {' or '.join(enough)}"
        flag, most = max(of_frames.items(), key=lambda one: one[1])
        return f" or lower {self.tiling.size_flag} and {flag}" if stills + most >= excess else ""

    def _of_pairs(
        self,
        images: Sequence[Image],
        videos: Sequence[str],
        size: float,
        of_tile: int,
        of_line: float,
    ) -> dict[str, float]:
        """Return how much smaller options make frames that are read in pairs, which have this
        ``size`` together. Fewer frames of a video may be larger. Arguments are those of
        ``_advice``.
        """
        bounds = self.tiling.video_pixels
        shown = [image for image in images if image.name in videos]
        frames = {
            name: -(-count // videos.count(name))
            for name, count in Counter(image.name for image in shown).items()
        }
        firsts = {image.name: image for image in reversed(shown)}

        def tiles(name: str, count: int, pixels: VideoPixels) -> int:
            first = firsts[name]
            tile = self.tiling.tile_size
            return math.prod(frame_grid(first.width, first.height, count, tile, pixels))

        def at(pixels: VideoPixels) -> float:
            return sum(
                tiles(image.name, frames[image.name], pixels) * of_tile + of_line
                for image in shown
                if image.tiles
            )

        one_each = sum(
            tiles(name, 1, bounds) * of_tile + of_line for name in videos if name in firsts
        )
        least = {
            "--max_frames": one_each,
            "--video_total_pixels": at(dataclasses.replace(bounds, total=1)),
            "--video_min_pixels": at(dataclasses.replace(bounds, least=1)),
        }
        return {flag: max(0.0, size - left) for flag, left in least.items()}

    def _frame_line(self, images: Sequence[Image]) -> float:
        """Return how many tokens the line of a frame, or of a pair with its time, has beside its
        features; on average of as many pairs as there are among ``images``.
        """
        with_times = self.tiling.shows_times(self.template.format)
        if self.tiling.joins_frames and not with_times:
            return 0.0
        first = 10
        times = [0.0] * 20
        together = 1
        if with_times:
            first = 1
            together = PAIR
            steps = [image.interval / PAIR for image in images if image.frames]
            times = [
                number * max(steps, default=0.0) for number in range(max(len(steps), 2 * PAIR))
            ]
        counts = [first, len(times) // together]
        few, many = (
            self.template.count(
                show_frames(
                    [Turn(role="human", text=VIDEO_PLACEHOLDER)],
                    [times[: count * together]],
                    with_times=with_times,
                ),
                [1] * count,
            )
            for count in counts
        )
        return (many - few) / (counts[1] - first) - self.template.features_per_tile
