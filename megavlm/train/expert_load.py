"""How busy the experts of each layer are: counted on the device by the routers, looked at when it
is reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megavlm.config.schema import Architecture
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel.process_groups import Groups
from megavlm.train.meters import Figures, Meter


class ExpertLoad(Meter):
    """Choices of the routers since the last report.

    Args:
        chunks: this rank's.
        architecture: of the model, which may have no experts.
        device: where the counts are.
    """

    def __init__(
        self,
        chunks: Sequence[VisionLanguageModel],
        architecture: Architecture,
        device: torch.device,
    ) -> None:
        self._device = device
        self._layers = architecture.language.num_layers
        self._experts = architecture.language.num_experts
        self._routers = [router for chunk in chunks for router in chunk.routers]

    def report(self, groups: Groups, steps: int) -> Figures:
        """Return the mean of the layers' balance losses (1: all experts are equally busy), and for
        each layer how many times the mean load its busiest expert has. Chunks that come before all
        that is trained are not counted. Empty for a model without experts. Collective.
        """
        if not self._experts:
            return {}
        shape = (self._layers, self._experts + 2)
        table = torch.zeros(shape, dtype=torch.float64, device=self._device)
        for router in self._routers:
            table[router.layer_number - 1] = router.load
            router.load.zero_()
        dist.all_reduce(table)
        rows = {layer: row for layer, row in enumerate(table.tolist()) if row[-1]}
        if not rows:
            return {}
        losses = [row[-2] / row[-1] for row in rows.values()]
        busiest = {
            str(layer): max(row[:-2]) * self._experts / sum(row[:-2]) for layer, row in rows.items()
        }
        return {"expert_balance": sum(losses) / len(losses), "expert_load": busiest}
