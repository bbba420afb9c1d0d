"""How fast every rank computes and every group of ranks exchanges data, measured in seconds at the
start of a run, and who is slow.

One slow rank slows all, and shows nowhere: a throttled GPU, a bad cable, a network card that NCCL
did not pick. Two measures find it. All groups of a kind sum a tensor at the same time, as in
training: a slow group stands out among its like. Then ranks exchange data in pairs, each with two
partners in turn: a rank that is slow with both is the cause. If somebody is slow, all is measured
once more, and who was slow for a moment only is not named.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.config.schema import Health
from megavlm.health.rank_names import spans
from megavlm.parallel.backend import Backend
from megavlm.parallel.process_groups import Groups

_REPEATS = 3
# Seconds that one exchange may take; where a network is slower than that, less is sent.
_BUDGET_SECONDS = 0.2
_MOST_CLOCK_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What is measured with; all takes about as long on a CPU as on a GPU.

    Args:
        width: rows and columns of the matrices that are multiplied.
        dtype: their dtype.
        products: of one measurement.
        first_bytes: sent first, to see how much more can be sent within the budget.
        most_bytes: sent at most.
    """

    width: int
    dtype: torch.dtype
    products: int
    first_bytes: int
    most_bytes: int


_CPU = _Sizes(width=256, dtype=torch.float32, products=4, first_bytes=2**16, most_bytes=2**20)
_GPU = _Sizes(width=8192, dtype=torch.bfloat16, products=10, first_bytes=2**20, most_bytes=2**26)


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What was measured, for every rank.

    Args:
        hosts: its machine.
        compute: TFLOP/s of a matrix product.
        clock: its wall clock, in seconds, at the same moment as the others'.
        pairs: by distance between the partners, GB/s (1e9 bytes, each way) with the faster of its
            partners; 0 without a partner.
        groups: by kind of group, GB/s of a sum in its group, as each rank's network carries it.
        members: by kind of group, the group's first rank.
        seconds: how long measuring took.
    """

    hosts: tuple[str, ...]
    compute: tuple[float, ...]
    clock: tuple[float, ...]
    pairs: dict[int, tuple[float, ...]]
    groups: dict[str, tuple[float, ...]]
    members: dict[str, tuple[int, ...]]
    seconds: float


def check(groups: Groups, backend: Backend, health: Health) -> tuple[Speeds, list[str]]:
    """Measure, and find who is slow each time. Collective: every rank of the world calls it, and
    gets everybody's figures.

    Args:
        groups: the run's process groups.
        backend: where tensors live.
        health: what counts as slow.

    Returns:
        What was measured, and the findings, a line each.
    """
    speeds = _measure(groups, backend)
    found = findings(speeds, health, on_gpu=backend.asynchronous)
    if found:
        speeds = _fastest(speeds, _measure(groups, backend))
        found = findings(speeds, health, on_gpu=backend.asynchronous)
    return speeds, found


def _fastest(first: Speeds, second: Speeds) -> Speeds:
    """Return each figure at its better of two measurements of the same ranks; clocks of the
    second.
    """
    return Speeds(
        hosts=first.hosts,
        compute=_better(first.compute, second.compute),
        clock=second.clock,
        pairs={key: _better(first.pairs[key], second.pairs[key]) for key in first.pairs},
        groups={key: _better(first.groups[key], second.groups[key]) for key in first.groups},
        members=first.members,
        seconds=first.seconds + second.seconds,
    )


def _better(first: tuple[float, ...], second: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(map(max, first, second))


def _measure(groups: Groups, backend: Backend) -> Speeds:
    start = time.perf_counter()
    sizes = _GPU if backend.asynchronous else _CPU
    hosts: list[str] = [""] * groups.size
    dist.all_gather_object(hosts, socket.gethostname())
    here = hosts.count(hosts[0])
    distances = [distance for distance in dict.fromkeys((1, here)) if distance < groups.size]
    kinds = {kind: group for kind, group in groups.by_kind().items() if group.size() > 1}

    figures = [_compute(sizes, backend)]
    figures += [_exchange(distance, sizes, groups, backend) for distance in distances]
    figures += [_sum(group, sizes, backend) for group in kinds.values()]
    figures += [float(dist.get_process_group_ranks(group)[0]) for group in kinds.values()]
    dist.barrier()
    figures += [time.perf_counter() - start, time.time()]
    gathered: list[list[float]] = [[]] * groups.size
    dist.all_gather_object(gathered, figures)
    compute, *columns, seconds, clock = zip(*gathered)
    first = len(distances) + len(kinds)
    return Speeds(
        hosts=tuple(hosts),
        compute=compute,
        clock=clock,
        pairs=dict(zip(distances, columns)),
        groups=dict(zip(kinds, columns[len(distances) : first])),
        members={kind: tuple(map(int, column)) for kind, column in zip(kinds, columns[first:])},
        seconds=max(seconds),
    )


def _timed(run: Callable[[], None], backend: Backend) -> float:
    """Seconds of the fastest of a few runs, after one that is not counted."""
    times = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        run()
        if backend.asynchronous:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _compute(sizes: _Sizes, backend: Backend) -> float:
    """TFLOP/s of this rank."""
    left = torch.full((sizes.width, sizes.width), 0.5, dtype=sizes.dtype, device=backend.device)
    right = left.clone()

    def multiply() -> None:
        for _ in range(sizes.products):
            torch.mm(left, right)

    return 2 * sizes.width**3 * sizes.products / _timed(multiply, backend) / 1e12


def _moved(
    send: Callable[[Tensor], None], takes_part: bool, sizes: _Sizes, backend: Backend
) -> float:
    """GB/s of ``send``. Collective over the world, of which those who do not take part only
    wait.
    """
    first = torch.zeros(sizes.first_bytes, dtype=torch.uint8, device=backend.device)
    slowest = torch.tensor(
        [_timed(lambda: send(first), backend) if takes_part else 0.0], device=backend.device
    )
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # everybody must send as much as everybody else
    fitting = int(sizes.first_bytes * _BUDGET_SECONDS / max(slowest.item(), 1e-9))
    size = max(sizes.first_bytes, min(sizes.most_bytes, fitting))
    if not takes_part:
        return 0.0
    tensor = torch.zeros(size, dtype=torch.uint8, device=backend.device)
    return size / _timed(lambda: send(tensor), backend) / 1e9


def _sum(group: dist.ProcessGroup, sizes: _Sizes, backend: Backend) -> float:
    """GB/s that a rank's network carries in a sum over its group: of n bytes it sends and receives
    2 (k - 1) / k n, with k ranks.
    """
    share = 2 * (group.size() - 1) / group.size()
    return share * _moved(lambda tensor: dist.all_reduce(tensor, group=group), True, sizes, backend)


def partner(rank: int, size: int, distance: int, turn: int) -> int | None:
    """With whom a rank exchanges data: a neighbour at ``distance``, the one above in one turn, the
    one below in the other; none at an end.

    Where their number allows it the ranks stand in a ring, which has no ends.
    """
    is_lower = (rank // distance + turn) % 2 == 0
    other = rank + distance if is_lower else rank - distance
    if size % (2 * distance) == 0:
        return other % size
    return other if 0 <= other < size else None


def _exchange(distance: int, sizes: _Sizes, groups: Groups, backend: Backend) -> float:
    """GB/s with the faster of both partners."""

    def swap(tensor: Tensor, other: int) -> None:
        received = torch.empty_like(tensor)
        both = [dist.P2POp(dist.isend, tensor, other), dist.P2POp(dist.irecv, received, other)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    others = [partner(groups.rank, groups.size, distance, turn) for turn in range(2)]
    return max(
        _moved(lambda tensor, other=other: swap(tensor, other), other is not None, sizes, backend)
        for other in others
    )


def findings(speeds: Speeds, health: Health, *, on_gpu: bool) -> list[str]:
    """Everybody who is slow, a line each.

    Args:
        speeds: what was measured.
        health: what counts as slow.
        on_gpu: whether ``least_gb_per_s`` counts.
    """
    lines = []
    factor = health.slow_factor
    usual = statistics.median(speeds.compute)
    for rank, value in enumerate(speeds.compute):
        if value * factor < usual:
            lines.append(
                f"{_on(speeds, rank)} computes {value:.3g} TFLOP/s, {usual:.3g} are usual here: is"
                " it throttled, or shared?"
            )
    for distance, values in speeds.pairs.items():
        usual = statistics.median(value for value in values if value)
        for rank, value in enumerate(values):
            if value and value * factor < usual:
                lines.append(
                    f"{_on(speeds, rank)} exchanges {value:.3g} GB/s with ranks {distance} away,"
                    f" {usual:.3g} are usual here: look at its network card, cable and topology"
                )
    for kind in speeds.groups:
        lines += _slow_groups(speeds, kind, health, on_gpu)
    usual = statistics.median(speeds.clock)
    for rank, value in enumerate(speeds.clock):
        if abs(value - usual) > _MOST_CLOCK_SECONDS:
            lines.append(
                f"{_on(speeds, rank)}: its clock is {abs(value - usual):.1f} s"
                f" {'ahead' if value > usual else 'behind'}: is it set?"
            )
    return lines


def _slow_groups(speeds: Speeds, kind: str, health: Health, on_gpu: bool) -> list[str]:
    ranks: dict[int, list[int]] = {}
    for rank, first in enumerate(speeds.members[kind]):
        ranks.setdefault(first, []).append(rank)
    moved = {
        first: statistics.median(speeds.groups[kind][rank] for rank in members)
        for first, members in ranks.items()
    }
    usual = statistics.median(moved.values())
    lines = []
    for first, value in moved.items():
        if value * health.slow_factor < usual:
            lines.append(
                f"the {kind} group of ranks {spans(ranks[first])} moves {value:.3g} GB/s,"
                f" {usual:.3g} are usual here"
            )
    slow = [first for first, value in moved.items() if value < health.least_gb_per_s]
    if on_gpu and slow:
        lines.append(
            f"{len(slow)} of {len(moved)} {kind} groups move less than --health.least_gb_per_s"
            f" {health.least_gb_per_s:g}, the first of them, of ranks {spans(ranks[slow[0]])},"
            f" {moved[slow[0]]:.3g} GB/s: NCCL may use the wrong network interface"
            " (NCCL_DEBUG=INFO prints it; NCCL_SOCKET_IFNAME and NCCL_IB_HCA select it)"
        )
    return lines


def summary(speeds: Speeds) -> str:
    """Summarise the slowest and the fastest of each figure in a line."""
    shown = [f"{min(speeds.compute):.3g} to {max(speeds.compute):.3g} TFLOP/s a rank"]
    shown += [
        f"{kind} groups {min(values):.3g} to {max(values):.3g} GB/s"
        for kind, values in speeds.groups.items()
    ]
    return f"speed check, {speeds.seconds:.1f} s: " + ", ".join(shown)


def _on(speeds: Speeds, rank: int) -> str:
    return f"rank {rank} (on {speeds.hosts[rank]})"
