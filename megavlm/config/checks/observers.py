"""Cross checks of what a run is observed with: a tracker that cannot work is refused before the run
starts, since it must not end it later.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from urllib.parse import urlsplit

from megavlm.config.schema import Checkpoint, Logging

_WANDB_SERVER = "https://api.wandb.ai"


def observer_problems(logging: Logging, checkpoint: Checkpoint) -> Iterator[str]:
    """Name trackers that cannot be used: a package or a key is missing, or a folder."""
    if logging.tensorboard and not checkpoint.save:
        yield "--logging.tensorboard true needs --checkpoint.save, where its files go"
    if logging.tensorboard and find_spec("tensorboard") is None:
        yield (
            "--logging.tensorboard true: TensorBoard is not installed; pip install"
            " 'megavlm[tensorboard]', or leave it out"
        )
    if logging.mlflow and find_spec("mlflow") is None:
        yield (
            f"--logging.mlflow {logging.mlflow}: MLflow is not installed; pip install"
            " 'megavlm[mlflow]', or leave it out"
        )
    if logging.mlflow and not checkpoint.save and not os.environ.get("MLFLOW_TRACKING_URI"):
        yield (
            f"--logging.mlflow {logging.mlflow} needs --checkpoint.save, where its files go, or the"
            " address of a server in MLFLOW_TRACKING_URI"
        )
    if not logging.wandb_project:
        return
    if logging.wandb_mode == "offline" and not checkpoint.save:
        yield "--logging.wandb_mode offline needs --checkpoint.save, where its files go"
    given = f"--logging.wandb_project {logging.wandb_project}"
    if find_spec("wandb") is None:
        yield (
            f"{given}: Weights & Biases is not installed; pip install 'megavlm[wandb]', or leave it"
            " out"
        )
    elif logging.wandb_mode == "online" and not _has_key():
        yield (
            f"{given}: there is no key for Weights & Biases; run wandb login, set WANDB_API_KEY, or"
            " use --logging.wandb_mode offline"
        )


def _has_key() -> bool:
    """Return whether Weights & Biases finds a key in the environment, or in netrc as its login
    leaves it there.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _WANDB_SERVER)).hostname or ""
    try:
        # A path that is named is read whoever owns it: a container may mount another user's.
        path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
