"""Memory of a rank that options change, as estimated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.cli import parse
from megavlm.config.lora import Lora
from megavlm.config.loss import Loss
from megavlm.config.models import MODELS
from megavlm.config.schema import Ema, Fp8
from megavlm.model.nf4 import Nf4Weight
from megavlm.planner.activations import ActivationMemory, activation_memory
from megavlm.planner.flops import pieces
from megavlm.planner.layout import make_layout
from megavlm.planner.rank_load import RankLoad
from tests.convert.models import EXPERTS
from tests.planner.test_estimate import SIZE, needed, run
from tests.ranks.runs import TINY, config_for


def test_averages_take_four_bytes_of_each_trained_parameter_on_all_ranks_together() -> None:
    plain = needed(run("1"))
    averaged = needed(dataclasses.replace(run("1"), ema=Ema(decay=0.9)))
    assert averaged.optimizer - plain.optimizer == plain.gradients / 8


def test_weights_in_4_bits_take_a_code_and_a_share_of_a_scale() -> None:
    config = run("2")
    lora = Lora(rank=4, nf4=("language",))
    plain, small = (
        needed(
            dataclasses.replace(
                config,
                architecture=dataclasses.replace(config.architecture, lora=one),
                training=dataclasses.replace(
                    config.training, trainable=("connector", "language.*.lora")
                ),
            )
        )
        for one in (dataclasses.replace(lora, nf4=()), lora)
    )
    linears = sum(
        piece.elements for piece in pieces(config.architecture) if lora.quantises(piece.key)
    )
    assert plain.weights - small.weights == pytest.approx((2 - 0.5625) * linears)
    stored = Nf4Weight(torch.zeros(8, 2048))
    assert (stored.codes.nbytes + stored.scales.nbytes) / (8 * 2048) == 0.5625


def test_norms_behind_branches_and_a_cap_of_logits_keep_what_their_slopes_need() -> None:
    plain = run("2")
    load = RankLoad(tokens=1000.0, tiles=0.0)
    last = make_layout(plain, SIZE).chunks[-1]
    language = plain.architecture.language

    def kept(recompute: str, block: int = 0, **settings: Any) -> ActivationMemory:
        architecture = dataclasses.replace(
            plain.architecture, language=dataclasses.replace(language, **settings)
        )
        parallel = dataclasses.replace(plain.parallel, recompute=recompute)
        loss = Loss(vocabulary_block=block)
        config = dataclasses.replace(plain, architecture=architecture, parallel=parallel, loss=loss)
        return activation_memory(config, last, load)

    # In 16 bits: the inputs of both norms, or of the one that is not computed again.
    for recompute, norms in (("none", 2), ("selective", 1)):
        more = kept(recompute, sandwich_norm=True).per_microbatch - kept(recompute).per_microbatch
        layers = len(last.language_layers)
        assert more == norms * layers * 2 * 1000 * language.hidden_size
    capped = dict(final_softcap=30.0)
    # In 16 bits of all logits, and in float32 of a block.
    more = kept("none", **capped).once - kept("none").once
    assert more == 2 * 1000 * language.vocab_size
    assert kept("none", 512, **capped).once - kept("none", 512).once == 4 * 1000 * 512


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_dropout_keeps_nothing_in_layers_without_a_backward_pass(recompute: str) -> None:
    config = run(pipeline_model_parallel_size=4, recompute=recompute)
    first = make_layout(config, SIZE).chunks[0]
    assert not first.language_layers
    kept = []
    for dropout in (0.0, 0.1):
        lora = Lora(rank=8, targets=("vision",), dropout=dropout)
        of_language = dataclasses.replace(
            config,
            architecture=dataclasses.replace(config.architecture, lora=lora),
            training=dataclasses.replace(config.training, trainable=("language",)),
        )
        kept.append(activation_memory(of_language, first, RankLoad(tokens=1000.0, tiles=7.0)))
    assert kept[0].per_microbatch == kept[1].per_microbatch
    assert kept[0].once < kept[1].once, "what is left of attention's output while a layer runs"


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_dora_keeps_the_output_of_each_layer_with_an_adapter(sequence_parallel: bool) -> None:
    config = run(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    [chunk] = make_layout(config, SIZE).chunks
    language = config.architecture.language
    found = []
    for is_dora in (False, True):
        lora = Lora(rank=8, targets=("language.*.self_attention", "vision.*.linear_fc1"))
        adapted = dataclasses.replace(
            config,
            architecture=dataclasses.replace(
                config.architecture, lora=dataclasses.replace(lora, dora=is_dora)
            ),
            training=dataclasses.replace(
                config.training, trainable=("connector", "vision.*.lora", "language.*.lora")
            ),
        )
        load = RankLoad(tokens=1000.0, tiles=7.0)
        found.append(activation_memory(adapted, chunk, load).per_microbatch)
    heads = language.num_attention_heads + 2 * language.num_query_groups
    width = language.hidden_size / (2 if sequence_parallel else 1)
    of_token = heads * language.head_size / 2 + width
    vision = config.architecture.vision
    of_tile = vision.tokens * vision.ffn_hidden_size / 2
    kept = 1000 * of_token * language.num_layers + 7 * of_tile * vision.num_layers
    assert found[1] - found[0] == pytest.approx(2 * kept)


@pytest.mark.parametrize("shared", [0, 1536])
def test_fp8_keeps_inputs_of_experts_in_8_bits_and_copies_of_their_weights(shared: int) -> None:
    config = run()
    model = MODELS["internvl3_5-30b-a3b"]
    beside = dict(shared_expert_ffn_hidden_size=shared, shared_expert_gate=bool(shared))
    language = dataclasses.replace(model.language, **beside)
    model = dataclasses.replace(model, language=language)
    config = dataclasses.replace(config, architecture=model)
    [chunk] = make_layout(config, SIZE).chunks
    in_8_bits = dataclasses.replace(config, fp8=Fp8(language="tensorwise"))
    load = RankLoad(tokens=1000.0, tiles=7.0)
    plain, small = (activation_memory(one, chunk, load) for one in (config, in_8_bits))
    # Half of two bytes: inputs of queries, keys and values, and of eight experts, which read copies
    # of the token, and what the second layer of a shared one reads; the output of attention is kept
    # twice.
    of_token = language.hidden_size - language.num_attention_heads * language.head_size
    of_token += 8 * (language.hidden_size + language.expert_ffn_hidden_size) + shared
    saved = plain.per_microbatch - small.per_microbatch
    assert saved == pytest.approx(1000 * 48 * of_token)
    copied = needed(in_8_bits).weights - needed(config).weights
    layers = [piece for piece in pieces(config.architecture) if piece.part == "language"]
    linears = [piece.elements for piece in layers if ".linear_" in piece.key and piece.is_matrix]
    assert copied == 2 * sum(linears)


@pytest.mark.parametrize("rank", [0, 8])
def test_fp8_keeps_less_of_trained_linear_layers_and_not_of_those_with_adapters(rank: int) -> None:
    config = run()
    [chunk] = make_layout(config, SIZE).chunks
    names = ("vision.*.lora", "language.*.lora") if rank else ("vision", "language")
    config = dataclasses.replace(
        config,
        architecture=dataclasses.replace(config.architecture, lora=Lora(rank=rank)),
        training=dataclasses.replace(config.training, trainable=("connector", *names)),
    )
    in_8_bits = dataclasses.replace(config, fp8=Fp8(vision="tensorwise", language="tensorwise"))
    load = RankLoad(tokens=1000.0, tiles=7.0)
    saved = [activation_memory(one, chunk, load).per_microbatch for one in (config, in_8_bits)]
    assert saved[1] == saved[0] if rank else saved[1] < saved[0]


@pytest.mark.parametrize("mask", [("connector.*",), ("vision.encoder.layers.23", "language")])
def test_a_connector_keeps_what_it_needs_whatever_pattern_names_what_is_trained(
    mask: tuple[str, ...],
) -> None:
    config = run()
    [chunk] = make_layout(config, SIZE).chunks
    training = dataclasses.replace(config.training, trainable=mask)
    masked = dataclasses.replace(config, training=training)
    none, seven = (
        activation_memory(masked, chunk, RankLoad(tokens=0.0, tiles=tiles)).per_microbatch
        for tiles in (0.0, 7.0)
    )
    vision = config.architecture.vision
    layers = sum(name.startswith("vision") for name in mask)
    of_layer = 10 * vision.hidden_size + 2 * vision.ffn_hidden_size
    kept = vision.tokens * of_layer * layers + config.architecture.connector_sizes.kept(1)
    assert seven - none == 2 * 7 * kept


@pytest.mark.parametrize("recipe", ["llava", "flamingo"])
def test_frozen_layers_among_trained_ones_do_not_keep_what_they_read(recipe: str) -> None:
    """Results of both norms, and of an MLP's gate with its other half."""
    config = parse(["--recipe", recipe, "--stage", "1"])
    [chunk] = make_layout(config, SIZE).chunks

    def kept(*more: str) -> float:
        mask = ("connector", *(("*.cross",) if recipe == "flamingo" else ()), *more)
        training = dataclasses.replace(config.training, trainable=mask)
        masked = dataclasses.replace(config, training=training)
        load = RankLoad(tokens=1000.0, tiles=1.0)
        return activation_memory(masked, chunk, load).per_microbatch

    language = config.architecture.language
    of_layer = 2 * 1000 * (2 * language.hidden_size + language.ffn_hidden_size)
    assert kept("language.decoder.layers.3.mlp") - kept() == of_layer
    assert kept("language.decoder.layers.*.mlp") - kept() == of_layer * language.num_layers


def test_experts_on_half_of_the_ranks_leave_each_its_share_of_the_optimizer() -> None:
    language = dataclasses.replace(TINY.language, **EXPERTS | dict(num_experts=4))
    arch = dataclasses.replace(TINY, language=language)
    found = [
        needed(
            dataclasses.replace(
                config_for(Path(), expert_model_parallel_size=ranks), architecture=arch
            ),
            data_ranks=4,
        )
        for ranks in (1, 2)
    ]
    of_experts = sum(piece.elements for piece in pieces(arch) if piece.expert is not None)
    assert found[0].weights - found[1].weights == 4 * of_experts / 2
    assert found[0].optimizer == found[1].optimizer
    # Float32 weights are their own main weights, beside two moments.
    every = sum(piece.elements for piece in pieces(arch))
    padded = 2 * (256 - 199) * language.hidden_size
    assert found[0].optimizer == 8 * (every + padded) / 4
