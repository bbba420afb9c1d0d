"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.checkpoint.train_state import State
from megavlm.data.loading.batch import Batch
from megavlm.health.watchdog import Watchdog
from megavlm.planner.flops import training_cost
from megavlm.train import meters as observers
from megavlm.train import router_state
from megavlm.train.bad_steps import BadStepRule, StepError
from megavlm.train.control_pass import ControlPass
from megavlm.train.evaluate import held_out_loss
from megavlm.train.expert_load import ExpertLoad
from megavlm.train.gates import Gates
from megavlm.train.group_rates import GroupRates
from megavlm.train.job import Job
from megavlm.train.meters import Clock, Meter
from megavlm.train.metrics import Metrics
from megavlm.train.named_losses import NamedLosses
from megavlm.train.optimizer import set_rates, whole_weights
from megavlm.train.profile import ProfiledSteps
from megavlm.train.retrieval import recalls
from megavlm.train.saver import Saver
from megavlm.train.schedule import drop_path
from megavlm.train.source_losses import SourceLosses
from megavlm.train.step import StepResult, WeightOfPack, train_step
from megavlm.train.stop_signal import StopRequest
from megavlm.train.supply import Supply
from megavlm.train.tasks import answer_tasks
from megavlm.train.throughput import Throughput, peak_of


def run(job: Job, state: State, metrics: Metrics, stop: StopRequest | None = None) -> State:
    """Train from ``state`` to the last step, or until asked to stop. Collective.

    Args:
        job: the run.
        state: where it is.
        metrics: get the figures.
        stop: what people ask of the whole command; none: of this run alone.

    Raises:
        StepError: no token of a step is supervised, so its loss is not defined; a gradient was not
            finite, and the last checkpoint is from before it; or too many steps were skipped.
        SaveError: the last checkpoint could not be saved.
    """
    config = job.config
    groups = job.groups
    packs = job.config.training.global_batch_size
    last = config.training.steps
    interval = config.logging.interval
    positions = range(
        state.consumed + groups.data_rank,
        state.consumed + (last - state.step) * packs,
        groups.data_size,
    )
    if state.step >= last:
        metrics.say(f"nothing to do: step {state.step} is done, and --training.steps is {last}")
    loader = job.batches(
        job.train,
        job.plan,
        positions,
        workers=config.data.workers,
        seed=config.training.seed,
        drops_patches=True,
    )
    saver = Saver(job, metrics, state.step)
    if state.step >= last and state.trained_only and config.checkpoint.save:
        saver.save(state)  # the last checkpoint is whole, also where fewer steps are asked for now
    rule = BadStepRule(job, state, metrics)
    unseen = {}
    reported = state.step
    clock = Clock()
    supply = Supply(job.backend, job.train.manifest.capacity)
    control = ControlPass(job, clock)
    meters = (*_meters(job, clock), supply, control)
    rates = GroupRates(config)
    with (
        StopRequest(config.training.max_hours)
        if stop is None
        else contextlib.nullcontext(stop) as stop,
        _watchdog(job) as watchdog,
        ProfiledSteps(config.profile, groups.rank, metrics) as profiled,
        contextlib.closing(loader) as loaded,
    ):
        arriving = supply.timed(watchdog.count(loaded))
        if state.step == 0:
            with clock.paused():
                enter = partial(watchdog.enter, "evaluation", state.step)
                state = evaluate(job, state, metrics, enter)
        while state.step < last:
            watchdog.enter("step", state.step + 1)
            profiled.enter_step(state.step + 1)
            ids = job.plan.pack_ids(state.consumed, packs)
            rate = set_rates(job.optimizer, config, state.step, state.skipped, state.skipped_steps)
            try:
                result = _train(job, state, ids, arriving, meters, rule, control)
                state = rule.after(state.after(packs))
                if not result.is_skipped:
                    if job.averages is not None:
                        job.averages.update(state.updates - 1)
                    unseen[state.step] = (ids.tolist(), result.grad_norm)
                for meter in meters:
                    meter.add_step(job.train.index[ids])
                is_logged = state.step % interval == 0 or state.step == last
                saves = _saves(job, state)
                if is_logged or saves:
                    grad_norm = _look(unseen) if unseen else float(result.grad_norm)
                    unseen = {}
                rule.check_limits(state.step)
            except StepError:
                saver.wait()  # every rank is here, and what is being written is from before it
                raise

            asked_to_stop = False
            if is_logged:
                loss = float(groups.sum_over_data(result.loss))
                figures, by_source = observers.report(meters, groups, state.step - reported)
                reported = state.step
                figures = {"loss": loss, "lr": rate, "grad_norm": grad_norm} | figures
                if config.bad_steps.skips:
                    figures["skipped_steps"] = state.skipped
                by_source |= rates.at(state.step - 1, rate)
                metrics.record(state.step, figures, by_source)
                asked_to_stop = groups.any_rank(stop.asked, job.backend.device)
                saves = groups.any_rank(stop.wants_save, job.backend.device) or saves
                with clock.paused():
                    saver.poll()
            if state.step == last or (_evaluates(job, state) and not asked_to_stop):
                with clock.paused():
                    enter = partial(watchdog.enter, "evaluation", state.step)
                    state = evaluate(job, state, metrics, enter)
            if config.checkpoint.save and (saves or asked_to_stop or state.step == last):
                with clock.paused():
                    watchdog.enter("checkpoint", state.step)
                    saver.save(state)
                    stop.wants_save = False
            if asked_to_stop or state.step == last:
                saver.wait()  # while a signal does not end the run at once
            if asked_to_stop:
                kept = "nothing is kept without --checkpoint.save"
                if config.checkpoint.save:
                    kept = f"the last checkpoint is of step {saver.step}"
                cause = "--training.max_hours" if stop.is_late else "a signal"
                metrics.say(f"stopped by {cause} after step {state.step}; {kept}")
                break
        saver.finish()
        # Whoever begins another run has to know of what came after the last look.
        stop.is_agreed = groups.any_rank(stop.asked, job.backend.device)
    return state


def _train(
    job: Job,
    state: State,
    ids: np.ndarray,
    arriving: Iterator[Batch],
    meters: Sequence[Meter],
    rule: BadStepRule,
    control: ControlPass,
) -> StepResult:
    """Run the step after ``state`` on the packs ``ids``, and its control pass if it has one.

    Raises:
        StepError: no token is supervised, so there is no loss; or ``BadStepRule.skips`` raised it.
    """
    config = job.config
    weight = job.train.weight_sum(ids, config.data.loss_reduction)
    if not weight:
        raise StepError(
            f"step {state.step + 1}: --data.train {config.data.train}: no token of packs"
            f" {ids.tolist()} is supervised, so there is no loss"
        )
    router_state.let_wait(job.chunks, config.training, state.step)
    if highest := config.training.highest_drop_path:
        for chunk in job.chunks:
            chunk.set_drop_path(drop_path(state.step, config.training) / highest)
    skips = partial(rule.skips, state.step + 1, ids.tolist())
    weight_of_pack = _weight_of_pack(job, ids)
    count = len(ids) // job.groups.data_size
    return train_step(
        job.ddp_chunks,
        job.optimizer,
        control.run(state.step + 1, arriving, count, weight, weight_of_pack),
        count,
        weight,
        config.optimizer.clip_grad,
        job.backend,
        meters,
        job.samples_of_ranks(job.train, ids),
        skips if config.bad_steps.is_watched else None,
        weight_of_pack,
        job.part_norms,
    )


def _weight_of_pack(job: Job, ids: np.ndarray) -> WeightOfPack | None:
    """Return what the loss of each pack of a step is divided by; none: the same for all."""
    data = job.config.data
    if not data.loss_weights:
        return None
    divisors = job.train.pack_weights(ids, data.loss_reduction, data.loss_weights)
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


def _look(unseen: dict[int, tuple[list[int], Tensor]]) -> float:
    """Wait for the norms of the last steps' gradients, and refuse one that is not finite; the
    newest is returned.

    Args:
        unseen: the packs and the norm of each step, by its number on the console.
    """
    values = torch.stack([norm for _, norm in unseen.values()]).tolist()
    for (step, (ids, _)), norm in zip(unseen.items(), values, strict=True):
        if not math.isfinite(norm):
            raise StepError(
                f"step {step}: the gradient's norm is {norm} on packs {ids}, and the weights are"
                " lost since then; resume from the last checkpoint, which is from before it, with"
                " --bad_steps.skip true, with a lower --optimizer.lr, or without these packs"
            )
    return values[-1]


def _watchdog(job: Job) -> Watchdog:
    store = dist.PrefixStore(
        "watchdog", dist.group.WORLD.get_group_store().clone()
    )  # a connection of its own: the other may be waiting
    return Watchdog(
        store,
        job.groups.rank,
        job.groups.size,
        job.config.health,
        job.config.parallel.timeout_minutes,
    )


def _evaluated_weights(job: Job) -> contextlib.AbstractContextManager[None]:
    """Return the context in which the model has the weights that are evaluated."""
    if job.averages is not None and job.config.ema.evaluate:
        return job.averages.in_model(job.ddp_chunks)
    return contextlib.nullcontext()


def evaluate(
    job: Job, state: State, metrics: Metrics, progress: Callable[[], None] = lambda: None
) -> State:
    """Measure the validation loss and answer the tasks, if there are any. Collective.

    Args:
        job: the run.
        state: where it is.
        metrics: get the figures.
        progress: called at the start, and from time to time.

    Returns:
        The state, with the loss.
    """
    if job.valid is None and not job.tasks:
        return state
    figures: dict[str, float] = {}
    by_source: dict[str, dict[str, float]] = {}
    progress()
    with whole_weights(job.ddp_chunks), _evaluated_weights(job):
        if job.valid is not None:
            own_loss, named, sources = held_out_loss(job)
            loss = job.groups.from_writer(own_loss, job.backend.device)
            state = dataclasses.replace(state, valid_loss=loss)
            figures["valid_loss"] = loss
            figures |= {f"valid_{name}": value for name, value in named.items()}
            by_source["valid_loss"] = sources
            if job.config.eval.without_images:
                own_loss, _, _ = held_out_loss(job, without_images=True)
                blind = job.groups.from_writer(own_loss, job.backend.device)
                figures["valid_loss_without_images"] = blind
            if job.chunks[-1].objective.embeds_pairs:
                figures |= recalls(job)
        if job.tasks:
            result = answer_tasks(job, state.step, progress)
            for problem in result.problems:
                metrics.say(problem)
            figures |= result.figures
            state = dataclasses.replace(state, figures=tuple(result.figures.items()))
            by_source |= result.by_category
            metrics.show(state.step, result.answers)
    metrics.record(state.step, figures, by_source)
    return state
