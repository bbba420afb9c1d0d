"""Learning rates of the parameter groups, for people who watch a run."""

from __future__ import annotations

from megavlm.config.schema import Config
from megavlm.planner.parameter_table import Row, parameter_table


class GroupRates:
    """Learning rates by part and multiplier, if a run has more than one.

    Args:
        config: the run.
    """

    def __init__(self, config: Config) -> None:
        trained = [row for row in parameter_table(config) if not row.frozen]
        kinds = {(row.part, row.multiplier, row.frozen_steps) for row in trained}
        self._groups: dict[str, tuple[float, int]] = {}
        if len({kind[1:] for kind in kinds}) > 1:
            parts = [part for part, _, _ in kinds]
            for row in trained:
                name = _name(row) if parts.count(row.part) > 1 else row.part
                self._groups[name] = (row.multiplier, row.frozen_steps)

    def at(self, step: int, rate: float) -> dict[str, dict[str, float]]:
        """Return ``lr``, the rate of each group; empty if all parameters have the run's.

        Args:
            step: steps that were done before.
            rate: of the run, for a multiplier of 1.
        """
        if not self._groups:
            return {}
        return {
            "lr": {
                name: rate * multiplier if step >= frozen_steps else 0.0
                for name, (multiplier, frozen_steps) in self._groups.items()
            }
        }


def _name(row: Row) -> str:
    late = f" after step {row.frozen_steps}" if row.frozen_steps else ""
    return f"{row.part} x{row.multiplier:.4g}{late}"
