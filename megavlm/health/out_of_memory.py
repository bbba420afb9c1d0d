"""What a rank says when its memory is full: options that would save memory, and the planner's
command that tells how much.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import torch

from megavlm.config import torchrun
from megavlm.config.cli import of_presets
from megavlm.config.freeze_mask import trains
from megavlm.config.models import MODELS
from megavlm.config.options import options, shown_value, to_namespace
from megavlm.config.schema import Config
from megavlm.model_source import read_model

# Sections of the configuration that the planner reads, beside the layout.
_PLANNED = ("architecture.", "optimizer.", "training.", "ema.", "fp8.", "loss.", "experts.")
_OF_HOST = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the device, or of the host, is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_HOST)


def advice(config: Config, ranks: int, error: BaseException) -> str:
    """Return what a rank that is out of memory prints.

    Args:
        config: the run.
        ranks: of the run.
        error: what was raised.
    """
    first, *_ = str(error).splitlines() or [type(error).__name__]
    lines = [
        f"error: out of memory on {torchrun.name_of_rank()}: {first}",
        "options that save memory, those that cost least time first:",
        *(f"  {line}" for line in _options(config)),
    ]
    if command := _planner_command(config, ranks):
        lines += ["how much each saves, and which layouts fit:", f"  {command}"]
    return "\n".join(lines)


def _options(config: Config) -> Iterator[str]:
    """Yield the options that save memory and are not used yet."""
    parallel = config.parallel
    training = config.training
    if training.head_tokens == "all":
        yield "--training.head_tokens supervised"
    if config.architecture.needs.has_vocabulary_head and not config.loss.vocabulary_block:
        yield "--loss.vocabulary_block 8192"
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield "--parallel.sequence_parallel true"
    if training.precision == "float32":
        yield "--training.precision bfloat16"
    elif config.optimizer.moments == "float32" and config.optimizer.is_adam:
        yield "--optimizer.moments bfloat16 (needs Transformer Engine)"
    if parallel.recompute != "full":
        stronger = "selective, or full" if parallel.recompute == "none" else "full"
        yield f"--parallel.recompute {stronger}"
    if not config.architecture.lora.rank and trains("language", training.trainable):
        yield "--architecture.lora.rank 16 with a frozen language model"
    for name in ("tensor_model", "pipeline_model", "context"):
        size = vars(parallel)[f"{name}_parallel_size"]
        yield f"--parallel.{name}_parallel_size {2 * size}, with more GPUs or fewer replicas"
    yield "smaller packs: tools/pack_dataset.py --capacity and --tile_cap"


def _planner_command(config: Config, ranks: int) -> str:
    """Return the command that predicts the memory of this run, with all of its settings that the
    planner looks at; empty if its model is only known to this process.
    """
    try:
        usual = of_presets(config, read_model)
    except (ValueError, OSError):
        return ""
    words = ["python", "tools/plan_parallel.py", "--recipe", config.recipe]
    if config.model in MODELS or Path(config.model).is_dir():
        words += ["--model", config.model]
    words += ["--stage", config.stage, "--gpus", str(ranks)]
    for name, folder in config.init.parts.items():
        words += [f"--init.{name}", folder]
    words += ["--data", config.data.train_folders[0]]
    words += [word for pair in _settings(config, usual, _PLANNED) for word in pair]
    layout = [word for pair in _settings(config, usual, ("parallel.",)) for word in pair]
    return shlex.join([*words, "--layout", shlex.join(layout)])


def _settings(
    config: Config, usual: Config, sections: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Yield flag and value of the settings in some sections that are not as usual."""
    before = to_namespace(usual)
    now = to_namespace(config)
    for key in options():
        if key.startswith(sections) and now[key] != before[key]:
            yield f"--{key}", "" if now[key] == () else shown_value(now[key])


def record_memory(config: Config) -> None:
    """Record the allocations of the GPU from now on, if a snapshot is asked for."""
    if config.profile.memory_snapshot:
        torch.cuda.memory._record_memory_history(max_entries=100_000)


def write_snapshot(config: Config, rank: int) -> str:
    """Write the snapshot that is asked for; return a line that says where it is."""
    folder = Path(config.profile.memory_snapshot)
    path = folder / f"rank_{rank}.pickle"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except OSError as error:
        return f"--profile.memory_snapshot {folder}: could not be written ({error})"
    return f"snapshot of the memory, for pytorch.org/memory_viz: {path}"
