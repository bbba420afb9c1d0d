"""What a run finds to start from: its own checkpoint, or what the command names."""

from __future__ import annotations

from pathlib import Path

from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.config.schema import Config
from megavlm.train import below, origin, resume
from megavlm.train.origin import Start


def find(config: Config) -> Start:
    """Find what a run starts from. Only small files are read, and nothing is written.

    Raises:
        ConfigError: it does not fit the run.
        ValueError: it is not there, or cannot be used.
    """
    own = resume.own(config)
    if own is None:
        return origin.find(config)
    below.find(config, own)  # which must be there
    return own


def in_words(config: Config, start: Start) -> str:
    """Say what a run would start from.

    Args:
        config: the run.
        start: as of ``find``.
    """
    if isinstance(start, Checkpoint):
        if not resume.resumes(config, start):
            return f"it would start from the weights of {start.folder}"
        source = config.checkpoint.save if resume.is_own(config, start) else start.folder
        return f"it would resume {source} after step {start.state.step} of {config.training.steps}"
    if isinstance(start, Path):
        return f"it would start from the weights of {start}"
    if start is not None:
        return f"it would start from the weights of {', '.join(start.parts.values())}"
    return "it would start with random weights"
