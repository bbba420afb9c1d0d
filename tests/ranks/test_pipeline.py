"""What travels along the pipeline: activations in shapes that nobody tells, and gradients only
where something upstream is trained.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from megavlm.config.schema import Config
from megavlm.data.loading.batch import BatchOptions
from tests.ranks.pool import Pool
from tests.ranks.runs import EVERYTHING, TINY, build, config_for, make_packs

PACKS = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=PACKS, image_share=0.6, alignment=4)
    return folder


def messages(config: Config) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[int], int]:
    """Shapes that this rank sends and gets along the pipeline, the tiles of its packs, and how
    often a pack goes to the device.
    """
    import torch.distributed as dist

    from megavlm.data.loading.batch import Batch
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import run_packs

    job = build(config)
    packs = [
        job.train.batch(pack, pack, BatchOptions(vision_layers=3, rank_slice=job.groups.rank_slice))
        for pack in range(PACKS)
    ]
    original = dist.batch_isend_irecv
    sent = []
    got = []

    def spy(operations: list):
        for operation in operations:
            (sent if operation.op is dist.isend else got).append(tuple(operation.tensor.shape))
        return original(operations)

    for chunk in job.ddp_chunks:
        chunk.zero_grad_buffer()
    with (
        mock.patch.object(dist, "batch_isend_irecv", spy),
        mock.patch.object(Batch, "to", autospec=True, side_effect=Batch.to) as moved,
    ):
        run_packs(job.ddp_chunks, Microbatches(iter(packs), PACKS, 1.0), job.backend)
    return sent, got, [pack.num_tiles for pack in packs], moved.call_count


@pytest.mark.parametrize(
    ("trainable", "travels_back"),
    [
        (EVERYTHING, True),
        (("vision.encoder.layers.1",), True),
        (("connector",), False),
        (("language.output_layer",), False),
    ],
)
@pytest.mark.parametrize("context", [1, 2])
def test_only_what_is_needed_travels_between_chunks(
    ranks: Pool, dataset: Path, trainable: tuple[str, ...], travels_back: bool, context: int
) -> None:
    layout = dict(
        pipeline_model_parallel_size=2, layout="v*2|v,c,t*3,h", context_parallel_size=context
    )
    answers = ranks.run(messages, 2 * context, config_for(dataset, trainable=trainable, **layout))
    tokens = TINY.vision.tokens
    width = TINY.vision.hidden_size
    for first, last in zip(answers[:context], answers[context:], strict=True):
        shapes = [(tokens, tiles, width) for tiles in first[2]]
        assert first[0] == last[1] == shapes and len(set(shapes)) > 1
        assert first[1] == last[0] == (shapes if travels_back else [])


def test_tokens_travel_in_shares(ranks: Pool, dataset: Path) -> None:
    layout = dict(
        pipeline_model_parallel_size=2,
        layout="v*3,c,t|t*2,h",
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )
    answers = ranks.run(messages, 4, config_for(dataset, **layout))
    assert answers[0][0] == answers[0][1] == [(128 // 2, 1, TINY.language.hidden_size)] * PACKS
