"""A gloo group has one thread for its collectives, and so no race between two."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# In a process of its own: what a process does once, another test may have done here.
PROGRAM = """
import os
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo
from megavlm.parallel import gloo_workers

gloo_workers.install()
gloo_workers.install()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
before = len(os.listdir("/proc/self/task"))
group = dist.new_group([0])
options = group._get_backend(torch.device("cpu")).options
print(options._threads, len(options._devices), options._timeout.total_seconds())
# One runs the collectives, and one listens to the network.
print(len(os.listdir("/proc/self/task")) - before)
gathered = torch.zeros(64, 4)
for _ in range(20):
    works = []
    for row in gathered:
        with dist._coalescing_manager(group, async_ops=True) as work:
            dist.all_gather_into_tensor(row, torch.ones(4), group=group, async_op=True)
        works.append(work)
    for work in works:
        work.wait()
print(gathered.sum().item())
# As torch's development branch calls it.
later = ProcessGroupGloo(dist.HashStore(), 0, 1, enable_reconfigure=False)
print(later.options._threads)
"""


@pytest.mark.parametrize(("interface", "devices"), [("", 1), ("lo", 1), ("lo,", 1), ("lo,lo", 2)])
def test_a_group_has_one_worker_and_the_network_that_was_asked_for(
    interface: str, devices: int
) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface}
    if not interface:
        del environment["GLOO_SOCKET_IFNAME"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    options, threads, total, later = done.stdout.splitlines()
    assert options.split() == ["1", str(devices), "1800.0"]
    assert int(threads) == 1 + devices
    assert float(total) == 256.0
    assert later == "1"
