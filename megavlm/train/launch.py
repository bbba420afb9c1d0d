"""From a configuration to a trained model: check, build, load, train, export."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megavlm import job_checks
from megavlm.checkpoint import directory as folder
from megavlm.checkpoint.base_files import Base
from megavlm.checkpoint.lock import Lock, held
from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.checkpoint.train_state import History, State
from megavlm.config import torchrun
from megavlm.config.checks.resume import with_origin
from megavlm.config.checks.rules import check
from megavlm.config.checks.saving import EXPORTED, exported_step
from megavlm.config.recipes import recipe
from megavlm.config.schema import Config
from megavlm.convert.hf import convert
from megavlm.convert.hf.hub_formats import HUB_FORMATS
from megavlm.convert.weights.families import family_of
from megavlm.data.loading.blend import BlendedDataset, BlendPlan, open_blend
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.order import Order
from megavlm.health import out_of_memory, speed_check
from megavlm.health.preflight import DisagreementError, RankView, check_consistency, snapshot
from megavlm.io import atomic
from megavlm.model import precision
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel import backend, process_groups
from megavlm.planner.layout import Layout, make_layout
from megavlm.planner.partition import PackSize
from megavlm.train import averages, below, checkpoint, origin, stage_moments
from megavlm.train import resume as source
from megavlm.train import start as start_point
from megavlm.train.bad_steps import StepError
from megavlm.train.build import build
from megavlm.train.job import Job
from megavlm.train.loop import evaluate, run
from megavlm.train.master_weights import MismatchError
from megavlm.train.metrics import Metrics
from megavlm.train.origin import Start
from megavlm.train.saver import SaveError
from megavlm.train.stop_signal import StopRequest, ignore_save_signal
from megavlm.train.summary import log_run_summary
from megavlm.train.tasks import open_tasks, task_facts


def launch(
    config: Config,
    stop: StopRequest | None = None,
    *,
    ahead: Callable[[], None] = lambda: None,
    attempt: int = 0,
    can_go_back: bool = False,
) -> State:
    """Run a training job, and return where it ended; what is wrong with it, on any rank, ends every
    process with status 2 before any process group exists.

    Args:
        config: the run.
        stop: what people ask of the whole command; none: of this run alone.
        ahead: checks what is to run after it, and raises ValueError if that cannot run; what it
            finds on any rank counts as wrong with this run.
        attempt: how often this command has run the job before.
        can_go_back: raise DamagedError, on every rank, instead of ending the process.
    """
    if stop is None:
        ignore_save_signal()
    backend.set_environment(config.training.deterministic)
    run_name = f"{config.stage}/{attempt}" if attempt else config.stage
    store = backend.meet(config.parallel.timeout_minutes, run_name)
    with contextlib.ExitStack() as stack:
        start, lock = _agree_to_start(config, ahead, store, stack)
        if isinstance(start, Checkpoint) and source.is_own(config, start):
            config = with_origin(config, start.config)
        device_backend = backend.start(
            config.parallel.timeout_minutes,
            deterministic=config.training.deterministic,
            store=store,
        )
        out_of_memory.record_memory(config)
        try:
            return train(config, device_backend, start, lock, stop)
        except (source.DamagedError, MismatchError, SaveError, StepError) as error:
            if can_go_back and isinstance(error, source.DamagedError):
                raise
            # Every rank knows of it, so none waits for another.
            torchrun.refuse(f"error: {error}", is_told=torchrun.rank() == 0)
            raise SystemExit(2) from None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            _tell_of_full_memory(config, error)
            raise SystemExit(1) from None
        finally:
            process_groups.destroy()
            backend.stop()


def _tell_of_full_memory(config: Config, error: BaseException) -> None:
    """Say what would save memory. The other ranks end with this one."""
    told = [out_of_memory.advice(config, torchrun.world_size(), error)]
    if config.profile.memory_snapshot:
        told.append(out_of_memory.write_snapshot(config, torchrun.rank()))
    torchrun.refuse("\n".join(told))


def _agree_to_start(
    config: Config, ahead: Callable[[], None], store: dist.Store, stack: contextlib.ExitStack
) -> tuple[Start, Lock | None]:
    """Find out what to start from, and that all ranks are about to run the same.

    Args:
        config: the run.
        ahead: see ``launch``.
        store: shared by the ranks.
        stack: holds the lock of the save folder for as long as it lasts.

    Returns:
        What to start from, and the lock, which the first rank has.
    """
    start = None
    lock = None
    try:
        ahead()
        if config.checkpoint.save and torchrun.rank() == 0:
            lock = _lock(Path(config.checkpoint.save), stack)
        start = inspect(config, torchrun.world_size())
        facts = snapshot(config, start=start.folder if isinstance(start, Checkpoint) else start)
        view = RankView(facts=facts | task_facts(config))
    except (ValueError, OSError) as error:
        view = RankView(problem=str(error))
    try:
        check_consistency(
            store,
            torchrun.rank(),
            torchrun.world_size(),
            view,
            timedelta(minutes=config.parallel.timeout_minutes),
            _tell,
        )
    except DisagreementError as error:
        torchrun.refuse(f"error: {error}", is_told=False)  # rank 0 has told it
        raise SystemExit(2) from None
    return start, lock


def _lock(save: Path, stack: contextlib.ExitStack) -> Lock:
    """Hold the lock of the save folder.

    Raises:
        ValueError: another run holds it, or nothing can be written there.
    """
    try:
        return stack.enter_context(held(save))
    except OSError as error:
        raise ValueError(
            f"--checkpoint.save {save}: nothing can be written there ({error})"
        ) from error


def _tell(wrong: str) -> None:
    torchrun.refuse(f"error: {wrong}")


def inspect(config: Config, world_size: int) -> Start:
    """Check the whole job without building anything.

    Returns:
        What to start from: a checkpoint, a Hugging Face folder, parts, or nothing.

    Raises:
        ConfigError: everything that is wrong with the configuration, in one message.
        ValueError: a dataset or checkpoint that cannot be used.
    """
    inspect_job(config, world_size)
    return start_point.find(config)


def inspect_job(config: Config, world_size: int) -> None:
    """Check all of a job but what it starts from.

    Raises:
        ConfigError: everything that is wrong with the configuration, in one message.
        ValueError: a dataset that cannot be used.
    """
    check(
        config,
        world_size,
        facts=job_checks.dataset_facts(config),
        device=precision.device_capabilities(),
    )
    language = config.architecture.language
    if language.exists and not language.is_encoder:
        family_of(language)  # else the trained model could not be exported
    _check_tokenizer(config)
    if torchrun.rank() == 0:  # it reads the whole index, and all ranks hear of what it finds
        _check_lengths(config)
    open_tasks(config)


def train(
    config: Config,
    device_backend: backend.Backend,
    start: Start,
    lock: Lock | None = None,
    stop: StopRequest | None = None,
) -> State:
    """Build the model and everything around it, train, and export. Collective.

    Args:
        config: the run, checked.
        device_backend: where tensors live.
        start: start point returned by ``inspect``.
        lock: of the save folder, on the rank that holds it.
        stop: what people ask of the whole command; none: of this run alone.

    Raises:
        DamagedError: the checkpoint to start from is damaged, on every rank.
        SaveError: the last checkpoint could not be saved, on every rank.
        StepError: a step has no loss or no finite gradient, on every rank.
    """
    packs, plan = _open_training_set(config)
    layout = make_layout(config, PackSize.mean(packs.some_records()))
    groups = process_groups.create(config.parallel, config.training.seed, layout.embedding_chunk)
    if isinstance(start, Checkpoint):
        start = source.whole(config, start)
    with Metrics(config, groups.is_writer, source.first_step(config, start)) as metrics:
        if config.health.speed_check and groups.size > 1:
            _check_speed(config, groups, device_backend, metrics)
        if config.checkpoint.save:
            _clean(Path(config.checkpoint.save), groups, metrics)
        history = source.history(config, start)
        fill, base = _filling(config, start)
        built = build(config, layout, groups, device_backend, fill, history)
        state = _first_state(config, packs, base, history)
        averaged = averages.build(config.ema, built.optimizer)
        if isinstance(start, Checkpoint) and source.resumes(config, start):
            checkpoint.load_optimizer(start, built.chunks, built.optimizer, config.fp8, averaged)
            state = replace(start.state, base=base)
        elif history:
            stage_moments.keep(start, built.chunks, built.optimizer)
            averages.begin_again(averaged)
        log_run_summary(config, groups, built.trained, start, state, metrics)
        _say_plans(config, layout, plan, metrics)
        job = Job(
            **vars(built),
            config=config,
            backend=device_backend,
            groups=groups,
            train=packs,
            plan=plan,
            valid=PackedDataset(config.data.valid) if config.data.valid else None,
            tasks=open_tasks(config),
            lock=lock,
            averages=averaged,
            unused_weights=origin.unused(config, start) if groups.rank == 0 else {},
        )
        state = _run(job, state, start, metrics, stop)
    return state


def _filling(
    config: Config, start: Start
) -> tuple[Callable[[Sequence[VisionLanguageModel]], None], Base]:
    """Return what gives the chunks their weights, and what checkpoints note of the weights below.
    Collective.

    Raises:
        DamagedError: what lies below a checkpoint of trained parameters has changed.
    """
    under = below.find(config, start)
    if under is not None:
        below.verify(config, start, under)
    fill = partial(origin.fill, config, start, () if under is None else (under.start,))
    return fill, below.note(config, start, under)


def _run(job: Job, state: State, start: Start, metrics: Metrics, stop: StopRequest | None) -> State:
    """Do what the job is for: measure, or train and export."""
    if job.config.eval.only:
        return evaluate(job, state, metrics)
    state = run(job, state, metrics, stop)
    _export(job.config, state, start, job.groups)
    return state


def _first_state(
    config: Config, packs: PackedDataset | BlendedDataset, base: Base, history: History
) -> State:
    """Return the state before the first step."""
    return State(
        stage=config.stage,
        tokenizer=packs.manifest.tokenizer_fingerprint,
        packs=source.pack_counts(config),
        history=history,
        base=base,
    )


def _say_plans(config: Config, layout: Layout, plan: Order, metrics: Metrics) -> None:
    """Say how the model is cut for the pipeline, and how several datasets are mixed."""
    if config.parallel.pipeline_model_parallel_size > 1:
        metrics.say(f"pipeline: {layout}")
    if isinstance(plan, BlendPlan):
        metrics.say(f"data: of {plan.block:,} packs {plan.describe(config.data.train_folders)}")


def _export(config: Config, state: State, start: Start, groups: process_groups.Groups) -> None:
    """Export the model of a run that is done, if it is asked for and not done already."""
    files = config.checkpoint
    if not files.export_hf or state.step < config.training.steps or groups.rank:
        return
    if exported_step(files, averages=config.ema.export) == config.training.steps:
        print(f"{files.export_hf}: holds the model of this run already", flush=True)
        return
    # A run with nothing to do has saved nothing. Steps of another stage do not count.
    has_saved = source.first_step(config, start) < state.step
    folder = files.save if has_saved else start.folder
    convert.export(
        folder, files.export_hf, averages=config.ema.export, flag="--checkpoint.export_hf"
    )
    # So that the same command again is no mistake.
    noted = {
        "folder": str(Path(files.export_hf).resolve()),
        "step": config.training.steps,
        "averages": config.ema.export,
    }
    atomic.write_text(Path(files.save) / EXPORTED, json.dumps(noted) + "\n")


def _check_tokenizer(config: Config) -> None:
    """Raise ValueError for packs with a tokenizer that the format of the export cannot have."""
    row = HUB_FORMATS[recipe(config.recipe).format_for(config.architecture.objective)]
    tokenizer = Path(config.data.train_folders[0]) / "tokenizer"
    if config.checkpoint.export_hf and row.check_tokenizer and tokenizer.is_dir():
        row.check_tokenizer(tokenizer)


def _check_lengths(config: Config) -> None:
    """Raise ValueError for packs of samples that are longer than the model reads."""
    bound = config.architecture.needs.longest_sample(config.architecture)
    if bound is None:
        return
    (option, most) = bound
    for packs in (*config.data.train_folders, *filter(None, [config.data.valid])):
        longest = int(PackedDataset(packs).index["longest"].max())
        if longest > most:
            raise ValueError(
                f"{packs}: holds a sample of {longest} tokens, and {option} is {most}: each token"
                " needs a position"
            )


def _open_training_set(config: Config) -> tuple[PackedDataset | BlendedDataset, Order]:
    """Open the packs of the run, and fix their order."""
    data = config.data
    return open_blend(
        data.train_folders,
        data.weights,
        seed=config.training.seed,
        shuffle=data.shuffle,
        group=config.group,
        curriculum=data.curriculum,
        shared_batch=config.training.global_batch_size if data.batch_shares else 0,
        augment=data.augment,
        next_image=data.next_image,
        sampling=data.sampling,
    )


def _clean(save: Path, groups: process_groups.Groups, metrics: Metrics) -> None:
    """Remove what a killed run left in the save folder. Collective."""
    left: list = [folder.clean(save) if groups.rank == 0 and save.exists() else []]
    dist.broadcast_object_list(left)
    if left[0]:
        metrics.say(f"removed from {save} what a killed run left: {', '.join(left[0])}")


def _check_speed(
    config: Config, groups: process_groups.Groups, device_backend: backend.Backend, metrics: Metrics
) -> None:
    """Say how fast ranks and groups are, and who is slow. Collective."""
    speeds = speed_check.measure(groups, device_backend)
    metrics.say(speed_check.summary(speeds))
    for finding in speed_check.findings(speeds, config.health, on_gpu=device_backend.asynchronous):
        metrics.say(f"warning: {finding}")
