"""What the device can run, against what a configuration asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.config.checks.experts import grouped_expert_problems
from megavlm.config.schema import Config

# First compute capability with the instructions that a recipe needs, and the first for which
# Transformer Engine 2.11 refuses it.
_FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_FP8_TOO_NEW = {"mxfp8": (12, 0)}


@dataclass(frozen=True, kw_only=True)
class DeviceCapabilities:
    """What the device of a rank can run.

    Args:
        capability: compute capability of the CUDA device; none without one.
        has_transformer_engine: whether the package is installed.
    """

    capability: tuple[int, int] | None = None
    has_transformer_engine: bool = False

    @property
    def runs_transformer_engine(self) -> bool:
        """Whether Transformer Engine's layers can be used."""
        return self.capability is not None and self.has_transformer_engine

    @property
    def lack(self) -> str:
        """What keeps Transformer Engine's layers from being used; empty if nothing does."""
        lacks = []
        if self.capability is None:
            lacks.append("no CUDA device")
        if not self.has_transformer_engine:
            lacks.append("no Transformer Engine")
        return " and ".join(lacks)


def device_problems(config: Config, device: DeviceCapabilities) -> list[str]:
    """Return what a configuration asks for and the device cannot run."""
    found = []
    lack = device.lack
    if config.training.kernels == "transformer_engine" and lack:
        found.append(
            f"--training.kernels transformer_engine: this machine has {lack}; use local or auto"
        )
    if config.optimizer.moments == "bfloat16" and lack:
        found.append(
            "--optimizer.moments bfloat16 needs Transformer Engine's AdamW, and this machine has"
            f" {lack}; use float32"
        )
    if config.profile.memory_snapshot and device.capability is None:
        found.append(
            f"--profile.memory_snapshot {config.profile.memory_snapshot}: is of a GPU's memory, and"
            " this machine has no CUDA device; leave it out"
        )
    if not lack:
        found += kernel_problems(config)
    for part, recipe in config.fp8.recipes.items():
        if lack:
            found.append(
                f"--fp8.{part} {recipe} needs Transformer Engine's layers, and this machine has"
                f" {lack}; use none"
            )
        elif not _runs(recipe, device.capability):
            needed, there = (
                ".".join(map(str, numbers))
                for numbers in (_FP8_CAPABILITY[recipe], device.capability)
            )
            below = (
                f", and less than {'.'.join(map(str, _FP8_TOO_NEW[recipe]))}"
                if recipe in _FP8_TOO_NEW
                else ""
            )
            runs = [name for name in _FP8_CAPABILITY if _runs(name, device.capability)]
            found.append(
                f"--fp8.{part} {recipe} needs compute capability {needed}{below}, this GPU has"
                f" {there}; use {', '.join([*runs, 'none'])}"
            )
    return found


def kernel_problems(config: Config) -> Iterator[str]:
    """Yield why Transformer Engine's layers cannot run a configuration that uses them on a GPU."""
    if config.training.kernels == "local" or config.training.precision == "float32":
        return
    yield from grouped_expert_problems(config)


def _runs(recipe: str, capability: tuple[int, int]) -> bool:
    return _FP8_CAPABILITY[recipe] <= capability < _FP8_TOO_NEW.get(recipe, (99, 0))
