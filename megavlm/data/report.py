"""What a packing came to, for people and for programs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from megavlm.data.reject import REASONS


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of a packed dataset.

    Args:
        out: folder of the dataset.
        records: records read.
        rejected: records left out.
        rejects: number of rejected records for each reason.
        samples: samples packed; a record that is taken k times is k samples.
        packs: packs written.
        capacity: tokens of a pack.
        tokens: tokens of all samples.
        supervised: tokens with a loss.
        fill: share of the packs' capacity that holds tokens.
        images: images of all samples.
        tiles: tiles of all images, thumbnails counted.
        tiles_per_pack_mean: mean over the packs.
        tiles_per_pack_max: largest over the packs.
        tile_cap: most tiles that a pack was allowed.
        bytes: size of the packs.
        seconds: time that it took.
    """

    out: str
    records: int
    rejected: int
    rejects: dict[str, int]
    samples: int
    packs: int
    capacity: int
    tokens: int
    supervised: int
    fill: float
    images: int
    tiles: int
    tiles_per_pack_mean: float
    tiles_per_pack_max: int
    tile_cap: int
    bytes: int
    seconds: float

    @property
    def samples_per_second(self) -> float:
        """Samples packed a second, all passes counted."""
        return self.samples / max(self.seconds, 1e-9)

    def to_json(self) -> str:
        """The figures as JSON."""
        return json.dumps({**dataclasses.asdict(self), "samples_per_second": self.samples_per_second}, indent=2, ensure_ascii=False) + "\n"

    def text(self) -> str:
        """The figures as lines of text."""
        lines = [
            f"packed    {self.out}",
            f"records   {self.records:,} read, {self.rejected:,} rejected",
            *(f"            {count:,} {reason}: {REASONS[reason]}" for reason, count in self.rejects.items()),
            f"samples   {self.samples:,} of {self.tokens:,} tokens, {self.supervised:,} of them supervised",
            f"packs     {self.packs:,} of {self.capacity:,} tokens, {self.fill:.2%} filled, {self.bytes / 1e6:,.1f} MB",
            f"images    {self.images:,} of {self.tiles:,} tiles",
            f"tiles     {self.tiles_per_pack_mean:.2f} a pack on average, {self.tiles_per_pack_max} at most (cap {self.tile_cap})",
            f"time      {self.seconds:.1f} s, {self.samples_per_second:,.0f} samples/s",
        ]
        return "\n".join(lines)
