"""What a run tells while it trains, and whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Console, metrics and trackers.

    Args:
        interval: steps between records on the console, in ``metrics.jsonl`` and in the trackers.
        tensorboard: also write TensorBoard event files, to ``tensorboard/`` in the save folder.
        wandb_project: Weights & Biases project; empty: off.
        wandb_mode: send records to Weights & Biases (online), or keep them in the save folder
            (offline).
        mlflow: MLflow experiment; empty: off. Records go to the server that
            ``MLFLOW_TRACKING_URI`` names, or else to ``mlruns/`` in the save folder.
        run_name: name of the run in the trackers.
        peak_tflops: dense BF16 TFLOP/s of one GPU, which MFU is a share of; 0: as an A100, an H100
            SXM or an H200 has, and no MFU on others.
    """

    interval: int = 10
    tensorboard: bool = False
    wandb_project: str = ""
    wandb_mode: Literal["online", "offline"] = "online"
    mlflow: str = ""
    run_name: str = ""
    peak_tflops: float = 0.0
