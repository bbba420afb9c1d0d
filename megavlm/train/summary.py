"""What a run says about itself before its first step."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megavlm import job_checks
from megavlm.checkpoint.rank_errors import raised_on_all
from megavlm.checkpoint.train_state import State
from megavlm.config import torchrun
from megavlm.config.checks.resume import changes
from megavlm.config.freeze_mask import PARTS
from megavlm.config.schema import Config, Init, Parallel
from megavlm.convert.hf import dropout, from_parts
from megavlm.model.freeze import Trained
from megavlm.parallel import process_groups
from megavlm.planner.parameter_table import parameter_table, table_lines
from megavlm.train import resume, start_point
from megavlm.train.disk_room import room_warnings
from megavlm.train.metrics import Metrics
from megavlm.train.resume import Start

_GROUPS = ("optimizer.decay ", "no_decay", "lr_multipliers", "layer_decay")


def log_run_summary(
    config: Config,
    groups: process_groups.Groups,
    trained: Trained,
    start: Start,
    state: State,
    metrics: Metrics,
) -> None:
    """Say what is about to run."""
    context = f" x context {groups.context_size}" if groups.context_size > 1 else ""
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    pipeline = f"pipeline {groups.pipeline_size}"
    if virtual > 1:
        pipeline += f" ({virtual} chunks each)"
    sizes = f"tensor {groups.tensor_size}{context} x {pipeline} x data {groups.data_size}"
    sizes += _experts(config.parallel)
    counted = "1 rank" if groups.size == 1 else f"{groups.size} ranks"
    metrics.log(
        f"stage {config.stage}, model {config.model}, {counted}: {sizes},"
        f" {config.training.precision}"
    )
    metrics.log(f"start: {start_point.describe(config, start, state.step)}")
    for note in _notes(config, start):
        metrics.log(f"note: {note}")
    with raised_on_all():
        if groups.is_writer:  # it reads the manifests again
            found = job_checks.warnings(config, groups.size)
            if config.data.valid or not config.eval.only:  # questions are made ready without them
                found += _worker_warnings(config.data.workers)
            if not config.eval.only:
                found += room_warnings(config, state.step)
            for warning in found:
                metrics.log(f"warning: {warning}")
    if not config.eval.only:
        _log_training(config, trained, start, state, metrics)


def _notes(config: Config, start: Start) -> list[str]:
    """Return what a run makes of the folders that it starts from that they are not by
    themselves.
    """
    if isinstance(start, Init):
        return from_parts.notes(start, config.architecture) + dropout.notes_on_parts(start)
    return dropout.notes_on_model(start) if isinstance(start, Path) else []


def _worker_warnings(workers: int) -> Iterator[str]:
    """Warn of more loader workers than cores of this machine that this process may use; torchrun
    says how many ranks it has started here.
    """
    ranks = torchrun.local_size()
    cores = len(os.sched_getaffinity(0))
    if ranks * workers > cores:
        most = cores // ranks
        yield (
            f"--data.workers {workers}: ranks x workers on this machine are {ranks} x {workers},"
            f" more than its {cores} cores; give at most --data.workers {most}"
        )


def _log_training(
    config: Config, trained: Trained, start: Start, state: State, metrics: Metrics
) -> None:
    """Log what is about to be trained, and how."""
    if resume.resumes(config, start) and (table := changes(start.config, config)):
        metrics.log("\n".join(["changed since the checkpoint:", *table]))
        if any(option in line for line in table for option in _GROUPS):
            metrics.log("parameter groups are divided anew; moments follow their parameters")
    if state.history:
        *_, (steps, trainable) = state.history
        metrics.log(
            f"moments: those after {steps} steps of {', '.join(trainable)} for what this stage"
            " trains too, fresh for the rest"
        )
    elif state.step == 0:
        metrics.log("moments: fresh")
    if config.checkpoint.save:
        metrics.log(_how_to_save())
    shares = ", ".join(
        f"{part} {trained.weights[part]:,} of {trained.total[part]:,}"
        for part in PARTS
        if trained.total[part]
    )
    metrics.log(f"trainable parameters: {shares}")
    metrics.log("\n  ".join(["parameter groups:", *table_lines(config, parameter_table(config))]))
    metrics.record(state.step, {"trainable_parameters": sum(trained.weights.values())})


def _experts(parallel: Parallel) -> str:
    """Write over how many ranks experts are split, and each of them, if they are."""
    ranks = parallel.expert_model_parallel_size
    shared = parallel.expert_tensor_parallel_size
    split = f", experts over {ranks}" if ranks > 1 else ""
    return split + (f", each expert over {shared}" if shared > 1 else "")


def _how_to_save() -> str:
    asks = f"kill -USR1 {os.getpid()} on {socket.gethostname()}"
    return f"to save a checkpoint at the next logged step and continue: {asks}"
