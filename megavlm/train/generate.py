"""Answers of the model that is trained, on any layout.

The packs of questions run through the pipeline once, as in training, and give the first token of
each answer. Layers keep the keys and values of the questions, so that each further pass runs no
more than the newest token of each answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.config.fp8 import fp8_multiple
from megavlm.config.schema import Config
from megavlm.data.loading.batch import Batch
from megavlm.data.loading.dataset import sample_positions
from megavlm.data.loading.media import images_read
from megavlm.evaluate.packs import TaskPacks
from megavlm.model.cross_attention import GatedLayer
from megavlm.model.greedy import likeliest_tokens
from megavlm.model.key_value_cache import Decode, KeyValueCache, Prefill, slots_for
from megavlm.model.precision import dtype_of
from megavlm.train.evaluate import blank_packs, own_positions, run_forward, task_batches
from megavlm.train.job import Job
from megavlm.train.pipeline import run_pipeline
from megavlm.train.source_losses import SourceLosses


@torch.no_grad()
def generate(
    job: Job, task: TaskPacks, max_new_tokens: int, progress: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """Return the tokens of the greedy answer to each question, with the one that ends it.
    Collective; the chunks' parameters are whole.

    Args:
        job: the run; its chunks are in evaluation mode.
        task: questions without choices.
        max_new_tokens: longest answer.
        progress: called before each pass.
    """
    answers: list[list[int]] = [[] for _ in task.requests]
    arch = job.config.architecture
    has_axes = bool(arch.language.rotary_sections)
    rate = arch.vision.tokens_per_second
    window = job.groups.data_size * _packs_at_once(job, task, max_new_tokens)
    for start in range(0, len(task.order), window):
        packs = range(start, min(start + window, len(task.order)))
        own = [packs[index] for index in own_positions(job, len(packs))]
        lengths = {one: len(task.requests[one].tokens) for pack in own for one in task.order[pack]}
        shifts = {one: task.rotary_shift(one, rate) for one in lengths} if has_axes else {}
        cache = KeyValueCache(lengths, max_new_tokens, job.backend.device, shifts)
        unfinished = [question for pack in packs for question in task.order[pack]]
        progress()
        new = _first_tokens(job, task, own, cache, -(-len(packs) // job.groups.data_size))
        while True:
            for question in unfinished:
                answers[question].append(new[question])
            unfinished = [
                question
                for question in unfinished
                if len(answers[question]) < max_new_tokens and not task.is_over(answers[question])
            ]
            if not unfinished:
                break
            cache.keep(set(unfinished))
            progress()
            new = _next_tokens(job, cache, answers)
    return answers


def _packs_at_once(job: Job, task: TaskPacks, max_new_tokens: int) -> int:
    """Return how many packs each data-parallel rank answers at once: as many as have keys and
    values of at most ``--eval.cache_gib``. Collective.
    """
    architecture = job.config.architecture
    language = architecture.language
    counts = (language.num_query_groups, language.num_attention_heads)
    key_heads, query_heads = (-(-count // job.groups.tensor_size) for count in counts)
    parts = [chunk.language for chunk in job.chunks if chunk.language is not None]
    layers = [layer for part in parts for layer in part.decoder.layers]
    crosses = sum(isinstance(layer, GatedLayer) for layer in layers)
    keys = [len(layers) * key_heads, crosses * query_heads * architecture.features_per_tile]
    most_keys = torch.tensor(keys, device=job.backend.device)
    dist.all_reduce(most_keys, op=dist.ReduceOp.MAX)  # pipeline stages have more layers or fewer
    of_token, of_image = most_keys.tolist()
    largest_pack = max(
        sum(
            slots_for(len(task.requests[one].tokens) + max_new_tokens) * of_token + of_image
            for one in pack
        )
        for pack in task.order
    )
    pair_bytes = 2 * language.head_size * dtype_of(job.config).itemsize
    return max(int(job.config.eval.cache_gib * 2**30) // (largest_pack * pair_bytes), 1)


def _tiles_read(task: TaskPacks, number: int) -> dict[int, int]:
    """Return which tile of a pack the answer to each question reads by cross-attention."""
    samples = task.packs.reader.samples(number, load=False)
    lengths = np.array([sample.length for sample in samples])
    tokens = np.concatenate([sample.tokens for sample in samples])
    manifest = task.packs.manifest
    read = images_read(tokens, lengths, manifest.context_token_id, manifest.end_token_id)
    starts = np.cumsum(lengths) - lengths
    found = {
        question: int(read[start + len(task.requests[question].tokens)])
        for question, start in zip(task.order[number], starts, strict=True)
    }
    return {question: tile for question, tile in found.items() if tile >= 0}


def _prefill(job: Job, task: TaskPacks, number: int, batch: Batch, cache: KeyValueCache) -> Batch:
    """Let a pack ask for the first tokens of its questions' answers, and keep keys and values.

    Args:
        job: the run.
        task: the questions.
        number: of the pack.
        batch: the pack, as for training.
        cache: takes the keys and values.
    """
    manifest = task.packs.manifest
    questions = task.order[number]
    requests = [task.requests[question] for question in questions]
    lengths = np.array([len(one.tokens) + one.room for one in requests])
    _, ends = sample_positions(lengths, manifest.alignment, manifest.capacity)
    starts = ends[: len(requests)].tolist()
    here = np.full(manifest.capacity, -1)  # place of each token among this rank's
    own = job.groups.rank_slice.tokens(ends)
    here[own] = np.arange(len(own))
    last = {
        question: int(here[start + len(one.tokens) - 1])
        for question, start, one in zip(questions, starts, requests, strict=True)
    }
    found = {question: position for question, position in last.items() if position >= 0}
    crosses = job.config.architecture.cross_attention.every
    return dataclasses.replace(
        batch,
        loss_positions=torch.tensor(list(found.values()) or [0]),
        cached=Prefill(
            cache,
            starts=dict(zip(questions, starts, strict=True)),
            ends=ends,
            tiles=_tiles_read(task, number) if crosses else {},
            questions=list(found),
        ),
    )


def _first_tokens(
    job: Job, task: TaskPacks, packs: Sequence[int], cache: KeyValueCache, most: int
) -> list[int]:
    """Return the first token of the answer to each question, on every rank; -1 for those of other
    packs. Collective.

    Args:
        job: the run.
        task: the questions.
        packs: numbers of this rank's.
        cache: takes the keys and values of their questions.
        most: packs of the rank that has most.
    """
    loaded = task_batches(job, task.packs, packs)
    blank = blank_packs(job, len(packs), most)

    def passes() -> Iterator[Batch]:
        for number, batch in zip(packs, loaded, strict=True):
            again = _prefill(job, task, number, batch, cache)
            yield again
        for _ in range(blank):
            yield again

    with contextlib.closing(loaded):
        return _tokens_of(job, len(task.requests), passes(), len(packs) + blank)


def _next_tokens(job: Job, cache: KeyValueCache, answers: Sequence[Sequence[int]]) -> list[int]:
    """Return the next token of the answer to each question that the cache has, as
    ``_first_tokens``. Collective.

    Args:
        job: the run.
        cache: of this rank.
        answers: so far, of each question.
    """
    caches = [cache] if cache.questions else []
    blank = blank_packs(job, len(caches), 1)
    caches += [KeyValueCache({}, 0, job.backend.device)] * blank
    passes = [Decode(one, _row_multiple(job.config)) for one in caches]
    batches = (_new_tokens(job, one, answers) for one in passes)
    return _tokens_of(job, len(answers), batches, len(passes))


def _row_multiple(config: Config) -> int:
    """Return what the tokens of a pass must be a multiple of on each rank."""
    parallel = config.parallel
    rows = fp8_multiple(config.fp8.language, parallel.sequence_parallel)
    if parallel.sequence_parallel:
        rows *= parallel.tensor_model_parallel_size
    # Context-parallel ranks take a sample's front and back.
    return rows * (2 if parallel.context_parallel_size > 1 else 1)


def _new_tokens(job: Job, new: Decode, answers: Sequence[Sequence[int]]) -> Batch:
    """Make the batch of the newest token of each question, padded with tokens of no question."""
    rows = len(new.positions)
    count = len(new.questions)
    tokens = torch.zeros(rows, dtype=torch.int64)
    tokens[:count] = torch.tensor([answers[one][-1] for one in new.questions], dtype=torch.int64)
    nothing = torch.zeros(0, dtype=torch.int64)
    side = job.config.architecture.vision.image_size
    language = job.config.architecture.language
    of_ranks = rows * job.groups.context_size  # to megatron-core, these ranks share one sample
    return Batch(
        tokens=tokens,
        labels=torch.zeros(rows, dtype=torch.int64),
        loss_weights=torch.zeros(rows),
        loss_positions=torch.arange(max(count, 1)),
        sources=torch.zeros(rows, dtype=torch.int32),
        is_padding=torch.arange(rows) >= count,
        sample_ends=torch.tensor([0, of_ranks], dtype=torch.int32),
        sample_lengths=(of_ranks,),
        longest_sample=new.longest,
        prefixes=None,
        tiles=torch.zeros(0, 3, side, side, dtype=torch.uint8),
        feature_positions=nothing,
        feature_numbers=nothing,
        newline_positions=nothing,
        num_features=0,
        drop_path_draws=torch.zeros(0, 0),
        weight_sum=0.0,
        pack_id=-1,
        rotary_positions=new.rotary_positions if language.rotary_sections else None,
        positions=new.positions,
        cached=new,
    )


def _tokens_of(job: Job, questions: int, batches: Iterator[Batch], count: int) -> list[int]:
    """Run passes, and return the likeliest next token of each question on every rank; -1 for those
    that no rank has run. Collective.

    Args:
        job: the run.
        questions: of the task.
        batches: of this rank.
        count: their number.
    """
    found = torch.full((questions,), -1, dtype=torch.int64, device=job.backend.device)
    if count:
        run_pipeline(
            job.ddp_chunks,
            batches,
            count,
            _keep(job, found),
            job.backend,
            forward_only=True,
            with_loss=False,
        )
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def _keep(job: Job, found: Tensor) -> Callable[[Batch, Tensor], Tensor]:
    """Make what the last chunk calls with the logits of each pass."""
    last = job.chunks[-1]

    def keep(batch: Batch, logits: Tensor) -> Tensor:
        tokens = likeliest_tokens(logits, last.language.real_rows, job.groups.collection.tp)
        own = batch.cached.questions
        # There may be one more, of no question.
        found[torch.tensor(own, dtype=torch.int64, device=found.device)] = tokens[: len(own)]
        return logits.new_zeros(())

    return keep


@torch.no_grad()
def choose(job: Job, task: TaskPacks) -> list[int]:
    """Return the likeliest choice of each question, by the sum of its tokens' log-probabilities;
    known to ranks with the last chunk. Collective; the chunks' parameters are whole.

    Args:
        job: the run; its chunks are in evaluation mode.
        task: questions with choices.
    """
    losses = SourceLosses([str(index) for index in range(len(task.requests))], job.backend.device)
    count = len(task.packs)
    batches = task_batches(job, task.packs, own_positions(job, count))
    with contextlib.closing(batches):
        run_forward(job, batches, count, 1.0, (losses,))
    means = losses.report(job.groups)["loss"]
    best: dict[int, tuple[float, int]] = {}
    first: dict[int, int] = {}
    for index, (one, owner) in enumerate(zip(task.requests, task.owners, strict=True)):
        first.setdefault(owner, index)
        # SourceLosses has nothing on ranks without the last chunk, and of what is not finite.
        loss = means.get(str(index), math.inf) * int(one.supervised[1:].sum())
        if owner not in best or loss < best[owner][0]:
            best[owner] = (loss, index - first[owner])
    return [best[owner][1] for owner in sorted(best)]
