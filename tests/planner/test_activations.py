"""Activation memory, by pencil and paper: bytes of bfloat16 for 1,000 tokens and 7 tiles."""

from __future__ import annotations

import dataclasses

import pytest

from megavlm.config.cli import parse
from megavlm.config.fp8 import Fp8
from megavlm.config.loss import Loss
from megavlm.config.models import MODELS
from megavlm.config.schema import Config
from megavlm.planner.activations import ActivationMemory, activation_memory
from megavlm.planner.layout import make_layout
from megavlm.planner.memory import memory_by_rank
from megavlm.planner.rank_load import RankLoad
from tests.planner.test_estimate import CAPACITY, SIZE, run

TOKENS = 1000
TILES = 7
LOAD = RankLoad(tokens=TOKENS, tiles=TILES)
SPREAD = dict(tensor_model_parallel_size=2, sequence_parallel=True)
# InternVL2.5-2B: 24 layers of 1,024 and 4,096 on 1,025 tokens of a tile, which become 256 features
# of 4,096; 24 layers of 2,048 and 8,192 with 16 heads of 128, of which 8 have keys and values.
VISION = 24 * 1025
CONNECTOR = 256 * 2
LANGUAGE = 24
QUERIES = 2048
KEYS = 1024
WORDS = 92553


def kept(config: Config, number: int = 0) -> ActivationMemory:
    return activation_memory(config, make_layout(config, SIZE).chunks[number], LOAD)


def masked(config: Config, *mask: str) -> Config:
    return dataclasses.replace(
        config, training=dataclasses.replace(config.training, trainable=mask)
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_everything_is_trained(ranks: int) -> None:
    """Norms keep their inputs and results, attention queries, keys, values and its output, an MLP
    what goes into its activation, beside it, and comes out of it; a vision layer its branches, too.
    """
    found = kept(run(**SPREAD) if ranks > 1 else run())
    vision = VISION * (6 * 1024 + (4 * 1024 + 2 * 4096) / ranks)
    connector = CONNECTOR * (4096 + 2048 / ranks)
    language = LANGUAGE * (4 * 2048 + 2 * QUERIES + 2 * KEYS + 3 * 8192) / ranks
    # The inputs of the last norm, and of the head, of which each rank has all.
    head = 2048 / ranks + 2048
    expected = 2 * (TILES * (vision + connector) + TOKENS * (language + head))
    assert found.per_microbatch == expected
    assert found.once == 2 * TOKENS * WORDS / ranks


def test_tokens_are_whole_without_sequence_parallelism() -> None:
    whole, scattered = (
        kept(run(tensor_model_parallel_size=2, sequence_parallel=one)).per_microbatch
        for one in (False, True)
    )
    assert whole - scattered == 2 * TOKENS * (LANGUAGE * 4 + 1) * 2048 / 2


def test_ranks_that_share_a_key_have_it_whole() -> None:
    """Each of 16 ranks has one query head of 16, and one key head of 8."""
    eight, sixteen = (
        kept(run(tensor_model_parallel_size=ranks, sequence_parallel=True)).per_microbatch * ranks
        for ranks in (8, 16)
    )
    replicated = 2 * TILES * (VISION * 6 * 1024 + CONNECTOR * 4096) + 2 * TOKENS * 2048
    shared = 2 * TOKENS * LANGUAGE * 2 * (16 * 128 - KEYS)
    assert sixteen - eight == pytest.approx(8 * replicated + shared)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_is_kept_once(recompute: str) -> None:
    found = kept(run(recompute=recompute))
    vision = {"selective": 10 * 1024, "full": 1024}[recompute]
    language = {"selective": 4 * 2048 + 2 * QUERIES + 2 * KEYS, "full": 2048}[recompute]
    around = TILES * CONNECTOR * (4096 + 2048) + TOKENS * 2 * 2048
    expected = 2 * (TILES * VISION * vision + TOKENS * LANGUAGE * language + around)
    assert found.per_microbatch == expected
    of_vision = {"selective": 2 * 4096, "full": 10 * 1024 + 2 * 4096}[recompute]
    assert found.once == 2 * (TILES * 1025 * of_vision + TOKENS * WORDS), "more than of language"


def test_of_frozen_parts_only_one_layer_at_a_time_has_anything() -> None:
    found = kept(masked(run(), "connector"))
    language = 2 * 2048 + 2 * QUERIES + 2 * KEYS + 2 * 8192
    around = TILES * CONNECTOR * (4096 + 2048) + TOKENS * 2 * 2048
    assert found.per_microbatch == 2 * (TOKENS * LANGUAGE * language + around)
    assert found.once == 2 * (TILES * 1025 * (6 * 1024 + 4096) + TOKENS * WORDS)
    # Nothing comes back to the connector if the language model alone is trained.
    alone = kept(masked(run(), "language")).per_microbatch
    language += 2 * 2048 + 8192
    assert alone == 2 * TOKENS * (LANGUAGE * language + 2 * 2048)


def test_chunks_keep_what_they_send() -> None:
    config = run(pipeline_model_parallel_size=3, layout="v*24|t*12|t*12", **SPREAD)
    layers = (4 * 2048 + 2 * QUERIES + 2 * KEYS + 3 * 8192) * 12 / 2
    vision = VISION * (6 * 1024 + (4 * 1024 + 2 * 4096) / 2) + 1025 * 1024
    assert kept(config, 0).per_microbatch == 2 * TILES * vision
    connector = TILES * CONNECTOR * (4096 + 2048 / 2)
    assert kept(config, 1).per_microbatch == 2 * (connector + TOKENS * (layers + 2048 / 2))
    assert kept(config, 2).per_microbatch == 2 * TOKENS * (layers + 2048 / 2 + 2048)
    assert kept(config, 1).once == kept(config, 0).once == 0


def test_experts_keep_what_they_read_and_the_choice_of_each_token() -> None:
    """Eight of 128 experts of 768 for a token: InternVL3.5-30B-A3B, with normalised heads."""
    config = dataclasses.replace(run(), architecture=MODELS["internvl3_5-30b-a3b"])
    config = masked(config, "language")
    attention = 4 * 2048 + 3 * 32 * 128 + 3 * 4 * 128
    experts = 8 * (2048 + 4 * 768) + 10 * 128
    layers = 48 * (attention + experts)
    assert kept(config).per_microbatch == 2 * TOKENS * (layers + 2 * 2048)
    frozen = masked(config, "language.embedding")
    layers = 48 * (attention - 2 * 2048 + 8 * 3 * 768 + 10 * 128)
    assert kept(frozen).per_microbatch == 2 * TOKENS * (layers + 2 * 2048)
    shared = dataclasses.replace(
        config.architecture.language, shared_expert_ffn_hidden_size=100, num_query_groups=4
    )
    arch = dataclasses.replace(config.architecture, language=shared)
    more = kept(dataclasses.replace(config, architecture=arch)).per_microbatch
    assert more - kept(config).per_microbatch == 2 * TOKENS * 48 * 3 * 100


def test_fp8_keeps_inputs_in_8_bits_but_in_the_first_and_last_layers() -> None:
    """Of all layers but 2 + 1: the results of both norms, and what the last matrix of the MLP
    reads. The output of attention is kept twice.
    """
    config = run()
    fp8 = Fp8(language="tensorwise", first_bf16_layers=2, last_bf16_layers=1)
    saved = kept(config).per_microbatch
    saved -= kept(dataclasses.replace(config, fp8=fp8)).per_microbatch
    assert saved == pytest.approx(TOKENS * 21 * (2 * 2048 + 8192 - QUERIES))
    fp8 = Fp8(vision="tensorwise")
    saved = kept(config).per_microbatch
    saved -= kept(dataclasses.replace(config, fp8=fp8)).per_microbatch
    assert saved == pytest.approx(TILES * VISION * (2 * 1024 + 4096 - 1024))


@pytest.mark.parametrize(
    ("precision", "kernels", "block", "cap", "bytes_of_logit"),
    [
        ("bfloat16", "auto", 0, 0.0, 2),
        ("bfloat16", "auto", 0, 30.0, 4),
        ("bfloat16", "local", 0, 0.0, 6),
        ("bfloat16", "local", 512, 0.0, 8),
        ("float32", "local", 0, 0.0, 4),
        ("float32", "local", 0, 30.0, 8),
        ("float32", "local", 512, 30.0, 8),
    ],
)
def test_logits_are_held_while_their_loss_is_computed(
    precision: str, kernels: str, block: int, cap: float, bytes_of_logit: int
) -> None:
    config = run()
    language = dataclasses.replace(config.architecture.language, final_softcap=cap)
    config = dataclasses.replace(
        config,
        architecture=dataclasses.replace(config.architecture, language=language),
        training=dataclasses.replace(config.training, precision=precision, kernels=kernels),
        loss=Loss(vocabulary_block=block),
    )
    logits = TOKENS * (block or WORDS) * bytes_of_logit
    assert kept(config).once == logits + (4 * TOKENS * 2048 if block else 0)
    few = RankLoad(tokens=TOKENS, tiles=TILES, supervised=100.0)
    [chunk] = make_layout(config, SIZE).chunks
    assert activation_memory(config, chunk, few).once == kept(config).once / 10


def test_blocks_of_cross_attention_keep_queries_of_tokens_and_keys_of_tiles() -> None:
    """OpenFlamingo's blocks, of 8 heads of 64 or what the recipe has, in front of some layers."""
    config = parse(["--recipe", "flamingo", "--stage", "1"])
    arch = config.architecture
    language = arch.language
    none = dataclasses.replace(arch.cross_attention, every=0)
    plain = dataclasses.replace(
        config, architecture=dataclasses.replace(arch, cross_attention=none)
    )
    trained = masked(config, "connector", "language")
    blocks = sum(map(arch.cross_attention.stands_before, range(language.num_layers)))
    heads = language.num_attention_heads * language.head_size
    of_token = 6 * language.hidden_size + 4 * heads + 3 * language.ffn_hidden_size
    of_tile = 3 * arch.features_per_tile * heads
    expected = 2 * blocks * (TOKENS * of_token + TILES * of_tile)
    found = (
        kept(trained).per_microbatch - kept(masked(plain, "connector", "language")).per_microbatch
    )
    # The connector makes features as wide as what reads them.
    widths = [one.connector_sizes.kept(1) for one in (arch, plain.architecture)]
    assert found == expected + 2 * TILES * (widths[0] - widths[1])
    full = dataclasses.replace(
        trained, parallel=dataclasses.replace(config.parallel, recompute="full")
    )
    assert kept(full).per_microbatch < kept(trained).per_microbatch - expected
    assert kept(full).once > 2 * (TOKENS * of_token + TILES * of_tile)


@pytest.mark.parametrize("recipe", ["llava", "flamingo"])
def test_an_mlp_without_a_gate_keeps_what_goes_into_its_activation_and_comes_out(
    recipe: str,
) -> None:
    config = masked(parse(["--recipe", recipe, "--stage", "1"]), "connector", "language")
    language = config.architecture.language
    plain = dataclasses.replace(language, activation="gelu")
    arch = dataclasses.replace(config.architecture, language=plain)
    ungated = dataclasses.replace(config, architecture=arch)
    blocks = sum(map(arch.cross_attention.stands_before, range(language.num_layers)))
    assert (blocks > 0) == (recipe == "flamingo")
    # One number less of each of these, trained or not.
    for mask in (("connector", "language"), ("connector",)):
        less = kept(masked(config, *mask)).per_microbatch
        less -= kept(masked(ungated, *mask)).per_microbatch
        layers = language.num_layers + blocks
        assert less == 2 * TOKENS * layers * language.ffn_hidden_size


def test_a_rank_keeps_the_packs_under_way_of_all_its_chunks() -> None:
    config = run(pipeline_model_parallel_size=4)
    layout = make_layout(config, SIZE)
    sizes = dict(capacity=CAPACITY, tiles=48.0)
    load = RankLoad(tokens=CAPACITY, tiles=48)
    own = [activation_memory(config, chunk, load) for chunk in layout.chunks]
    found = memory_by_rank(config, layout, 8, **sizes)
    for rank, (needed, chunk) in enumerate(zip(found, own, strict=True)):
        assert needed.activations == (4 - rank) * chunk.per_microbatch + chunk.once
    turns = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, virtual_pipeline_model_parallel_size=2),
    )
    layout = make_layout(turns, SIZE)
    own = [activation_memory(turns, chunk, load) for chunk in layout.chunks]
    found = memory_by_rank(turns, layout, 8, **sizes)
    # The last rank runs four packs through its first chunk and one through its second one, or, when
    # that one is back, a fifth through the first.
    first, second = (own[number].per_microbatch for number in (3, 7))
    most = max(4 * first + second, 5 * first)
    assert found[3].activations == most + max(own[3].once, own[7].once)


@pytest.mark.parametrize(("loss", "times"), [("softmax", 8), ("sigmoid", 6), ("ring", 5)])
def test_similarities_are_held_with_the_activations_of_one_pack_or_between_passes(
    loss: str, times: int
) -> None:
    recipe = "clip" if loss == "softmax" else "siglip"
    ring = ["--architecture.contrastive.exchange", "ring"] if loss == "ring" else []
    config = parse(["--recipe", recipe, "--stage", "1", *ring])
    held = []
    for packs in (1, 2, 400):
        batch = dataclasses.replace(config.training, global_batch_size=4 * packs)
        one = dataclasses.replace(config, training=batch)
        [needed] = memory_by_rank(one, make_layout(one, SIZE), 4, capacity=TOKENS, tiles=40.0)
        held.append(needed.activations)
    own = 40
    everyone = own if loss == "ring" else 4 * own
    assert held[0] - held[1] == 4 * times * own * everyone, "two packs run one after the other"
    assert held[2] == 400**2 * 4 * times * own * everyone
