"""Cross checks of the gradient buckets."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.schema import Parallel


def bucket_problems(parallel: Parallel) -> Iterator[str]:
    """Everything about gradient buckets that cannot be, or would have no effect."""
    if parallel.bucket_size < 0:
        yield f"--parallel.bucket_size {parallel.bucket_size}: must be 0 or more"
    elif parallel.bucket_size and not parallel.overlap_grad_reduce:
        yield (
            f"--parallel.bucket_size {parallel.bucket_size} has no effect with"
            " --parallel.overlap_grad_reduce false, which sums all gradients in one go"
        )
