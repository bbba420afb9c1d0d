"""The communication that ``planner/communication`` predicts against what ranks really send."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megavlm.config.lora import Lora
from megavlm.config.schema import Architecture, Config, Experts
from megavlm.planner.communication import (
    CommunicationVolume,
    communication_per_microbatch,
    communication_per_step,
    synchronised_per_step,
)
from megavlm.planner.layout import make_layout
from megavlm.planner.rank_load import RankLoad
from tests.convert.models import EXPERTS, SHARED_EXPERT
from tests.data.samples import write_packs
from tests.ranks import test_contrastive, test_flamingo, test_qformer_objective
from tests.ranks.layouts import asks_for_all
from tests.ranks.model_checks import sizes_of
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, build, config_for, make_packs
from tests.ranks.test_contrastive import CLIP, SIGLIP, pack_pairs

# In a ring of k ranks each sends (k - 1) / k of the elements of a whole tensor, once or twice. The
# first of the tensors is the result, the second what goes in.
_WHOLE_TENSORS = {
    "allreduce_": (2, 0),
    "_allgather_base_": (1, 0),
    "allgather_": (1, 0),
    "_reduce_scatter_base_": (1, 1),
    "alltoall_base_": (1, 1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """What a rank sends in a step.

    Args:
        pipeline_rank: of the rank.
        bytes_by_kind: pipeline, with the sum of the gradients of a tied head; inside: collectives
            of the layers; replicas: sums of the gradients of whole parameters over tensor-parallel
            ranks; data: what data-parallel ranks contrast, or Muon moves; muon: what it gathers of
            tensor-parallel ranks.
        tiles: of each pack on this rank.
        supervised: tokens of each pack that have a loss.
        tokens: of the first pack, without padding.
    """

    pipeline_rank: int
    bytes_by_kind: dict[str, float]
    tiles: list[int]
    supervised: list[int]
    tokens: int


def kinds_of_groups(collection: Any) -> dict[str, str]:
    """Return the kind of ``Sent`` that each process group has, by its name."""
    import torch.distributed as dist

    embedding = collection.embd  # no group on ranks in the middle of a pipeline
    named = {collection.tp.group_name: "tensor", collection.dp_cp.group_name: "data"}
    if isinstance(embedding, dist.ProcessGroup):
        named[embedding.group_name] = "pipeline"
    return named


def kind_of(group_kind: str, name: str, whole: Any, shapes: set) -> str:
    """Return the kind of ``Sent`` that a collective is, or ``small`` for sums of one number a token
    or less.

    Args:
        group_kind: of its group, as ``kinds_of_groups`` names it; empty: of another group.
        name: of the operation.
        whole: its tensor.
        shapes: of parameters.
    """
    is_sum = name == "allreduce_"
    if group_kind == "tensor":
        if name == "allgather_":
            return "muon"
        if is_sum and (whole.ndim == 1 or whole.shape in shapes):
            return "replicas"
        return "small" if is_sum and whole.shape[1:].numel() == 1 else "inside"
    # Numbers of tokens that go to experts, and norms of the gradient.
    is_small = str(whole.dtype) == "torch.int64" or (is_sum and whole.ndim == 1)
    return group_kind or ("small" if is_small else "inside")


def counting(collection: Any, shapes: set) -> tuple[Any, Counter[str]]:
    """Return a context, and the bytes by kind that this rank sends in it; arguments as of
    ``kinds_of_groups`` and ``kind_of``.
    """
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    found: Counter[str] = Counter()
    kinds = kinds_of_groups(collection)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func._schema.name.removeprefix("c10d::")
            if name == "send" or name in _WHOLE_TENSORS:
                scripted = [one for one in args if isinstance(one, torch.ScriptObject)]
                group = dist.ProcessGroup.unbox(scripted[0])
                kind = kinds.get(group.group_name, "")
            if name == "send":
                found[kind or "pipeline"] += sum(tensor.nbytes for tensor in args[0])
            elif name in _WHOLE_TENSORS:
                times, position = _WHOLE_TENSORS[name]
                whole = args[position]
                while isinstance(whole, list):
                    whole = whole[0]
                size = group.size()
                share = (size - 1) / size
                if name == "alltoall_base_" and kind == "data":
                    share = 1 - args[4][group.rank()] / max(sum(args[4]), 1)
                pieces = size if name == "allgather_" else 1
                found[kind_of(kind, name, whole, shapes)] += times * share * pieces * whole.nbytes
            return func(*args, **(kwargs or {}))

    return Count(), found


def sent(config: Config) -> Sent:
    """Run a step and count what this rank sends, but for what reduces all gradients at once and
    gathers all parameters.
    """
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import train_step

    job = build(config)
    size = config.training.global_batch_size
    numbers = range(job.groups.data_rank, size, job.groups.data_size)
    batches = [job.train.batch(number, 0, job.training_options) for number in numbers]
    ids = np.arange(size)
    weight = job.train.weight_sum(ids, config.data.loss_reduction)
    samples = job.samples_of_ranks(job.train.index[ids])
    shapes = {parameter.shape for chunk in job.chunks for parameter in chunk.parameters()}
    context, found = counting(job.groups.collection, shapes)
    with context:
        packs = Microbatches(iter(batches), len(batches), weight, samples=samples)
        train_step(job, packs, 1.0, job.backend)
    return Sent(
        pipeline_rank=job.groups.pipeline_rank,
        bytes_by_kind=dict(found),
        tiles=[batch.num_tiles for batch in batches],
        supervised=[len(batch.loss_positions) for batch in batches],
        tokens=int(job.train.index[job.groups.data_rank]["tokens"]),
    )


def told(config: Config, of_rank: Sent, data_ranks: int, share: float = 1.0) -> dict[str, float]:
    """Return the bytes that are predicted of a rank, by the kinds of ``Sent``.

    Args:
        config: the run.
        of_rank: what the rank has.
        data_ranks: data-parallel replicas.
        share: of the tokens that go to experts.
    """
    layout = make_layout(config)
    parallel = config.parallel
    needs = config.architecture.needs
    ranks = parallel.pipeline_model_parallel_size
    frozen = dataclasses.replace(config.training, trainable=())
    passes = [config]
    if needs.packs_at_once(config.architecture, len(of_rank.tiles), data_ranks) > 1:
        passes.append(dataclasses.replace(config, training=frozen))
    padding = RankLoad.mean(parallel, 1, 1.0).tiles * parallel.tile_ranks - 1
    capacity = 40 if needs.is_of_pairs else 128
    has_all = config.training.head_tokens == "all"
    sizes = zip(of_rank.tiles, of_rank.supervised, strict=True)
    inside = sum(
        (
            communication_per_microbatch(
                one,
                layout,
                number,
                capacity,
                tiles * parallel.tile_ranks - padding,
                None if has_all else supervised,
            )
            for tiles, supervised in sizes
            for one in passes
            for number in range(of_rank.pipeline_rank, len(layout.chunks), ranks)
        ),
        CommunicationVolume(),
    )
    rank = of_rank.pipeline_rank
    step = communication_per_step(config, layout, rank, data_ranks, 3.0)
    adamw = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, kind="adamw")
    )
    replicas = communication_per_step(adamw, layout, rank, data_ranks).tensor
    return {
        "inside": inside.tensor + inside.context + inside.expert * share,
        "pipeline": inside.pipeline + step.pipeline,
        "replicas": replicas,
        "muon": step.tensor - replicas,
        "data": step.data - sum(synchronised_per_step(config, layout, rank, data_ranks)),
    }


def assert_told(ranks: Pool, config: Config, world: int) -> None:
    """Compare what the ranks of a run send with what is predicted."""
    parallel = config.parallel
    data_ranks = world // parallel.model_parallel_size
    is_uneven = config.experts.dispatcher == "alltoall"
    found: list[dict[str, float]] = []
    expected: list[dict[str, float]] = []
    for of_rank in ranks.run(sent, world, config):
        # Padding goes to no expert.
        share = of_rank.tokens / 128 if is_uneven else 1.0
        expected.append(told(config, of_rank, data_ranks, share))
        found.append({kind: of_rank.bytes_by_kind.get(kind, 0.0) for kind in expected[0]})
    if is_uneven:  # no two ranks' tokens go to as many experts elsewhere
        found, expected = (
            [{kind: sum(one[kind] for one in each) for kind in each[0]}]
            for each in (found, expected)
        )
    for of_rank, of_plan in zip(found, expected, strict=True):
        assert of_rank == pytest.approx(of_plan)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=3, image_share=1.0, alignment=4)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write packs of three pairs each."""
    folder = tmp_path_factory.mktemp("pairs") / "packs"
    pack_pairs(folder, packs=4, samples_per_pack=3, text_tokens=(4, 12), capacity=40)
    return folder


DATA = dict(ranks=2)
TENSOR = dict(tensor_model_parallel_size=2)
SEQUENCE = TENSOR | dict(sequence_parallel=True)
WHOLE = TENSOR | dict(vision="data")
PIPELINE = dict(pipeline_model_parallel_size=2)
TURNS = PIPELINE | dict(virtual_pipeline_model_parallel_size=2, global_batch_size=2)
CONTEXT = dict(context_parallel_size=2)
SPREAD = dict(expert_model_parallel_size=2)
MIXTURE = dataclasses.replace(
    TINY, language=dataclasses.replace(TINY.language, **EXPERTS | dict(num_experts=6))
)
SHARED = dataclasses.replace(
    TINY, language=dataclasses.replace(TINY.language, **SHARED_EXPERT | dict(num_experts=6))
)
TIED = dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, tied_head=True))
ADAPTED = dataclasses.replace(TINY, lora=Lora(rank=4, targets=("vision", "language")))
OF_LANGUAGE = dataclasses.replace(TINY, lora=Lora(rank=4))
LORA = SEQUENCE | dict(trainable=("connector", "vision.*.lora", "language.*.lora"))
BFLOAT16 = dict(precision="bfloat16")
# Each formula is in one of them; the others join it with what it must not depend on.
EVERYDAY = "sequence,full,supervised head,vision data,frozen,context,allgather,muon,turns tied"
EVERYDAY += ",adapters without sequence,alltoall selective,pipeline sequence"
EVERYDAY += ",clip twice,siglip data,qformer twice,qformer data"


def everyday(cases: list[tuple]) -> list:
    """Return the cases that are tried at every change, or all if they are asked for."""
    wanted = [case for case in cases if asks_for_all() or case[0] in EVERYDAY.split(",")]
    return [pytest.param(*case, id=case[0]) for case in wanted]


CASES: list[tuple[str, Architecture, dict[str, Any]]] = [
    ("tensor", TINY, TENSOR),
    ("sequence", TINY, SEQUENCE),
    ("selective", TINY, SEQUENCE | dict(recompute="selective")),
    ("full", TINY, SEQUENCE | dict(recompute="full")),
    ("full without sequence", TINY, TENSOR | dict(recompute="full")),
    ("supervised head", TINY, TENSOR | dict(head_tokens="supervised")),
    ("supervised head sequence", TINY, SEQUENCE | dict(head_tokens="supervised")),
    ("vision data", TINY, SEQUENCE | dict(vision="data")),
    ("frozen", TINY, SEQUENCE | dict(trainable=("connector",))),
    ("adapters", ADAPTED, LORA),
    ("adapters without sequence", ADAPTED, LORA | dict(sequence_parallel=False)),
    ("adapters selective", ADAPTED, LORA | dict(recompute="selective")),
    ("adapters full", ADAPTED, LORA | dict(recompute="full")),
    ("adapters of language", OF_LANGUAGE, SEQUENCE | dict(trainable=("language.*.lora",))),
    ("late layers", TINY, SEQUENCE | dict(trainable=("language.decoder.layers.2",))),
    ("context", TINY, CONTEXT),
    ("context full", TINY, CONTEXT | dict(recompute="full")),
    ("context bfloat16 frozen", TINY, CONTEXT | BFLOAT16 | dict(trainable=("language",))),
    ("allgather", MIXTURE, SPREAD),
    ("alltoall selective", MIXTURE, SPREAD | dict(recompute="selective")),
    ("allgather full", MIXTURE, SPREAD | dict(recompute="full")),
    ("experts of tensor ranks", MIXTURE, SEQUENCE | SPREAD),
    ("shared expert", SHARED, SEQUENCE | SPREAD | dict(recompute="selective")),
    ("alltoall shared", MIXTURE, SEQUENCE | dict(expert_tensor_parallel_size=2)),
    ("pipeline bfloat16", TINY, PIPELINE | BFLOAT16 | dict(layout="v*3,t|t*2")),
    ("pipeline of vision", TINY, PIPELINE | dict(layout="v*2|v,t*3")),
    ("pipeline frozen", TINY, PIPELINE | dict(layout="v*2|v,t*3", trainable=("connector",))),
    ("pipeline sequence", TINY, PIPELINE | SEQUENCE | dict(layout="v*3,t|t*2")),
    ("pipeline tied", TIED, PIPELINE | dict(layout="v*3,t|t*2")),
    ("turns tied", TIED, TURNS | dict(layout="v*2|v|t|t*2")),
    ("turns frozen", TINY, TURNS | dict(layout="v*2|v|t*2|t", trainable=("connector",))),
    ("muon", TINY, TENSOR | dict(kind="muon")),
    ("muon vision data", TINY, SEQUENCE | dict(kind="muon", vision="data")),
]


@pytest.mark.parametrize(("name", "model", "settings"), everyday(CASES))
def test_communication_is_what_ranks_send(
    ranks: Pool, dataset: Path, name: str, model: Architecture, settings: dict[str, Any]
):
    usual = dict(head_tokens="all", overlap_grad_reduce=False)
    parallel = config_for(dataset, **settings).parallel
    world = max(parallel.model_parallel_size, parallel.expert_model_parallel_size)
    batch = world // parallel.model_parallel_size
    config = dataclasses.replace(
        config_for(dataset, **usual | dict(global_batch_size=batch) | settings),
        architecture=model,
        experts=Experts(dispatcher="alltoall" if name.startswith("alltoall") else "allgather"),
    )
    assert_told(ranks, config, world)


RING = dataclasses.replace(
    SIGLIP, contrastive=dataclasses.replace(SIGLIP.contrastive, exchange="ring")
)
OF_PAIRS: list[tuple[str, Architecture | None, dict[str, Any]]] = [
    ("clip", CLIP, TENSOR),
    ("clip twice", CLIP, TENSOR | dict(global_batch_size=2)),
    ("clip vision data", CLIP, WHOLE | dict(global_batch_size=2)),
    ("clip pipeline", CLIP, PIPELINE | dict(layout="v*3,c,t|t*2,h", global_batch_size=2)),
    ("clip data", CLIP, DATA),
    ("siglip", SIGLIP, TENSOR),
    ("siglip data", SIGLIP, DATA),
    ("qformer", None, TENSOR),
    ("qformer twice", None, TENSOR | dict(global_batch_size=2)),
    ("qformer vision data", None, WHOLE),
    ("qformer data", None, DATA),
    ("qformer data frozen", None, DATA | dict(trainable=("connector", "objective"))),
    ("qformer local", None, DATA | dict(losses=dict(gradient="local"))),
    ("qformer pools", None, dict(losses=dict(pool_packs=1), global_batch_size=2) | TENSOR),
]


@pytest.mark.parametrize(("name", "model", "settings"), everyday(OF_PAIRS))
def test_communication_of_pairs_is_what_ranks_send(
    ranks: Pool, pairs: Path, name: str, model: Architecture | None, settings: dict[str, Any]
):
    given = dict(drop_path=0.0, overlap_grad_reduce=False, global_batch_size=1) | settings
    data_ranks = given.pop("ranks", 1)
    losses = given.pop("losses", None)
    given["global_batch_size"] *= data_ranks
    if model is None:
        config = test_qformer_objective.config_of(pairs, losses, **given)
    else:
        config = test_contrastive.config_of(model, pairs, **given)
    assert_told(ranks, config, config.parallel.model_parallel_size * data_ranks)


# Without what every rank has whole and sums in each microbatch: norms of heads, added tokens.
FLAMINGO = dataclasses.replace(
    test_flamingo._of_layers(3),
    cross_attention=dataclasses.replace(test_flamingo.OPEN.cross_attention, qk_norm=False),
    added_tokens=0,
)
READING = {
    "tensor": TENSOR,
    "sequence": SEQUENCE,
    "sequence all trained": SEQUENCE | dict(trainable=("vision", "connector", "language")),
    "selective": SEQUENCE | dict(recompute="selective"),
    "full": SEQUENCE | dict(recompute="full"),
    "pipeline": PIPELINE | dict(layout="v*3,c,t|t*2,h"),
    "context": CONTEXT,
}


@pytest.mark.parametrize("name", READING if asks_for_all() else ("sequence", "pipeline"))
def test_communication_with_cross_attention_is_what_ranks_send(
    ranks: Pool, tmp_path: Path, name: str
):
    packs = [test_flamingo.documents(FLAMINGO, images) for images in ((1, 0, 3), (2, 1, 1))]
    sizes = sizes_of(FLAMINGO)
    end = test_flamingo.END
    write_packs(tmp_path, packs, capacity=128, alignment=4, end_token_id=end, **sizes)
    usual = dict(head_tokens="all", overlap_grad_reduce=False, global_batch_size=1)
    mask = tuple(pattern for pattern in test_flamingo.MASK if "added" not in pattern)
    given = usual | dict(trainable=mask) | READING[name]
    assert_told(ranks, test_flamingo._config(FLAMINGO, tmp_path, **given), 2)
