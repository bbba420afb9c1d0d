"""What ranks send that options change, as estimated."""

from __future__ import annotations

import dataclasses

import pytest

from megavlm.config.cli import parse
from megavlm.config.lora import Lora
from megavlm.config.models import MODELS
from megavlm.config.padding import padded_vocabulary
from megavlm.config.schema import Config
from megavlm.planner.communication import (
    communication_per_microbatch,
    communication_per_step,
)
from megavlm.planner.estimate import Hardware, Packs, estimate
from megavlm.planner.layout import make_layout
from megavlm.planner.parameters import parameters_on_rank
from megavlm.planner.partition import PackSize
from tests.planner.test_estimate import PACKS, SIZE, run


def test_muon_sends_matrices_to_one_rank_and_back() -> None:
    config = run("1")
    language = config.architecture.language.hidden_size
    vision = config.architecture.vision.hidden_size
    elements = 4 * vision * language + language**2
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=2)
    optimizer = dataclasses.replace(config.optimizer, kind="muon")
    plain = dataclasses.replace(config, parallel=parallel)
    muon = dataclasses.replace(plain, optimizer=optimizer)
    layout = make_layout(plain, SIZE)
    last = len(layout.chunks) - 1
    rank = next(rank for rank in range(last + 1) if layout.chunks[rank].has_connector)
    without, sent = (communication_per_step(one, layout, rank, 4) for one in (plain, muon))
    # Of 2 tensor-parallel and 4 data-parallel ranks each has an eighth of the momentum, keeps a
    # quarter of that, and gets as much of updates to send; float32.
    eighth = 4 * elements / 8
    assert sent.data - without.data == 2 * eighth * 3 / 4
    assert sent.tensor - without.tensor == eighth
    assert (sent.pipeline, sent.context) == (without.pipeline, without.context)


def test_gradients_and_weights_travel_once_a_step() -> None:
    """In bfloat16: gradients of 4 bytes are reduced, weights of 2 are gathered."""
    config = run("2")
    layout = make_layout(config, SIZE)
    trained = parameters_on_rank(config, layout.chunks[0]).trained
    sent = communication_per_step(config, layout, 0, 4)
    assert sent.data == 6 * trained * 3 / 4
    assert (sent.tensor, sent.pipeline, sent.context) == (0, 0, 0)


def test_experts_are_summed_over_the_ranks_that_hold_them() -> None:
    config = run("2", expert_model_parallel_size=2)
    config = dataclasses.replace(config, architecture=MODELS["internvl3_5-30b-a3b"])
    layout = make_layout(config, SIZE)
    held = parameters_on_rank(config, layout.chunks[0])
    # Of 4 ranks 2 hold the same experts.
    of_experts = held.trained_experts
    dense = held.trained - of_experts
    assert of_experts > dense
    assert communication_per_step(config, layout, 0, 4).data == 6 * (dense * 3 / 4 + of_experts / 2)


def test_the_copy_of_a_tied_head_is_summed_by_the_ranks_at_both_ends() -> None:
    config = run("2", pipeline_model_parallel_size=4)
    arch = config.architecture
    language = dataclasses.replace(arch.language, tied_head=True)
    config = dataclasses.replace(config, architecture=dataclasses.replace(arch, language=language))
    layout = make_layout(config, SIZE)
    sent = [communication_per_step(config, layout, rank, 1).pipeline for rank in range(4)]
    copy = 4 * padded_vocabulary(language.vocab_size) * language.hidden_size
    assert sent == [copy if rank in (layout.embedding_chunk, 3) else 0 for rank in range(4)]


def test_activations_are_of_the_bytes_of_the_dtype() -> None:
    """Two ranks in bfloat16 send forward and backward what each all-reduce has: 2 (k - 1) / k = 1
    times.
    """
    config = run("2", tensor_model_parallel_size=2)
    arch = config.architecture
    layout = make_layout(config, SIZE)
    sent = communication_per_microbatch(config, layout, 0, 16384, 50.5)  # 52 with padding
    language = 4 * arch.language.num_layers + 2  # and embedding and head
    elements = language * 16384 * arch.language.hidden_size
    vision = arch.vision
    elements += 4 * vision.num_layers * 52 * vision.tokens * vision.hidden_size
    # The features of the connector forward, four times a patch's width back.
    elements += 52 * arch.features_per_tile * (arch.language.hidden_size + 4 * vision.hidden_size)
    assert sent.tensor == 2 * elements


def test_frozen_layers_beside_adapters_do_not_gather_their_inputs_again() -> None:
    """Two ranks with sequence parallelism gather or scatter half of each of four tensors of a
    layer forward, and back; and so the numbers between the factors of adapters.
    """
    config = run("2", tensor_model_parallel_size=2, sequence_parallel=True)
    lora = dataclasses.replace(
        config,
        architecture=dataclasses.replace(config.architecture, lora=Lora(rank=8)),
        training=dataclasses.replace(config.training, trainable=("connector", "language.*.lora")),
    )
    layout = make_layout(lora, SIZE)
    sent = [
        communication_per_microbatch(one, layout, 0, 16384, 0.0).tensor for one in (config, lora)
    ]
    language = config.architecture.language
    # A's of queries, keys and values, one of the output, two of the gated MLP, one of its output.
    again = 2 * language.hidden_size
    adapters = 2 * 8 * (3 + 1 + 2 + 1)
    assert sent[0] - sent[1] == 2 * 16384 / 2 * language.num_layers * (again - adapters)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norms_of_heads_are_summed_by_the_ranks_that_share_the_heads(
    sequence_parallel: bool,
) -> None:
    """megatron-core sums their gradients with or without sequence parallelism, once."""
    config = run("2", tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    arch = config.architecture

    def sent(qk_norm: bool) -> float:
        language = dataclasses.replace(arch.language, qk_norm=qk_norm)
        model = dataclasses.replace(arch, language=language)
        normed = dataclasses.replace(config, architecture=model)
        return communication_per_step(normed, make_layout(normed, SIZE), 0, 1).tensor

    norms = 2 * arch.language.num_layers * arch.language.head_size
    assert sent(True) - sent(False) == 4 * norms


def test_the_head_sums_gradients_of_supervised_tokens_alone() -> None:
    config = run("2", tensor_model_parallel_size=2)
    layout = make_layout(config, SIZE)
    width = config.architecture.language.hidden_size

    def sent(one: Config, supervised: float | None = None) -> float:
        return communication_per_microbatch(one, layout, 0, 16384, 50.0, supervised).tensor

    assert sent(config) - sent(config, 4096.0) == 2 * (16384 - 4096) * width
    parallel = dataclasses.replace(config.parallel, sequence_parallel=True)
    scattered = dataclasses.replace(config, parallel=parallel)
    assert sent(scattered) == sent(scattered, 4096.0), "all tokens are gathered before"


_PAIRS = Packs(size=PackSize(tokens=4000.0, squared_lengths=8e4, tiles=100.0), capacity=4096)
_QFORMER = "blip2 --stage 1 --training.trainable vision,connector,objective"


@pytest.mark.parametrize(
    ("words", "is_twice"),
    [
        ("clip --stage 1", True),
        (_QFORMER, True),
        (f"{_QFORMER} --architecture.image_text.pool_packs 1", False),
    ],
)
def test_packs_that_are_contrasted_together_run_forward_twice(words: str, is_twice: bool) -> None:
    config = parse(["--recipe", *words.split(), "--training.global_batch_size", "1"])
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=2)
    config = dataclasses.replace(config, parallel=parallel)
    batch = dataclasses.replace(config.training, global_batch_size=2)
    runs = (config, dataclasses.replace(config, training=batch))
    one, two = (estimate(run, 2, _PAIRS, Hardware()) for run in runs)
    frozen = dataclasses.replace(config, training=dataclasses.replace(batch, trainable=()))
    layout = make_layout(config, _PAIRS.size)
    tiles = _PAIRS.size.tiles
    forward = communication_per_microbatch(frozen, layout, 0, _PAIRS.capacity, tiles).tensor
    of_step = communication_per_step(config, layout, 0, 1, tiles).tensor
    more = two.communication.tensor - (2 * one.communication.tensor - of_step)
    assert more == (2 * forward if is_twice else 0)
    assert forward > 0 and of_step > 0
    longer = two.chunk_ms[0] / one.chunk_ms[0]
    assert 1.3 < longer < 1.4 if is_twice else longer == 1


@pytest.mark.parametrize(
    ("precision", "overlap", "shares"),
    [
        ("bfloat16", dict(overlap_grad_reduce=False), 4 / 6),
        ("bfloat16", dict(overlap_param_gather=False), 2 / 6),
        ("float32", dict(overlap_param_gather=False), 4 / 8),
    ],
)
def test_what_is_not_overlapped_takes_its_time(
    precision: str, overlap: dict[str, bool], shares: float
) -> None:
    """Over a network so slow, what is overlapped is hidden only as long as a pass takes."""
    config = run("2", **overlap)
    training = dataclasses.replace(config.training, precision=precision)
    config = dataclasses.replace(config, training=training)
    found = estimate(config, 16, PACKS, Hardware())
    sent_ms = found.communication.data / 50e9 * 1e3
    assert found.exposed_ms == pytest.approx(sent_ms * shares)
