"""What a data-parallel rank trains on in one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megavlm.data.loading.batch import Batch


@dataclass(frozen=True)
class Microbatches:
    """The packs of a step that this data-parallel rank has.

    Args:
        batches: the packs in order; those of later steps may follow.
        count: packs to take; a multiple of the pipeline's ranks where each has several chunks.
        weight: sum of the loss weights of all packs of the step, over all ranks, by which their
            summed losses are divided.
        weight_of_pack: says it of each pack in the place of ``weight``; none: all packs share that.
        samples: of each pack of each data-parallel rank in this step; read by objectives whose loss
            spans the step.
    """

    batches: Iterator[Batch]
    count: int
    weight: float
    weight_of_pack: Callable[[Batch], float] | None = None
    samples: Sequence[Sequence[int]] = ()
