"""The gates of cross-attention: a model whose gates stay shut ignores its images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megavlm.model.cross_attention import GatedCrossAttention
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel.process_groups import Groups
from megavlm.train.meters import Figures, Meter
from megavlm.train.optimizer import whole_weights


class Gates(Meter):
    """How far the gates are open: the mean of the absolute value of their tanh, of attention and
    MLP in front of each layer, counted from 0.

    Args:
        ddp_chunks: this rank's.
    """

    def __init__(self, ddp_chunks: Sequence[DistributedDataParallel]) -> None:
        self.ddp_chunks = ddp_chunks
        chunks: list[VisionLanguageModel] = [chunk.module for chunk in ddp_chunks]
        self.gates = {
            f"{block.layer_number - 1}.{name}": gate
            for chunk in chunks
            for block in chunk.modules()
            if isinstance(block, GatedCrossAttention)
            for name, gate in (("attention", block.attention_gate), ("mlp", block.mlp_gate))
        }
        self.has_any = bool(chunks[0].architecture.cross_attention.every)

    @torch.no_grad()
    def report(self, groups: Groups, steps: int) -> Figures:
        """Return ``gate``, a figure for each gate of the whole model. Collective."""
        if not self.has_any:
            return {}
        with whole_weights(self.ddp_chunks):
            means = [gate.float().tanh().abs().mean() for gate in self.gates.values()]
        own = dict(zip(self.gates, torch.stack(means).tolist() if means else (), strict=True))
        found: list = [None] * groups.pipeline_size
        dist.all_gather_object(found, own, group=groups.collection.pp)
        merged = {key: value for part in found for key, value in part.items()}
        ordered = sorted(merged.items(), key=lambda entry: int(entry[0].partition(".")[0]))
        return {"gate": dict(ordered)}
