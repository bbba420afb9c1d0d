"""Cross checks of the gradient buckets."""

from __future__ import annotations

from megavlm.config.checks.buckets import bucket_problems
from megavlm.config.schema import Parallel


def test_a_size_without_effect_or_sense_is_named():
    assert list(bucket_problems(Parallel(bucket_size=9))) == []
    assert list(bucket_problems(Parallel(overlap_grad_reduce=False))) == []
    [negative] = bucket_problems(Parallel(bucket_size=-1))
    assert negative == "--parallel.bucket_size -1: must be 0 or more"
    [useless] = bucket_problems(Parallel(bucket_size=9, overlap_grad_reduce=False))
    assert "bucket_size 9 has no effect with --parallel.overlap_grad_reduce false" in useless
