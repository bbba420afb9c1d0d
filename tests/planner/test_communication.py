"""What ranks send that options change, as estimated."""

from __future__ import annotations

import dataclasses

from megavlm.config.models import MODELS
from megavlm.config.padding import padded_vocabulary
from megavlm.planner.communication import (
    communication_per_microbatch,
    communication_per_step,
)
from megavlm.planner.layout import make_layout
from megavlm.planner.parameters import parameters_on_rank
from tests.planner.test_estimate import SIZE, run


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
