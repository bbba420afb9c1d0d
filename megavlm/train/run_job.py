"""A job on this rank from its checked configuration to its export: open the data, build, train."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megavlm.checkpoint import directory
from megavlm.checkpoint.lock import Lock
from megavlm.checkpoint.rank_errors import raised_on_all
from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.checkpoint.train_state import State
from megavlm.config.schema import Config
from megavlm.data.loading.blend import BlendPlan, open_blend
from megavlm.data.loading.order import Order
from megavlm.health import speed_check
from megavlm.parallel import process_groups
from megavlm.parallel.backend import Backend
from megavlm.parallel.process_groups import Groups
from megavlm.planner.layout import Layout, make_layout
from megavlm.planner.partition import PackSize
from megavlm.train import reference_pass, resume
from megavlm.train.build_job import build_job
from megavlm.train.export import export_finished
from megavlm.train.loop import train
from megavlm.train.metrics import Metrics
from megavlm.train.periodic_evaluation import evaluate
from megavlm.train.resume import Start
from megavlm.train.stop_signal import StopRequest
from megavlm.train.summary import log_run_summary


def run_job(
    config: Config,
    backend: Backend,
    start: Start,
    lock: Lock | None,
    stop: StopRequest,
) -> State:
    """Build the model and everything around it, train, and export; or only evaluate. Collective.

    Args:
        config: the run, checked.
        backend: where tensors live.
        start: start point returned by ``inspect``.
        lock: of the save folder, on the rank that holds it.
        stop: what people ask of the command.

    Raises:
        DamagedError: the checkpoint to start from is damaged, on every rank.
        RankError: a rank cannot read or write its files, on every rank.
        SaveError: the last checkpoint could not be saved, on every rank.
        StepError: a step has no loss or no finite gradient, on every rank.
    """
    packs, plan = open_blend(config)
    layout = make_layout(config, PackSize.mean(packs.some_records()))
    groups = process_groups.create(config.parallel, config.training.seed, layout.embedding_chunk)
    if isinstance(start, Checkpoint):
        start = resume.find_undamaged(config, start)
    with Metrics(config, groups.is_writer, resume.first_step(config, start)) as metrics:
        if config.health.speed_check and groups.size > 1:
            _check_speed(config, groups, backend, metrics)
        if config.checkpoint.save:
            _clean(Path(config.checkpoint.save), groups, metrics)
        job, state = build_job(config, layout, groups, backend, packs, plan, start, lock)
        log_run_summary(config, groups, job.trained, start, state, metrics)
        _log_plans(config, layout, plan, metrics)
        if not reference_pass.prepare(job, start, metrics, stop):
            return state
        if config.eval.only:
            return evaluate(job, state, metrics)
        state = train(job, state, metrics, stop)
        export_finished(config, state, start, groups)
    return state


def _clean(save: Path, groups: Groups, metrics: Metrics) -> None:
    """Remove what a killed run left in the save folder. Collective."""
    left: list = [[]]
    with raised_on_all():
        if groups.rank == 0 and save.exists():
            left = [directory.clean(save)]
    dist.broadcast_object_list(left)
    if left[0]:
        metrics.log(f"removed from {save} what a killed run left: {', '.join(left[0])}")


def _check_speed(config: Config, groups: Groups, backend: Backend, metrics: Metrics) -> None:
    """Log how fast ranks and groups are, and who is slow. Collective."""
    speeds, found = speed_check.check(groups, backend, config.health)
    metrics.log(speed_check.summary(speeds))
    for finding in found:
        metrics.log(f"warning: {finding}")


def _log_plans(config: Config, layout: Layout, plan: Order, metrics: Metrics) -> None:
    """Log how the model is cut for the pipeline, how often the data is seen, and how several
    datasets are mixed.
    """
    if config.parallel.pipeline_model_parallel_size > 1:
        metrics.log(f"pipeline: {layout}")
    training = config.training
    if not config.eval.only:
        epochs = training.steps * training.global_batch_size / plan.num_packs
        metrics.log(
            f"data: {plan.num_packs:,} packs; {training.steps:,} steps of"
            f" {training.global_batch_size:,} are {epochs:,.2f} epochs"
        )
    if isinstance(plan, BlendPlan):
        metrics.log(f"data: packs by folder: {plan.describe(config.data.train_folders)}")
