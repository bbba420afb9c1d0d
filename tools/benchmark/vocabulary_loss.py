"""Measure the memory and the time of the head over the vocabulary with its loss, forward and
backward, with whole logits and by block. Each case runs in a process of its own, on one CPU thread.

python tools/benchmark/vocabulary_loss.py --out docs/benchmarks/vocabulary_loss.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.benchmark.figures import write_figures


def measure(tokens: int, width: int, words: int, block: int) -> dict[str, float]:
    """Run one case; return its loss, seconds, and the memory beyond weights and inputs, in MiB.

    Args:
        tokens: with a loss.
        width: hidden size.
        words: rows of the vocabulary.
        block: rows at a time; 0: megatron-core's loss on whole logits.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megavlm.config.schema import Parallel
    from megavlm.model.vocabulary_loss import LossTerms, vocabulary_loss
    from megavlm.parallel import backend, process_groups

    torch.set_num_threads(1)
    with tempfile.NamedTemporaryFile() as store:
        file_store = dist.FileStore(store.name, 1)
        backend.start(5, store=file_store)
        groups = process_groups.create(Parallel(), seed=1)
        generator = torch.Generator().manual_seed(1)
        head = torch.randn(words, width, generator=generator).mul_(0.02).requires_grad_()
        hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
        labels = torch.randint(0, words, (tokens,), generator=generator)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        if block:
            terms = LossTerms(block=block, rows=words, vocabulary=words)
            losses = vocabulary_loss(hidden, head, labels, terms, groups.collection.tp)
        else:
            losses = vocab_parallel_cross_entropy((hidden @ head.T)[:, None], labels[:, None])
        loss = losses.mean()
        loss.backward()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        backend.stop()
    return {
        "block": block,
        "loss": loss.item(),
        "gradient_norm_of_head": head.grad.norm().item(),
        "gradient_norm_of_hidden": hidden.grad.norm().item(),
        "seconds": round(seconds, 2),
        "peak_mib": round((peak - before) / 1024, 1),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--words", type=int, default=151_674)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 32768, 8192, 2048])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape = (options.tokens, options.width, options.words)
    context = multiprocessing.get_context("spawn")
    rows = []
    for block in options.blocks:
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (*shape, block)))
        print(json.dumps(rows[-1]), flush=True)
    found = dict(zip(("tokens", "width", "words"), shape, strict=True))
    if options.out:
        write_figures(options.out, found | {"cases": rows})


if __name__ == "__main__":
    main()
