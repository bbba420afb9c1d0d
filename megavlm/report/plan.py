"""What a run trains on, and how its layers are spread over the pipeline, as far as its packs are
still there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megavlm.config.schema import Config
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.store.manifest import read_manifest
from megavlm.planner.layout import Chunk, make_layout
from megavlm.planner.partition import PackSize, run_costs


@dataclass(frozen=True, kw_only=True)
class Share:
    """A part of a whole.

    Args:
        name: of the part.
        content: what it holds, for people.
        share: of the whole.
    """

    name: str
    content: str
    share: float


def chunk_shares(config: Config) -> list[Share]:
    """Return the model chunks of a run in the order of the pipeline, with their shares of the FLOPs
    of a step, forward and backward.

    Raises:
        OSError, ValueError: the packs, by which layers are weighed, cannot be read.
    """
    folders = config.data.train_folders
    if not folders:
        return []
    records = np.concatenate([PackedDataset(folder).some_records() for folder in folders])
    size = PackSize.mean(records)
    pipeline = config.parallel.pipeline_model_parallel_size
    costs = run_costs(config, size)
    vision = config.architecture.vision.num_layers
    return [
        Share(
            name=f"{number % pipeline}",
            content=", ".join(_contents(chunk)),
            share=sum(costs[layer] for layer in chunk.layer_numbers(vision)) / sum(costs),
        )
        for number, chunk in enumerate(make_layout(config, size).chunks)
    ]


def source_shares(config: Config) -> list[Share]:
    """Return the sources of a run's packs, with their shares of all samples, repeats counted.

    Raises:
        OSError, ValueError: the packs cannot be read.
    """
    folders = config.data.train_folders
    sources = [
        (f"{Path(folder).name}/{source.name}" if len(folders) > 1 else source.name, source.samples)
        for folder in folders
        for source in read_manifest(folder).sources
    ]
    total = max(sum(samples for _, samples in sources), 1)
    return [
        Share(name=name, content=f"{samples:,}", share=samples / total) for name, samples in sources
    ]


def _contents(chunk: Chunk) -> Iterator[str]:
    """Name what stands in a chunk."""
    for part, layers in (("vision", chunk.vision_layers), ("language", chunk.language_layers)):
        if part == "language" and chunk.has_connector:
            yield "connector"
        if layers:
            yield f"{part} layers {layers.start} to {layers.stop - 1}"
    if chunk.has_head:
        yield "head"
