"""Finds the operations of a step after which the host waits for the device.

A wait is a value of the device that the host reads (``.item()``, ``.tolist()``, ``bool()``,
``nonzero``), a copy to the host, or a copy from memory of the host that does not say
``non_blocking``. Works on fake tensors, which have no values: a read gets 1.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
ROOT = Path(__file__).parents[2]
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
SIZES = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default)
COPIES = (aten._to_copy.default, aten.copy_.default)


def _caller() -> str:
    """Return the innermost line of the project that led here, and of a library below it."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if "/torch/" not in frame.filename and Path(frame.filename) != Path(__file__)
    ]
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    both = [*ours[-1:], *frames[-1:]]
    told = [f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in both]
    return " < ".join(dict.fromkeys(told))


class HostWaits(TorchDispatchMode):
    """Collects waits in ``found``: how often each was seen, by its kind and place.

    Attributes:
        lengths: lengths of the samples of the pack at hand: the numbers that megatron-core's rotary
            embedding reads beside local layers.
        experts: of a layer, and how many a token goes to; those of the pack at hand get as many
            tokens each as can be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.watching = False
        self.lengths: list[int] = []
        self.experts = (0, 0)
        self._rows = 0
        self._is_cut_next = False

    def routed(self, tokens: int) -> int:
        """Return how many copies of the tokens of the pack at hand go to experts."""
        self._rows = tokens * self.experts[1]
        return self._rows

    def tell(self, what: str) -> None:
        """Count a wait."""
        if self.watching:
            self.found[f"{what}: {_caller()}"] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at an operation before it runs; torch calls this for each."""
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        on_device = first is not None and first.device.type == "cuda"
        if func in READS and not isinstance(first, FakeTensor):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func in READS:
            if on_device:
                self.tell(str(func))
            if first.dtype == torch.bool:
                return False
            return 1.0 if first.dtype.is_floating_point else 1
        if func in SIZES and on_device:
            self.tell(str(func))
            if func is aten.masked_select.default and self.experts[0]:
                return first.new_empty(self.routed(first.numel() // self.experts[0]))
        if func is aten.sort.stable and first.dtype == torch.bool and self.experts[0]:
            # megatron-core 0.19 sorts which tokens go where, and cuts off those that do not.
            self.routed(first.numel() // self.experts[0])
            self._is_cut_next = True
        if func is aten.slice.Tensor and self._is_cut_next:
            self._is_cut_next = False
            return first.new_empty(self._rows)
        if func in COPIES and first is not None:
            self._look_at_copy(func, args, kwargs)
        if func is aten.convolution.default:
            return _patches(*args[:3])
        if func is aten.convolution_backward.default:
            return _patches_backward(args)
        return func(*args, **kwargs)

    def _look_at_copy(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        is_write = func is aten.copy_.default
        source = args[1] if is_write else args[0]
        if not isinstance(source, Tensor):
            return
        target = args[0].device if is_write else torch.device(kwargs.get("device") or source.device)
        asynchronous = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if source.device.type == target.type:
            return
        if target.type == "cpu":
            self.tell(f"copy of {tuple(source.shape)} to the host")
        elif not asynchronous:
            self.tell(f"copy of {tuple(source.shape)} from the host")

    def make_tensor(self, original: Any) -> Any:
        """Return ``torch.tensor`` with its hidden copy to the device told."""

        def made(*args: Any, device: Any = None, **settings: Any) -> Tensor:
            with _disable_current_modes():
                value = original(*args, **settings)
            if device is None or torch.device(device).type == "cpu":
                return value
            self.tell(f"torch.tensor of {tuple(value.shape)}")
            return torch.empty(value.shape, dtype=value.dtype, device=device)

        return made

    def list_reader(self) -> Callable[[Tensor], list[int]]:
        """Return what stands for ``Tensor.tolist``: it reads lengths of samples, tokens of
        experts, or ones.
        """

        def tolist(tensor: Tensor) -> list[int]:
            if tensor.device.type == "cuda":
                self.tell("tolist")
            if tensor.numel() == len(self.lengths):
                return list(self.lengths)
            if tensor.numel() == self.experts[0]:
                (fewest, more) = divmod(self._rows, self.experts[0])
                return [fewest + (place < more) for place in range(self.experts[0])]
            return [1] * tensor.numel()

        return tolist


def _patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the output of a convolution whose stride is its size: torch's own meta function asks
    the device for its fastest kernel.
    """
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if len({(tensor.device, tensor.dtype) for tensor in given}) > 1:
        raise RuntimeError(f"mismatch: {[(tensor.device, tensor.dtype) for tensor in given]}")
    sides = [size // kernel for size, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)]
    return x.new_empty([x.shape[0], weight.shape[0], *sides])


def _patches_backward(args: tuple) -> tuple[Tensor | None, ...]:
    (_, x, weight, *_, wanted) = args
    made = (torch.empty_like(x), torch.empty_like(weight), x.new_empty(weight.shape[0]))
    return tuple(one if want else None for one, want in zip(made, wanted, strict=True))
