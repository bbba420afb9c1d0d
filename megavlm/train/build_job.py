"""Building a job on this rank: model and optimizer as the start point has them, and the data around
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from megavlm.checkpoint.base_files import Base
from megavlm.checkpoint.lock import Lock
from megavlm.checkpoint.rank_errors import raised_on_all
from megavlm.checkpoint.train_state import History, State
from megavlm.config.schema import Config
from megavlm.data.loading.blend import Packs
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.order import Order
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel.backend import Backend
from megavlm.parallel.process_groups import Groups
from megavlm.planner.layout import Layout
from megavlm.train import (
    averages,
    base_weights,
    checkpoint,
    initial_weights,
    reference,
    resume,
    stage_moments,
)
from megavlm.train.build_model import build_model
from megavlm.train.job import Job
from megavlm.train.resume import Start
from megavlm.train.tasks import open_tasks


def build_job(
    config: Config,
    layout: Layout,
    groups: Groups,
    backend: Backend,
    packs: Packs,
    plan: Order,
    start: Start,
    lock: Lock | None,
) -> tuple[Job, State]:
    """Build the model of this rank, give it the weights, moments and averages of the start point,
    and put the data beside it. Collective.

    Args:
        config: the run.
        layout: of the pipeline.
        groups: process groups, and this rank's index in each.
        backend: where tensors live.
        packs: to train on.
        plan: their order.
        start: what the run starts from.
        lock: of the save folder, on the rank that holds it.

    Returns:
        The job, and the state of the run: that of a checkpoint which is resumed, else before the
            first step.

    Raises:
        DamagedError: the base weights of a checkpoint of trained parameters have changed.
        RankError: a rank cannot read its files; every rank raises it.
    """
    history = resume.history(config, start)
    fill, base = _prepare_fill(config, start)
    built = build_model(config, layout, groups, backend, fill, history)
    state = _first_state(config, packs, start, base, history)
    averaged = averages.build(config.ema, built.optimizer)
    if resume.resumes(config, start):
        checkpoint.load_optimizer(start, built.chunks, built.optimizer, config.fp8, averaged)
        state = _resumed(config, start.state, base)
    elif history:
        stage_moments.keep(start, built.chunks, built.optimizer)
        averages.begin_again(averaged)
    with raised_on_all():
        job = Job(
            **vars(built),
            config=config,
            backend=backend,
            groups=groups,
            train=packs,
            plan=plan,
            valid=_open_valid(config),
            tasks=open_tasks(config),
            lock=lock,
            averages=averaged,
            unused_weights={} if groups.rank else initial_weights.find_unused(config, start),
            usage=None if packs.has_images else initial_weights.find_usage(start),
        )
    return job, state


def _open_valid(config: Config) -> PackedDataset | None:
    """Open the validation packs, if there are any."""
    folder = config.data.valid
    if not folder:
        return None
    return PackedDataset(folder, reference=config.reference, with_shards=False)


def _prepare_fill(
    config: Config, start: Start
) -> tuple[Callable[[Sequence[VisionLanguageModel]], None], Base]:
    """Return what gives the chunks their weights, and what checkpoints note of the base weights.
    Collective.

    Raises:
        DamagedError: the base weights of a checkpoint of trained parameters have changed.
    """
    found = base_weights.find(config, start)
    if found is not None:
        base_weights.verify(config, start, found)
    fill = partial(initial_weights.fill, config, start, () if found is None else (found.start,))
    return fill, base_weights.note(config, start, found)


def _first_state(config: Config, packs: Packs, start: Start, base: Base, history: History) -> State:
    """Return the state before the first step."""
    return State(
        stage=config.stage,
        tokenizer=packs.manifest.tokenizer_fingerprint,
        packs=resume.pack_counts(config),
        indexes=resume.index_sums(config),
        history=history,
        base=base,
        reference=reference.weights_of(config, start) if config.reference else "",
    )


def _resumed(config: Config, state: State, base: Base) -> State:
    """Return the state of a checkpoint, with what is to be known of the files of this run."""
    indexes = resume.index_sums(config)
    unreadable = resume.unreadable_packs(state, indexes)
    return replace(state, base=base, indexes=indexes, unreadable_packs=unreadable)
