"""Stand-ins that let megatron-core run on a CPU over gloo.

megatron-core asks ``torch.cuda`` for the current device, for streams and for random states wherever
it runs. On a machine without a CUDA device ``install`` answers those questions for the CPU. Nothing
of megatron-core is replaced but its optimizer class (see ``parallel/adamw``), two functions that
read CUDA's random state, one that moves counts of tokens to the host, and two that exchange tokens
between ranks that share experts; all of its other parallelism runs as it is. Groups of gloo get one
thread each (see ``parallel/gloo_workers``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from megavlm.parallel import adamw, gloo_workers

_CPU = torch.device("cpu")
# Modules of megatron-core that make tensors with device="cuda", and the functions of torch that
# they make them with.
_MODULES = (
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "transformer.utils",
    "utils",
)
_FACTORIES = ("tensor", "zeros", "ones", "empty")
# Stands in for the device's random state, which is another one than the CPU's on a GPU too.
_DEVICE_STATE = torch.Generator()


class _NoStream:
    """Stands in for CUDA streams and events; every method does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, *args, **kwargs) -> _NoStream:
        """Return an event that has happened."""
        return _NoStream()

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *exception) -> None:
        pass


def _on_cpu(factory: Callable) -> Callable:
    """Wrap ``factory`` so that it makes a tensor on the CPU if ``device="cuda"`` is asked for."""

    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return wrapped


class TorchOnCpu(ModuleType):
    """What some modules see as ``torch``; for everybody else it stays as it is, transformers'
    tricks with devices included.

    Args:
        factories: its functions that are to make tensors on the CPU.
    """

    def __init__(self, factories: Sequence[str]):
        super().__init__("torch")
        self.__dict__.update({name: _on_cpu(vars(torch)[name]) for name in factories})

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def _replace_factories() -> None:
    on_cpu = TorchOnCpu(_FACTORIES)
    for name in _MODULES:
        vars(importlib.import_module(f"megatron.core.{name}"))["torch"] = on_cpu


def _replace_cuda_questions() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.get_rng_state = lambda *args, **kwargs: _DEVICE_STATE.get_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: _DEVICE_STATE.set_state(state)
    cuda.manual_seed = _DEVICE_STATE.manual_seed
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    cuda.Stream = cuda.Event = _NoStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    tensor_type = torch.Tensor.type

    def type_with_cuda_name(self, *args, **kwargs):
        """Answer as on a GPU: DistributedOptimizer finds its fp32 parameters by the type name
        ``torch.cuda.FloatTensor``.
        """
        answer = tensor_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.") if isinstance(answer, str) else answer

    torch.Tensor.type = type_with_cuda_name


def _replace_random_states(random: ModuleType) -> None:
    # Weights that are made on the CPU draw from its state, of which megatron-core would warn.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        _DEVICE_STATE.get_state()
    )
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: _DEVICE_STATE.set_state(
        state
    )


def _replace_moves_to_the_host(dispatcher: ModuleType) -> None:
    """Give the token dispatcher of experts the numbers of tokens as numpy's numbers, which it does
    for tensors of a GPU only, and which ``all_to_all_single`` asks for.
    """
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
    )


def _replace_uneven_gathers(dispatcher: ModuleType) -> None:
    """Gather, and reduce and scatter, the tokens of ranks that share experts by an all-to-all: gloo
    has neither for ranks with different numbers of rows.
    """
    from megatron.core.tensor_parallel import all_to_all

    gather_alike = dispatcher.gather_from_sequence_parallel_region
    scatter_alike = dispatcher.reduce_scatter_to_sequence_parallel_region

    def gather(rows, *, group, output_split_sizes=None, **options):
        if output_split_sizes is None:
            return gather_alike(rows, group=group, **options)
        copies = torch.cat([rows for _ in output_split_sizes])
        return all_to_all(group, copies, output_split_sizes, [len(rows)] * group.size())

    def reduce_scatter(rows, *, group, input_split_sizes=None, **options):
        if input_split_sizes is None:
            return scatter_alike(rows, group=group, **options)
        own = [input_split_sizes[group.rank()]] * group.size()
        return sum(all_to_all(group, rows, own, input_split_sizes).split(own))

    dispatcher.gather_from_sequence_parallel_region = gather
    dispatcher.reduce_scatter_to_sequence_parallel_region = reduce_scatter


@functools.cache
def install() -> None:
    """Put the stand-ins in place, once in a process, before megatron-core builds anything."""
    _replace_cuda_questions()

    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    _replace_factories()
    _replace_moves_to_the_host(dispatcher)
    _replace_uneven_gathers(dispatcher)
    _replace_random_states(random)
    adamw.install()
    gloo_workers.install()
