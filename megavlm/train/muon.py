"""Muon (K. Jordan, https://kellerjordan.github.io/posts/muon, 2024): the update of a matrix is its
momentum with all singular values brought near 1.

megatron-core's distributed optimizer cuts weights and momentum anywhere, and tensor parallelism
cuts a matrix by rows or columns, but singular values are those of the whole matrix. So the pieces
of a matrix go to one rank of those that shard it, which makes the update and sends everyone its
piece: all ranks work on matrices of their own at the same time, and every layout has the updates of
one process. Tensor-parallel ranks gather the matrix, and each makes the same update.

Everything else is updated by AdamW, by the optimizer that Muon stands in front of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megavlm.config.parameter_groups import is_orthogonalised
from megavlm.config.schema import Config
from megavlm.model.vision_attention import unpadded_shape
from megavlm.model.vlm import VisionLanguageModel
from megavlm.model.weights import named_weights
from megavlm.train.optimizer_state import master_of
from megavlm.train.plain_moments import momentum_of

# Coefficients of the five steps of the quintic iteration of modded-nanogpt, which megatron-core's
# Muon takes too.
_STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_SMALLEST_NORM = 1e-7


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A weight of this tensor-parallel rank, as all ranks that shard it know it.

    Args:
        parameter: of the model.
        group: number of its parameter group.
        axis: along which the tensor-parallel ranks cut it; none: each has all of it.
        heads: rows of queries, keys and values of a query group, which are matrices of their own;
            none: it is one matrix.
        kept: shares of the rows and columns that are not padding.
        ends: for each rank of the data-parallel group the elements up to the end of its piece,
            which begins where that of the rank before ends.
    """

    parameter: nn.Parameter
    group: int
    axis: int | None
    heads: tuple[int, int, int] | None
    kept: tuple[float, float]
    ends: tuple[int, ...]

    def sizes(self) -> list[int]:
        """Return the elements that each rank holds."""
        starts = (0, *self.ends)
        return [end - start for start, end in zip(starts, self.ends, strict=False)]


class Muon:
    """Update the matrices of a distributed optimizer by Muon, and everything else by AdamW.

    Args:
        config: the run.
        part: megatron-core's distributed optimizer, for experts or for all else.
        chunks: this rank's.
    """

    def __init__(
        self, config: Config, part: MegatronOptimizer, chunks: Sequence[VisionLanguageModel]
    ):
        self._settings = config.optimizer
        self._dtype = torch.bfloat16 if config.training.precision == "bfloat16" else torch.float32
        self._part = part
        self._ranks: dist.ProcessGroup = part.data_parallel_group
        found = _matrices(config, part, chunks)
        # Each round has one matrix for each rank, of about the same size.
        ordered = sorted(found, key=lambda matrix: -matrix.parameter.numel())
        size = self._ranks.size()
        self._rounds = [ordered[start : start + size] for start in range(0, len(ordered), size)]

    @torch.no_grad()
    def step(self) -> None:
        """Update everything; ``step_with_ready_grads`` of megatron-core calls this. Collective over
        the ranks that share the optimizer's state, and over tensor-parallel ranks.
        """
        optimizer = self._part.optimizer
        orthogonal = [group for group in optimizer.param_groups if group.get("is_muon", False)]
        held = [group["params"] for group in orthogonal]
        before = max((group.get("step") or 0 for group in optimizer.param_groups), default=0)
        try:
            for group in orthogonal:
                group["params"] = []
            type(optimizer).step(optimizer)
        finally:
            for group, parameters in zip(orthogonal, held, strict=True):
                group["params"] = parameters
        for group in optimizer.param_groups:  # FusedAdam does not count those without parameters
            group["step"] = before + 1
        for matrices in self._rounds:
            self._update(matrices)

    def _update(self, matrices: Sequence[Matrix]) -> None:
        """Update a matrix for each rank."""
        shards = [self._shard(matrix) for matrix in matrices]
        nothing = matrices[0].parameter.new_empty(0, dtype=torch.float32)
        directions = [nothing if one is None else self._direction(one) for one in shards]
        own = self._ranks.rank()
        mine = matrices[own] if own < len(matrices) else None
        sizes = mine.sizes() if mine else [0 for _ in range(self._ranks.size())]
        counts = [one.numel() for one in directions]
        counts += [0 for _ in range(self._ranks.size() - len(counts))]
        whole = self._exchange(torch.cat(directions), counts, sizes)
        if mine:
            whole = self._orthogonal(mine, whole.view(mine.parameter.shape)).flatten()
        updates = self._exchange(whole, sizes, counts).split(counts)
        for matrix, shard, update in zip(matrices, shards, updates, strict=False):
            group = self._part.optimizer.param_groups[matrix.group]
            if shard is not None:
                shard.mul_(1 - group["lr"] * group["weight_decay"])
                shard.add_(update, alpha=-group["lr"])

    def _shard(self, matrix: Matrix) -> Tensor | None:
        """Return this rank's piece of the master weight; none if it has no piece."""
        has_piece = matrix.parameter in self._part.model_param_group_index_map
        return master_of(self._part, matrix.parameter) if has_piece else None

    def _direction(self, shard: Tensor) -> Tensor:
        """Take the gradient into the momentum, and return Nesterov's look ahead."""
        momentum = momentum_of(self._part.optimizer, shard)
        momentum.lerp_(shard.grad, 1 - self._settings.muon_momentum)
        return shard.grad.lerp(momentum, self._settings.muon_momentum)

    def _exchange(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send pieces to the ranks that share the optimizer's state, and return theirs, in the
        order of ranks.
        """
        if self._ranks.size() == 1:
            return values
        found = values.new_empty(sum(received))
        dist.all_to_all_single(found, values, received, sent, group=self._ranks)
        return found

    def _orthogonal(self, matrix: Matrix, direction: Tensor) -> Tensor:
        """Return the update of a matrix, but for the learning rate: of this tensor-parallel rank's
        part of it.
        """
        axis = matrix.axis
        tensor_ranks = self._part.tp_group
        if axis is not None:  # which may lie inside a query group, if several ranks share one
            pieces = [torch.empty_like(direction) for _ in range(tensor_ranks.size())]
            dist.all_gather(pieces, direction.contiguous(), group=tensor_ranks)
            direction = torch.cat(pieces, dim=axis)
        update = self._of_parts(matrix, direction)
        if axis is None:
            return update
        return update.chunk(tensor_ranks.size(), dim=axis)[tensor_ranks.rank()]

    def _of_parts(self, matrix: Matrix, direction: Tensor) -> Tensor:
        """Return the update of a whole matrix, or of the matrices that it consists of."""
        if matrix.heads is None:
            return self._scaled(matrix, direction)
        columns = direction.shape[1]
        groups = direction.view(-1, sum(matrix.heads), columns).split(matrix.heads, dim=1)
        parts = [self._scaled(matrix, one.reshape(-1, columns)).view(one.shape) for one in groups]
        return torch.cat(parts, dim=1).view(direction.shape)

    def _scaled(self, matrix: Matrix, direction: Tensor) -> Tensor:
        """Orthogonalise one matrix, and scale it so that its root mean square is ``muon_scale``."""
        rows, columns = (
            size * kept for size, kept in zip(direction.shape, matrix.kept, strict=True)
        )
        scale = self._settings.muon_scale * max(rows, columns) ** 0.5
        return orthogonalised(direction, self._dtype).mul_(scale)


def orthogonalised(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a matrix with the same singular vectors and singular values near 1, by Newton and
    Schulz's iteration. Rows and columns of zeros stay zero.

    Args:
        matrix: float32 [rows, columns].
        dtype: of the products.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if is_tall else matrix) / matrix.norm().clamp(min=_SMALLEST_NORM)
    x = x.to(dtype)
    for first, third, fifth in _STEPS:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return (x.mT if is_tall else x).float()


def _matrices(
    config: Config, part: MegatronOptimizer, chunks: Sequence[VisionLanguageModel]
) -> list[Matrix]:
    """Find the weights of an optimizer that Muon updates, in the same order on all its ranks.
    Collective.
    """
    ours = {
        id(parameter): (key, chunk)
        for chunk in chunks
        for key, parameter in named_weights(chunk).items()
        if is_orthogonalised(key, config.optimizer.kind)
    }
    parameters = [
        parameter
        for buffer in part.buffers
        for parameter in buffer.param_index_map
        if id(parameter) in ours
    ]
    groups = {
        id(parameter): number
        for number, group in enumerate(part.opt_group_ranges)
        for parameter in group["params"]
    }
    own = [
        (groups[id(parameter)], part._get_model_param_range_map(parameter)["param"].end)
        if id(parameter) in groups
        else None
        for parameter in parameters
    ]
    everywhere: list[Any] = [None] * part.data_parallel_group.size()
    dist.all_gather_object(everywhere, own, group=part.data_parallel_group)
    found = []
    for number, parameter in enumerate(parameters):
        places = [seen[number] for seen in everywhere]
        group = next(place[0] for place in places if place is not None)
        ends: list[int] = []
        for place in places:
            ends.append(place[1] if place is not None else (ends or [0])[-1])
        key, chunk = ours[id(parameter)]
        found.append(_describe(config, part, chunk, key, parameter, group, tuple(ends)))
    return found


def _describe(
    config: Config,
    part: MegatronOptimizer,
    chunk: VisionLanguageModel,
    key: str,
    parameter: nn.Parameter,
    group: int,
    ends: tuple[int, ...],
) -> Matrix:
    """Say how a weight is cut, and what it is made of.

    Args:
        config: the run.
        part: the optimizer.
        chunk: that the weight belongs to.
        key: its checkpoint key.
        parameter: the weight.
        group: number of its parameter group.
        ends: see ``Matrix``.
    """
    marks = vars(parameter)
    is_expert = not marks.get("allreduce", True)
    is_cut = marks.get("tensor_model_parallel", False) and not is_expert
    ranks = part.tp_group.size() if is_cut else 1
    axis = marks["partition_dim"] if ranks > 1 else None
    shape = list(parameter.shape)
    if axis is not None:
        shape[axis] *= ranks
    kept = tuple(shape)
    heads = None
    if key.startswith("vision."):
        kept = unpadded_shape(config.architecture.vision, key, tuple(shape))
    if key.endswith(".self_attention.linear_qkv.weight"):
        part_of_model = chunk.vision if key.startswith("vision.") else chunk.language
        heads = _heads(part_of_model.config)
    return Matrix(
        parameter=parameter,
        group=group,
        axis=axis,
        heads=heads,
        kept=(kept[0] / shape[0], kept[1] / shape[1]),
        ends=ends,
    )


def _heads(config: TransformerConfig) -> tuple[int, int, int]:
    """Return the rows of queries, of keys and of values of a query group."""
    groups = config.num_query_groups or config.num_attention_heads
    return (
        config.num_attention_heads // groups * config.kv_channels,
        config.kv_channels,
        config.kv_channels,
    )
