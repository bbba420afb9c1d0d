"""Processes that encode records: each builds its encoder once, and results come back in the order
of the tasks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import forkserver
from typing import Literal, TypeVar

from megavlm.data.images.frame_sampling import FrameChoice
from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.encode import Encoder
from megavlm.data.packing.media import DeepImages
from megavlm.data.packing.windows import Windows
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer

Task = TypeVar("Task")
Result = TypeVar("Result")
Executor = Literal["processes", "ray"]

# Enough that no worker waits for the reader, and few enough that results do not pile up in memory
# when the writer is slower.
TASKS_PER_WORKER = 4
# What loading a tokenizer imports, torch among it: several seconds, and 300 MB, of each process.
OF_TOKENIZERS = ("transformers.models.auto.tokenization_auto", "transformers.utils.type_validators")


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """What a process builds its encoder from.

    Args:
        tokenizer: folder of the tokenizer, special tokens included.
        fingerprint: of that tokenizer; tells apart two that lie in the same folder one after the
            other.
        template: name of the conversation template.
        system_message: what a conversation without a system turn begins with; None: the template's
            own.
        features_per_tile: context tokens of one tile.
        tiling: how images become tiles.
        frames: how frames of videos are chosen.
        seed: fixes the frames that are chosen at random.
        capacity: most tokens of a sample.
        tile_cap: most tiles of a sample; None: any number.
        deep_images: what becomes of images of more than 8 bits a channel.
        windows: how long documents are cut.
        truncate: tokens that the end of a longer sample is cut off after; 0: nothing is cut off.
        qformer_tokenizer: folder of the tokenizer of instructions; empty: there are none.
        instruction_length: most tokens of an instruction.
        preferences: whether each record has two answers, of which one is preferred.
        alignment: each answer of a sample starts at a multiple of this many tokens in its pack.
    """

    tokenizer: str
    fingerprint: str
    template: str
    system_message: str | None
    features_per_tile: int
    tiling: Tiling
    frames: FrameChoice
    seed: int
    capacity: int
    tile_cap: int | None
    deep_images: DeepImages = "clip"
    windows: Windows = field(default_factory=Windows)
    truncate: int = 0
    qformer_tokenizer: str = ""
    instruction_length: int = 0
    preferences: bool = False
    alignment: int = 1


@lru_cache(maxsize=1)
def build_encoder(settings: EncoderSettings) -> Encoder:
    """Return the encoder of this process."""
    # The processes are the parallelism; threads of the tokenizer on top would only fight for cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    words = settings.qformer_tokenizer
    template = ChatTemplate(
        load_tokenizer(settings.tokenizer),
        settings.features_per_tile,
        name=settings.template,
        system_message=settings.system_message,
        pair_length=settings.truncate,
        qformer_tokenizer=load_tokenizer(words, "--qformer_tokenizer") if words else None,
        instruction_length=settings.instruction_length,
    )
    return Encoder(
        template,
        settings.tiling,
        settings.capacity,
        settings.tile_cap,
        frames=settings.frames,
        deep_images=settings.deep_images,
        windows=settings.windows,
        truncate=0 if template.format.is_of_pairs else settings.truncate,
        seed=settings.seed,
        preferences=settings.preferences,
        alignment=settings.alignment,
    )


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    executor: Executor = "processes",
) -> Iterator[Result]:
    """Yield ``function`` of each task, in order, computed by other processes, a bounded number of
    tasks ahead.

    Args:
        function: of a module that the processes can import.
        tasks: read as results are taken.
        workers: processes on this machine (0: this one); with Ray, tasks at a time (0: as many as
            the cluster has cores).
        executor: where the processes run.

    Raises:
        RuntimeError: a process ended on its own, as when the system ran out of memory.
    """
    if executor == "ray":
        yield from _ray_map(function, tasks, workers)
    elif workers == 0:
        yield from map(function, tasks)
    else:
        yield from _process_map(function, tasks, workers)


def _process_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Run ``ordered_map`` over processes of this machine."""
    # Forked, so that all share what they import, but from a process without threads: the
    # tokenizer's do not survive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, *OF_TOKENIZERS])
    # A scheduler sends SIGUSR1 to all processes, and it would end the server and its workers, which
    # keep the mask.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent) as pool:
        waiting = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) >= workers * TASKS_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"one of {workers} worker processes ended on its own, maybe for lack of memory; the"
                " same command resumes"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """End this worker when the process that has started it ends, even if it was killed. The pool's
    own workers would wait for tasks forever.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _ray_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Run ``ordered_map`` over a Ray cluster: the one that RAY_ADDRESS names, one that runs on this
    machine, or a new one of this machine.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError(f"--executor ray: {error}; pip install 'megavlm[ray]'") from None
    ray.init(ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
    remote = ray.remote(function)
    most = TASKS_PER_WORKER * (workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
    waiting = deque()
    try:
        for task in tasks:
            waiting.append(remote.remote(task))
            if len(waiting) >= most:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.OutOfMemoryError,
    ) as error:
        raise RuntimeError(
            f"a process of the Ray cluster ended on its own; the same command resumes: {error}"
        ) from None
    finally:
        for unfinished in waiting:
            ray.cancel(unfinished)
