"""Settings of a mixture of experts that are not part of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Losses that keep the experts of each layer equally busy, and the dispatch of tokens.

    Args:
        balance_loss: weight of the auxiliary loss of load balancing (Fedus et al., arXiv
            2101.03961, equation 4; Megatron's ``aux_loss``). Each layer adds E * sum_i f_i P_i: of
            the real tokens of one pack, f_i is the share of the choices that fell on expert i, and
            P_i the mean of its probability. It is 1 if all experts are equally busy. The mean over
            the packs of a step counts, whatever the layout. 0: off.
        balance_over: what f_i is a share of: the choices of the pack itself, or those of the last
            step's global batch, which leave packs of one kind free to choose few experts (arXiv
            2501.11873). The first step of a run then has no balance loss.
        bias_update_rate: by how much each step moves the bias of an expert that was chosen less or
            more often than the mean of its layer over the global batch, up or down (arXiv
            2408.15664); for models with ``--architecture.language.router_bias``. 0: it stays.
        router_z_loss: weight of the squared logarithm of the softmax's denominator in the router
            (arXiv 2202.08906), such as 1e-3; a mean over tokens and packs likewise. 0: off.
        dispatcher: how expert-parallel ranks send each other tokens: each token to the ranks of its
            experts (alltoall), or all tokens to all ranks (allgather), for a few ranks and many
            experts per token.
    """

    balance_loss: float = 0.001
    balance_over: Literal["pack", "global_batch"] = "pack"
    bias_update_rate: float = 0.001
    router_z_loss: float = 0.0
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
