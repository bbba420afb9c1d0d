"""Tests of the path that only a GPU runs: Transformer Engine's layers, FP8, what waits for what.
One GPU, one process.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from megavlm.config.schema import Config
from megavlm.train.job import Job
from tests.data.samples import make_dataset
from tests.gpu.models import CAPACITY, SMALL

HERE = Path(__file__).parent
# Read when cuBLAS starts, which is before the test of a deterministic run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no GPU."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """Undo what a run sets for its whole process: variables that libraries read, and the FP8
    scales.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if importlib.util.find_spec("transformer_engine") is not None:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packs of random samples, one of them without an image."""
    folder = tmp_path_factory.mktemp("packs") / "train"
    features = SMALL.features_per_tile
    vocabulary = SMALL.language.vocab_size
    sizes = dict(
        tile_size=SMALL.vision.image_size,
        features_per_tile=features,
        vocab_size=vocabulary,
        context_token_id=7,
    )
    make_dataset(
        folder,
        packs=12,
        samples_per_pack=6,
        image_share=0.6,
        capacity=CAPACITY,
        text_tokens=(30, 120),
        **sizes,
    )
    return folder


@pytest.fixture
def job() -> Callable[[Config], AbstractContextManager[Job]]:
    """``with job(config) as built``: a whole job, whose process groups end with the block."""
    from megavlm.parallel import process_groups
    from tests.ranks.runs import build

    @contextmanager
    def built(config: Config) -> Iterator[Job]:
        try:
            yield build(config)
        finally:
            process_groups.destroy()
            torch.cuda.empty_cache()

    return built


@pytest.fixture(scope="session")
def curve() -> Callable[..., list[float]]:
    """``curve(config)``: the losses of a run's steps."""
    from megavlm.parallel import process_groups
    from tests.ranks.runs import train_curve

    def losses(config: Config) -> list[float]:
        try:
            return train_curve(config).losses
        finally:
            process_groups.destroy()
            torch.cuda.empty_cache()

    return losses
