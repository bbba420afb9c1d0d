"""One thread for the collectives of each gloo group.

torch starts two. Whatever a thread has finished, it writes the name of into one string that both
share, and takes no lock (``ProcessGroupGloo::runLoop``, found in torch 2.11 and 2.13). A name of
more than 15 letters has memory of its own, which both may free: that of gathers that are coalesced,
as ``DistributedDataParallel`` of megatron-core gathers parameters. Twenty seconds of nothing but
such gathers crash a process, with a segmentation fault or "malloc(): unaligned tcache chunk
detected"; with other collectives between them, one crash was seen in 400,000.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, Store


def _devices() -> list[ProcessGroupGloo.Device]:
    """Return the network devices that torch would choose."""
    names = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if len(names) < 2:
        return [ProcessGroupGloo.create_default_device()]
    interfaces = names.removesuffix(",").split(",")
    return [ProcessGroupGloo.create_device(interface=interface) for interface in interfaces]


@functools.cache
def install() -> None:
    """Let the gloo groups that are made from now on have one thread, once in a process. Their
    collectives then run in the order in which they were asked for.
    """
    make = ProcessGroupGloo.__init__

    def make_with_one(
        self: ProcessGroupGloo,
        store: Store,
        rank: int,
        size: int,
        timeout: timedelta = dist.default_pg_timeout,
        **wishes: bool,
    ) -> None:
        if any(wishes.values()):  # of a torch to come, for what options cannot say
            make(self, store, rank, size, timeout=timeout, **wishes)
            return
        options = ProcessGroupGloo._Options()
        options._devices = _devices()
        options._timeout = timeout
        options._threads = 1
        make(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = make_with_one
