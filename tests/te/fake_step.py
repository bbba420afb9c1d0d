"""Runs the trainer's real step on a CUDA device that is not there, and prints what would go wrong
on one, as JSON: tensors that were left on the host, errors, and operations that make the host wait.

``test_fake_step`` starts it, in a process of its own: it changes torch for good.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.config.schema import Fp8
from tests.te import fake_cuda

SETTINGS: dict[str, dict[str, Any]] = {
    "everything": {},
    "drop path": dict(drop_path=0.3),
    "all tokens in the head": dict(head_tokens="all"),
    "recompute full": dict(recompute="full", drop_path=0.3),
    "recompute selective": dict(recompute="selective"),
    "connector": dict(trainable=("connector",)),
    "vision": dict(trainable=("vision", "connector"), drop_path=0.3),
    "language": dict(trainable=("language",)),
    "bfloat16 moments": dict(moments="bfloat16"),
    "local layers": dict(kernels="local"),
    "fp8 delayed": dict(fp8=Fp8(vision="delayed", language="delayed")),
    "fp8 tensorwise": dict(fp8=Fp8(vision="tensorwise", language="tensorwise")),
    "fp8 blockwise": dict(fp8=Fp8(vision="blockwise", language="blockwise")),
    "fp8, recompute full": dict(
        fp8=Fp8(vision="tensorwise", language="tensorwise"), recompute="full", drop_path=0.3
    ),
}
PACKS = 2
STEPS = 2


def prepare() -> Any:
    """Pretend that there is a device; return what finds waits."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29599")
    fake_cuda.pretend()
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    from megavlm.model import attention
    from megavlm.model.connector import heads
    from tests.te import shape_kernels
    from tests.te.host_waits import HostWaits

    shape_kernels.install()
    waits = HostWaits()
    shape_kernels.install_sorting(waits)
    torch.tensor = waits.make_tensor(torch.tensor)
    FakeTensor.tolist = waits.list_reader()
    # torch's own asks the device for the best kernel.
    attention.scaled_dot_product_attention = shape_kernels.attend
    heads.scaled_dot_product_attention = shape_kernels.attend
    return waits


def run(config: Any, waits: Any, planted: Sequence[Any], packs_a_step: int) -> dict[str, Any]:
    """Build a model and update it; watch the last step, for the first may compile and plan.

    Args:
        config: of the run.
        waits: what finds waits.
        planted: meters with a fault, which must be found.
        packs_a_step: of this rank.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    from megavlm.train import loop
    from megavlm.train.meters import Clock
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.optimizer import set_rates
    from megavlm.train.part_norms import NORM_PARTS
    from megavlm.train.step import train_step
    from tests.ranks.runs import build

    job = build(config)
    # Which parts the other ranks hold shards of, they are not there to say.
    job.part_norms.parts = list(NORM_PARTS)
    meters = [*loop._meters(job, Clock()), *planted]
    weights = [weight for chunk in job.chunks for weight in chunk.named_parameters()]
    tensors = [*weights, *(buffer for chunk in job.chunks for buffer in chunk.named_buffers())]
    stray = [name for name, tensor in tensors if tensor.device.type != "cuda"]
    for step in range(STEPS):
        with _disable_current_modes():
            packs = [job.train.batch(n, n, job.training_options) for n in range(packs_a_step)]
            ids = np.resize(np.arange(packs_a_step), packs_a_step * job.groups.data_size)
            records = job.train.index[ids]

        def arriving(packs: list[Any] = packs) -> Iterator[Any]:
            for pack in packs:
                with _disable_current_modes():
                    waits.lengths = list(pack.sample_lengths)
                yield pack

        weight = sum(pack.weight_sum for pack in packs)
        set_rates(job.optimizer, config, step)
        waits.watching = step == STEPS - 1
        result = train_step(
            job,
            Microbatches(arriving(), packs_a_step, weight, samples=job.samples_of_ranks(records)),
            1.0,
            job.backend,
            meters=meters,
        )
        waits.watching = False
        results = (result.loss, result.grad_norm)
        stray += [f"result {n}" for n, one in enumerate(results) if one.device.type != "cuda"]
    if "delayed" not in config.fp8.recipes.values():  # its state is pickled, a fake one cannot be
        stray += save_and_load(job)
    return {"stray": stray, "weights": sum(weight.numel() for _, weight in weights)}


def save_and_load(job: Any) -> list[str]:
    """Gather the optimizer's state as a save does, and give it back as a resume does; return the
    names of what is on the wrong device.
    """
    from megavlm.train import checkpoint

    weights = checkpoint.sharded_weights(job.chunks)
    stray = []
    for part in job.optimizer.chained_optimizers:
        if part.is_stub_optimizer:  # as the other ranks are not there to say what they train
            continue
        state = part.sharded_param_state_fully_reshardable(weights)
        entries = [entry for entries in state.values() for entry in entries.values()]
        stray += [entry.key for entry in entries if entry.data.device.type != "cpu"]
        part.load_parameter_state_from_fully_reshardable(
            {
                number: {name: entry.data for name, entry in entries.items()}
                for number, entries in state.items()
            }
        )
        shards = [shard for group in part.optimizer.param_groups for shard in group["params"]]
        stray += [f"a shard of {len(shard)}" for shard in shards if shard.device.type != "cuda"]
    return stray


class Reader:
    """A meter that reads every loss at once, as a careless one would."""

    def add(self, losses: Any, batch: Any, weight_of_step: float) -> None:
        """Read a value of the device."""
        losses.total.sum().item()


class Stray:
    """A meter that keeps its sum on the host."""

    def add(self, losses: Any, batch: Any, weight_of_step: float) -> None:
        """Add tensors of two devices."""
        import torch

        torch.zeros(losses.total.shape, device="cpu") + losses.total


def measure(
    folder: Path,
    waits: Any,
    settings: dict[str, Any],
    planted: Sequence[Any] = (),
    packs_a_step: int = PACKS,
) -> dict[str, Any]:
    """Run one setting of the small model, as ``watch`` does."""
    from tests.gpu.models import small

    config = small(folder, **dict(kernels="transformer_engine") | settings)
    return watch(config, waits, planted, packs_a_step)


def watch(
    config: Any, waits: Any, planted: Sequence[Any] = (), packs_a_step: int = PACKS
) -> dict[str, Any]:
    """Run a configuration and return what was found, or the error that ended it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megavlm.parallel import process_groups

    waits.found.clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), waits:
            found = run(config, waits, planted, packs_a_step)
    except Exception as error:
        found = {"error": "".join(traceback.format_exception(error))[-3000:]}
    finally:
        process_groups.destroy()
    return found | {"waits": dict(waits.found)}


def main() -> None:
    """Run every setting, and two with planted faults."""
    from tests.gpu.models import SMALL
    from tests.te.numbers import make_packs

    folder = make_packs(SMALL.features_per_tile)
    waits = prepare()
    found = {name: measure(folder, waits, settings) for name, settings in SETTINGS.items()}
    found["planted wait"] = measure(folder, waits, {}, [Reader()])
    found["planted mismatch"] = measure(folder, waits, {}, [Stray()])
    json.dump(found, os.fdopen(int(sys.argv[1]), "w"))


if __name__ == "__main__":
    main()
