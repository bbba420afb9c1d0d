"""Pass a tensor on around a ring of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def pass_on(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Send a tensor to the next rank of a group, and return that of the rank before, of the same
    shape. Collective.
    """
    ranks = group.size()
    if ranks == 1:
        return tensor
    received = torch.empty_like(tensor)
    there = dist.get_global_rank(group, (group.rank() + 1) % ranks)
    here = dist.get_global_rank(group, (group.rank() - 1) % ranks)
    sends = dist.P2POp(dist.isend, tensor.contiguous(), there, group)
    receives = dist.P2POp(dist.irecv, received, here, group)
    for request in dist.batch_isend_irecv([sends, receives]):
        request.wait()
    return received
