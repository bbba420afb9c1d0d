"""Samples that no pack can hold, and what makes them smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.data.images.feature_layout import FeatureLayout
from megavlm.data.images.frame_sampling import show_frames
from megavlm.data.images.native import LEAST_CAP
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
            advice = self._advice(images, videos, sizes, tiles - self.tile_cap)
            raise RejectError(
                "too_many_tiles",
                f"{tiles} tiles of {len(images)} images, but a pack holds {self.tile_cap}: raise"
                f" --tile_cap{advice}",
            )
        if length > self.capacity:
            features = [answers * self.layout.count(image) for image in images]
            line = answers * self._frame_line() if videos else 0
            sizes = [
                count + (line if image.name in videos else 0)
                for count, image in zip(features, images, strict=True)
            ]
            advice = self._advice(images, videos, sizes, length - self.capacity)
            raise RejectError(
                "too_long",
                f"{length} tokens{' of both answers' if answers > 1 else ''}, {sum(features)} of"
                f" them for {tiles} tiles, but a pack holds {self.capacity}: raise"
                f" --capacity{advice}",
            )

    def _advice(
        self, images: Sequence[Image], videos: Sequence[str], sizes: Sequence[float], excess: int
    ) -> str:
        """Return which options, if any, make a sample smaller by ``excess``, if they leave as
        little as they can of its images and frames, which have these ``sizes``.
        """
        least = self.tiling.least_tiles
        stills = 0.0
        frames = []
        for image, size in zip(images, sizes, strict=True):
            if image.name in videos:
                frames.append(size)
            else:
                stills += size * max(0, 1 - least / image.tiles)
        spare = {
            self.tiling.size_flag: stills,
            "--max_frames": sum(frames) * max(0, 1 - len(videos) / max(1, len(frames))),
        }
        if self.tiling.pairs_frames and any(frames):
            bounds = self.tiling.video_pixels
            least = bounds.least * LEAST_CAP / self.tiling.tile_size**2
            spare["--video_total_pixels"] = sum(frames) * max(0, 1 - least / max(frames))
        enough = [flag for flag, most in spare.items() if most >= excess]
        if enough:
            return f" or lower {' or '.join(enough)}"
        return f" or lower {' and '.join(spare)}" if sum(spare.values()) >= excess else ""

    def _frame_line(self) -> float:
        """Return how many tokens the line of a frame has beside its features."""
        if self.tiling.joins_frames:
            return 0.0
        few, many = (
            self.template.count(
                show_frames([Turn(role="human", text=VIDEO_PLACEHOLDER)], [[0.0] * count]),
                [1] * count,
            )
            for count in (10, 20)
        )
        return (many - few) / 10 - self.template.features_per_tile
