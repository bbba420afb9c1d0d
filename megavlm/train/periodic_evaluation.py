"""What a run measures from time to time: validation loss, retrieval among pairs, answers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

from megavlm.checkpoint.train_state import State
from megavlm.train.evaluate import held_out_loss
from megavlm.train.job import Job
from megavlm.train.metrics import Metrics
from megavlm.train.optimizer import whole_weights
from megavlm.train.retrieval import recalls
from megavlm.train.tasks import answer_tasks


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
                metrics.log(problem)
            figures |= result.figures
            state = dataclasses.replace(state, figures=tuple(result.figures.items()))
            by_source |= result.by_category
            metrics.show(state.step, result.answers)
    metrics.record(state.step, figures, by_source)
    return state


def _evaluated_weights(job: Job) -> contextlib.AbstractContextManager[None]:
    """Return the context in which the model has the weights that are evaluated."""
    if job.averages is not None and job.config.ema.evaluate:
        return job.averages.in_model(job.ddp_chunks)
    return contextlib.nullcontext()
