"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import numpy as np
import torch.distributed as dist

from megavlm.checkpoint.train_state import State
from megavlm.config import torchrun
from megavlm.data.loading.batch import Batch
from megavlm.data.loading.loader import Unreadable, readable
from megavlm.data.loading.step_packs import StepPacks
from megavlm.data.loading.weights import weight_of
from megavlm.health.lost_machines import LostMachineWatch
from megavlm.health.watchdog import Watchdog
from megavlm.planner.flops import training_cost
from megavlm.train import failures, router_state
from megavlm.train.bad_steps import BadStepRule, StepError
from megavlm.train.control_pass import ControlPass
from megavlm.train.expert_load import ExpertLoad
from megavlm.train.gates import Gates
from megavlm.train.job import Job
from megavlm.train.meters import Clock, Meter
from megavlm.train.metrics import Metrics
from megavlm.train.microbatches import Microbatches
from megavlm.train.named_losses import NamedLosses
from megavlm.train.optimizer import set_rates
from megavlm.train.periodic_evaluation import evaluate
from megavlm.train.profile import ProfiledSteps
from megavlm.train.saver import Saver
from megavlm.train.schedule import drop_path
from megavlm.train.source_losses import SourceLosses
from megavlm.train.step import StepResult, train_step
from megavlm.train.step_log import StepLog
from megavlm.train.stop_signal import StopRequest
from megavlm.train.supply import Supply
from megavlm.train.throughput import Throughput, peak_of
from megavlm.train.unchecked_norms import UncheckedNorms
from megavlm.train.unreadable_packs import ADVICE, UnreadablePacks

_NOTHING_KEPT = "nothing is kept without --checkpoint.save"


def train(job: Job, state: State, metrics: Metrics, stop: StopRequest) -> State:
    """Train from ``state`` to the last step, or until asked to stop. Collective.

    Args:
        job: the run.
        state: where it is.
        metrics: get the figures.
        stop: what people ask of the command.

    Raises:
        StepError: no token of a step is supervised, so its loss is not defined; a gradient was not
            finite, and the last checkpoint is from before it; too many steps were skipped; or too
            many packs cannot be read.
        ReadError: a pack cannot be read, on ranks that need it.
        SaveError: the last checkpoint could not be saved.
    """
    config = job.config
    groups = job.groups
    device = job.backend.device
    packs = config.training.global_batch_size
    last = config.training.steps
    saver = Saver(job, metrics, state.step)
    if state.step >= last:
        metrics.log(f"nothing to do: step {state.step} is done, and --training.steps is {last}")
        if state.trained_only and config.checkpoint.save:
            saver.save(state)  # the last checkpoint is whole, also if fewer steps are asked for now
    rule = BadStepRule(job, state, metrics)
    unreadable = UnreadablePacks(job, state, metrics)
    norms = UncheckedNorms()
    clock = Clock()
    supply = Supply(job.backend, job.train.manifest.capacity)
    control = ControlPass(job, clock)
    meters = (*_meters(job, clock), supply, control)
    step_log = StepLog(job, meters, metrics, state.step)
    steps = StepPacks(job.train, job.plan, packs)
    # A connection of their own: the other may be waiting.
    store = dist.group.WORLD.get_group_store().clone()
    watchdog = _watchdog(job, store)
    job = dataclasses.replace(job, watch=watchdog.count)
    with (
        watchdog,
        _watch_for_lost_machines(job, store, watchdog),
        ProfiledSteps(config.profile, groups.rank, metrics, state.step) as profiled,
        contextlib.closing(_load_batches(job, state)) as loader,
    ):
        batches = supply.timed(loader)
        if state.step == 0 and not groups.any_rank(stop.asked, device):
            with clock.paused():
                state = _evaluate(job, state, metrics, watchdog)
        while state.step < last:
            watchdog.enter("step", state.step + 1)
            profiled.enter_step(state.step + 1)
            ids, records = steps.after(state.consumed)
            rate = set_rates(job.optimizer, config, state.step, state.skipped, state.skipped_steps)
            try:
                arrived, records = unreadable.replace(state, ids, records, batches)
                result = _step(job, state, ids, records, arrived, meters, rule, control)
                state = unreadable.after(rule.after(state.after(packs)))
                if not result.is_skipped:
                    if job.averages is not None:
                        job.averages.update(state.updates - 1)
                    norms.add(state.step, ids, result.grad_norm)
                for meter in meters:
                    meter.add_step(records)
                is_last = state.step == last
                is_logged = is_last or state.step % config.logging.interval == 0
                saves = is_last or _saves(job, state)
                if is_logged or saves:
                    grad_norm = norms.check(result.grad_norm)
                rule.check_limits(state.step)
            except StepError:
                saver.wait()  # every rank is here, and what is being written is from before it
                raise

            asked_to_stop = False
            wants_save = False
            if is_logged:
                step_log.record(state, result.loss, grad_norm, rate)
                asked_to_stop = groups.any_rank(stop.asked, device)
                wants_save = groups.any_rank(stop.wants_save, device)
                saves = saves or wants_save
                with clock.paused():
                    saver.poll()
            if is_last or (_evaluates(job, state) and not asked_to_stop):
                with clock.paused():
                    state = _evaluate(job, state, metrics, watchdog)
            if config.checkpoint.save and (saves or asked_to_stop):
                with clock.paused():
                    watchdog.enter("checkpoint", state.step)
                    saver.save(state)
                    stop.wants_save = False
            elif wants_save:
                metrics.log(f"WARNING: SIGUSR1 asked for a checkpoint, and {_NOTHING_KEPT}")
                stop.wants_save = False
            if asked_to_stop or is_last:
                saver.wait()  # while a signal does not end the run at once
            if asked_to_stop:
                metrics.log(_how_it_stopped(job, stop, state.step, saver.step))
                break
        saver.finish()
        unreadable.tell()
        # Whoever begins another run has to know of what came after the last look.
        stop.is_agreed = groups.any_rank(stop.asked, device)
    return state


def _how_it_stopped(job: Job, stop: StopRequest, step: int, saved: int) -> str:
    """Return why a run ended before its last step, and what is left of it.

    Args:
        job: the run.
        stop: what asked for it.
        step: the last step that was trained.
        saved: the step of the last checkpoint.
    """
    kept = _NOTHING_KEPT
    if job.config.checkpoint.save:
        kept = f"the last checkpoint is of step {saved}"
    return f"stopped by {stop.cause} after step {step}; {kept}"


def _load_batches(job: Job, state: State) -> Generator[Batch | Unreadable, None, None]:
    """Load this data-parallel rank's packs of the steps after ``state``.

    Raises:
        ReadError: one cannot be read, and none may be left out.
    """
    config = job.config
    left = config.training.steps - state.step
    end = state.consumed + left * config.training.global_batch_size
    loaded = job.batches(
        job.train,
        job.plan,
        range(state.consumed + job.groups.data_rank, end, job.groups.data_size),
        job.training_options,
        workers=config.data.workers,
    )
    if config.data.max_unreadable_packs:
        return loaded
    needs = config.architecture.needs
    return readable(loaded, "" if needs.spans_step or needs.is_of_preferences else ADVICE)


def _evaluate(job: Job, state: State, metrics: Metrics, watchdog: Watchdog) -> State:
    """Evaluate the model after ``state``; the watchdog hears that it goes on."""
    return evaluate(job, state, metrics, partial(watchdog.enter, "evaluation", state.step))


def _step(
    job: Job,
    state: State,
    ids: np.ndarray,
    records: np.ndarray,
    batches: Iterator[Batch],
    meters: Sequence[Meter],
    rule: BadStepRule,
    control: ControlPass,
) -> StepResult:
    """Run the step after ``state`` on the packs ``ids``, of which the index has ``records``, and
    its control pass if it has one.

    Raises:
        StepError: no token is supervised, so there is no loss; or ``BadStepRule.skips`` raised it.
    """
    config = job.config
    weight = weight_of(records, config.data.loss_reduction)
    if not weight:
        raise StepError(
            f"step {state.step + 1}: --data.train {config.data.train}: no token of packs"
            f" {ids.tolist()} is supervised, so there is no loss"
        )
    router_state.let_wait(job.chunks, config.training, state.step)
    if highest := config.training.highest_drop_path:
        rate = drop_path(state.step, config.training, job.trained.frozen_steps["vision"])
        for chunk in job.chunks:
            chunk.set_drop_path(rate / highest)
    skips = partial(rule.skips, state.step + 1, ids.tolist())
    packs = Microbatches(
        batches,
        len(ids) // job.groups.data_size,
        weight,
        weight_of_pack=_weight_of_pack(job, ids, records),
        samples=job.samples_of_ranks(records),
    )
    return train_step(
        job,
        control.run(state.step + 1, packs),
        config.optimizer.clip_grad,
        job.backend,
        meters=meters,
        skips=skips if config.bad_steps.is_watched else None,
    )


def _weight_of_pack(
    job: Job, ids: np.ndarray, records: np.ndarray
) -> Callable[[Batch], float] | None:
    """Return what the loss of each pack of a step is divided by; none: the same for all."""
    data = job.config.data
    if not data.loss_weights:
        return None
    divisors = job.train.pack_weights(ids, records, data.loss_reduction, data.loss_weights)
    return lambda batch: divisors[batch.pack_id]


def _evaluates(job: Job, state: State) -> bool:
    """Return whether it is time for an evaluation. Who asks to stop may not wait for one."""
    interval = job.config.training.eval_interval
    return bool(interval) and state.step % interval == 0


def _saves(job: Job, state: State) -> bool:
    """Return whether a checkpoint is due after a step: by steps, or by epochs that are over."""
    files = job.config.checkpoint
    by_steps = files.save_interval and state.step % files.save_interval == 0
    epoch = files.save_epochs * job.plan.num_packs
    before = state.consumed - job.config.training.global_batch_size
    return bool(by_steps or (epoch and state.consumed // epoch > before // epoch))


def _meters(job: Job, clock: Clock) -> Sequence[Meter]:
    """Make the meters of the run; their figures are logged in this order."""
    cost = training_cost(job.config.architecture, job.config.training.trainable)
    return (
        NamedLosses(job.config.architecture, job.backend.device),
        Throughput(cost, clock, job.config.logging.peak_tflops or peak_of(job.backend.device)),
        SourceLosses(job.train.source_names, job.backend.device),
        job.part_norms,
        Gates(job.ddp_chunks),
        ExpertLoad(job.chunks, job.config.architecture, job.backend.device),
    )


def _watch_for_lost_machines(
    job: Job, store: dist.Store, watchdog: Watchdog
) -> contextlib.AbstractContextManager[None]:
    """Return the context in which this rank ends after another machine is lost."""
    seconds = job.config.health.lost_machine_seconds
    store_at = torchrun.store_at()
    is_alone = torchrun.local_size() >= job.groups.size
    if not seconds or store_at is None or is_alone:
        return contextlib.nullcontext()
    return LostMachineWatch(
        dist.PrefixStore("machines", store),
        job.groups.rank,
        job.groups.size,
        torchrun.local_rank(),
        torchrun.local_size(),
        seconds,
        store_at,
        watchdog.idle,
        failures.OF_ALL_RANKS,
    )


def _watchdog(job: Job, store: dist.Store) -> Watchdog:
    return Watchdog(
        dist.PrefixStore("watchdog", store),
        job.groups.rank,
        job.groups.size,
        job.config.health,
        job.config.parallel.timeout_minutes,
    )
