"""Attention of patches inside images of any size: those of all tiles of an image see each other, or
in some layers those of a window of it (Qwen2.5-VL, arXiv 2502.13923, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megavlm.data.loading.batch import Images
from megavlm.model.attention import PackedSamples
from megavlm.model.rotary import turning
from megavlm.model.vision_attention import VisionAttention


@dataclass
class PackedImages(PackedSamples):
    """Where images and windows end among the patches of a rank.

    Args:
        windows: of the windows; none: there are none.
    """

    windows: PackedSamples | None = None

    @classmethod
    def of_images(cls, images: Images) -> PackedImages:
        """Describe the images of a batch."""
        windows = None
        if images.window_ends is not None:
            windows = PackedSamples.inside(images.window_ends, images.window_lengths)
        return cls.inside(images.ends, images.lengths, windows=windows)


class NativeVisionAttention(turning(VisionAttention)):
    """Attention of patches inside their image, or inside their window of it.

    Args:
        has_window: whether it is inside windows.
        kwargs: as for ``VisionAttention``.
    """

    def __init__(self, *args: Any, has_window: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.has_window = has_window

    def forward(
        self, *args: Any, packed_seq_params: PackedImages, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; ``VisionLayer`` calls this."""
        seen = packed_seq_params.windows if self.has_window else packed_seq_params
        return super().forward(*args, packed_seq_params=seen, **kwargs)
