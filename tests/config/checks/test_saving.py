"""Cross checks of where checkpoints go and come from."""

from __future__ import annotations

from pathlib import Path

from megavlm.config.checks.saving import checkpoint_problems
from megavlm.config.schema import Checkpoint


def test_weights_alone_need_a_checkpoint_and_leave_moments_out(tmp_path: Path):
    def problems(**settings) -> list[str]:
        checkpoint = Checkpoint(save="run", weights_only=True, **settings)
        return list(checkpoint_problems(checkpoint, eval_interval=0, steps=10, averages=False))

    assert problems(load=str(tmp_path)) == []
    [missing] = problems()
    assert missing.startswith("--checkpoint.weights_only needs --checkpoint.load")
    [both] = problems(load=str(tmp_path), moments="keep")
    assert "weights_only and --checkpoint.moments keep exclude each other" in both
