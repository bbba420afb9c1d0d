"""What to score, and with what: the settings of a scoring, checked before any record is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megavlm.data.packing.executors import Executor
from megavlm.data.packing.work_folder import partial_of, refuse_filled
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.scores import VERSION
from megavlm.io.remote import file_state
from megavlm.score.state import ROW
from megavlm.score.towers import TwoTowers, facts, find_towers
from megavlm.score.worker import WorkerSettings


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to score, and with what.

    Args:
        sources: annotation files.
        model: folder of a checkpoint or run, or of a ``CLIPModel`` or ``SiglipModel``.
        out: folder of the scores; missing or empty.
        tokenizer: folder of the tokenizer; empty: the model's own.
        precision: dtype of the computation.
        batch: most pairs that are embedded at once.
        duplicates: cosine of the embeddings of images that count as the same; 0: do not look.
        places: whether to put the records on a path with similar images side by side.
        workers: processes; 0: this one (with Ray: as many as the cluster has cores); None: two for
            each GPU, or as many as there are cores.
        executor: where they run.
    """

    sources: tuple[Annotations, ...]
    model: str
    out: str
    tokenizer: str = ""
    precision: str = "float32"
    batch: int = 64
    duplicates: float = 0.98
    places: bool = False
    workers: int | None = 0
    executor: Executor = "processes"

    def check(self) -> None:
        """Raise ValueError, FileNotFoundError or FileExistsError, naming the flag, for settings
        that cannot work; reads no record.
        """
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers {self.workers}: must be at least 0")
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch}: must be at least 1")
        if not 0 <= self.duplicates <= 1:
            raise ValueError(
                f"--duplicates {self.duplicates}: must be a cosine between 0 (do not look) and 1"
            )
        refuse_filled(Path(self.out))
        self.towers.template()

    @cached_property
    def towers(self) -> TwoTowers:
        """The model, without its weights."""
        return find_towers(self.model, self.tokenizer, self.precision)

    @property
    def processes(self) -> int:
        """Return how many worker processes there are."""
        if self.workers is not None:
            return self.workers
        return 2 * torch.cuda.device_count() or os.cpu_count() or 1

    @property
    def partial(self) -> Path:
        """The folder that becomes ``out`` when it is complete."""
        return partial_of(Path(self.out))

    @property
    def keeps_embeddings(self) -> bool:
        """Whether the embeddings of all images are kept until the end."""
        return self.duplicates > 0 or self.places

    @property
    def for_workers(self) -> WorkerSettings:
        """What worker processes build their encoders from."""
        return WorkerSettings(
            model=self.model,
            tokenizer=self.tokenizer,
            precision=self.precision,
            batch=self.batch,
            keeps_embeddings=self.keeps_embeddings,
        )

    def identity(self) -> dict[str, Any]:
        """Return what the result depends on, as JSON: the model, settings, and the state of the
        annotation files.
        """
        sources = []
        for source in self.sources:
            found = file_state(source.path)
            sources.append(
                {
                    "name": source.name,
                    "path": source.path,
                    "root": source.root,
                    "prompt": source.prompt,
                    "bytes": found.size,
                    "modified": found.version,
                }
            )
        return {
            **facts(self.towers),
            "batch": self.batch,
            "duplicates": self.duplicates,
            "places": self.places,
            "sources": sources,
            "rows": ROW.descr,
            "version": VERSION,
        }
