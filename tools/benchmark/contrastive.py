"""Measure memory and time of a contrastive step by the pairs of its batch: in one microbatch, and
in several with cached gradients. Each case runs in a process of its own, on one CPU thread.

python tools/benchmark/contrastive.py --out docs/benchmarks/contrastive.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from megavlm.config.recipes import recipe
from megavlm.config.schema import Config, Data, Parallel, Training
from tools.benchmark.figures import write_figures

_WORDS = 16
_MIB = 2**20


def config_of(pairs: int, packs: int) -> Config:
    """Return the run: CLIP's model, smaller."""
    row = recipe("clip")
    found = row.architecture
    small = dict(num_layers=6, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=4)
    architecture = replace(
        found,
        vision=replace(found.vision, image_size=64, patch_size=8, **small),
        language=replace(found.language, num_query_groups=4, vocab_size=1000, **small),
    )
    trainable = row.stages["1"].training.trainable
    training = Training(trainable=trainable, precision="float32", global_batch_size=packs)
    return Config(
        recipe="clip",
        stage="1",
        model="small",
        architecture=architecture,
        data=Data(loss_reduction="sample"),
        training=training,
    )


def make_batch(config: Config, pairs: int, seed: int) -> Any:
    """Return a pack of random pairs."""
    from megavlm.data.loading.batch import Batch
    from megavlm.data.loading.prefixes import find_prefixes

    vision = config.architecture.vision
    rng = np.random.default_rng(seed)
    tokens = pairs * _WORDS
    ends = np.arange(0, tokens + 1, _WORDS, dtype=np.int32)
    side = vision.image_size
    return Batch.of(
        tokens=rng.integers(0, 1000, tokens),
        labels=np.zeros(tokens, np.int64),
        loss_weights=np.full(tokens, 1 / _WORDS, np.float32),
        loss_positions=np.arange(tokens),
        sources=np.zeros(tokens, np.int32),
        is_padding=np.zeros(tokens, bool),
        sample_ends=ends,
        sample_lengths=(_WORDS,) * pairs,
        longest_sample=_WORDS,
        prefixes=find_prefixes(np.ones(tokens, bool), np.arange(tokens), ends),
        tiles=rng.integers(0, 256, (pairs, 3, side, side), dtype=np.uint8),
        feature_positions=np.zeros(0, np.int64),
        feature_numbers=np.zeros(0, np.int64),
        newline_positions=np.zeros(0, np.int64),
        num_features=0,
        drop_path_draws=np.zeros((2 * vision.num_layers, pairs), np.float32),
        samples=pairs,
        weight_sum=float(pairs),
        pack_id=0,
    )


def measure(pairs: int, packs: int) -> dict[str, float]:
    """Run one case; return its seconds, the memory of a step beyond weights, gradients and inputs,
    and what the planner expects, in MiB.

    Args:
        pairs: of the step.
        packs: microbatches that they stand in.
    """
    import torch

    from megavlm.model import weights
    from megavlm.parallel import backend, process_groups
    from megavlm.planner.layout import make_layout
    from megavlm.planner.memory import memory
    from megavlm.planner.partition import PackSize
    from megavlm.train.build_model import build_model
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.whole_step import run_whole_step

    torch.set_num_threads(1)
    each = pairs // packs
    config = config_of(pairs, packs)
    size = PackSize(tokens=each * _WORDS, squared_lengths=each * _WORDS**2, tiles=each)
    layout = make_layout(config, size)
    expected = memory(config, layout, 1, capacity=each * _WORDS, tiles=each)
    with tempfile.NamedTemporaryFile() as store:
        device = backend.start(5, store=torch.distributed.FileStore(store.name, 1))
        groups = process_groups.create(Parallel(), 1, layout.embedding_chunk)
        fresh = weights.fresh_tensor(config)
        built = build_model(
            config, layout, groups, device, lambda chunks: weights.fill(chunks, fresh)
        )
        batches = [make_batch(config, each, seed) for seed in range(packs)]

        def run(some: Sequence[Any]) -> float:
            for chunk in built.ddp_chunks:
                chunk.zero_grad_buffer()
            samples = [[one.samples for one in some]]
            weight = sum(one.weight_sum for one in some)
            step = Microbatches(iter(some), len(some), weight, samples=samples)
            return float(run_whole_step(built.ddp_chunks, step, device))

        run([make_batch(config, 2, 0)])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        loss = run(batches)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        backend.stop()
    return {
        "pairs": pairs,
        "microbatches": packs,
        "loss": loss,
        "seconds": round(seconds, 2),
        "peak_mib": round((peak - before) / 1024, 1),
        "planned_mib": round(expected.activations / _MIB, 1),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--microbatch", type=int, default=32, help="pairs of a cached microbatch")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    for pairs in options.pairs:
        for packs in (1, pairs // options.microbatch):
            with context.Pool(1) as pool:
                rows.append(pool.apply(measure, (pairs, packs)))
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        command = "python tools/benchmark/contrastive.py --out docs/benchmarks/contrastive.json"
        note = "seconds are of one thread of a loaded machine with two cores"
        write_figures(options.out, {"cases": rows}, command=command, note=note)


if __name__ == "__main__":
    main()
