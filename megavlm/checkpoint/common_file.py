"""Tells why ``common.pt`` could not be written, the file of what is no tensor.

In megatron-core before 0.19 rank 0 writes it, by its default strategy, before all ranks describe
their shards to each other: an error there would leave the others waiting. From 0.19 on there is no
such file.
"""

from __future__ import annotations

from pathlib import Path

from megatron.core.dist_checkpointing.mapping import StateDict

try:
    from megatron.core.dist_checkpointing.strategies.base import (
        StrategyAction,
        register_default_strategy,
    )
    from megatron.core.dist_checkpointing.strategies.common import (
        COMMON_STATE_FNAME,
        TorchCommonSaveStrategy,
    )
except ImportError:  # megatron-core 0.19

    def watched() -> list[str]:
        """Return what goes wrong with the file: nothing."""
        return []

else:

    class _Telling(TorchCommonSaveStrategy):
        """Writes the file as megatron-core does, and notes an error instead of raising it."""

        def __init__(self, errors: list[str]):
            super().__init__("torch", 1)
            self._errors = errors

        def save_common(self, common_state_dict: StateDict, checkpoint_dir: str | Path) -> None:
            """``dist_checkpointing.save`` calls this hook."""
            try:
                super().save_common(common_state_dict, checkpoint_dir)
            except (OSError, RuntimeError) as error:  # torch's writer of files raises the latter
                self._errors.append(f"{type(error).__name__}: {COMMON_STATE_FNAME}: {error}")

    def watched() -> list[str]:
        """Return a list, to which the next save adds what goes wrong with the file."""
        errors: list[str] = []
        register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _Telling(errors))
        return errors
