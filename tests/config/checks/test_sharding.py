"""Sizes that tensor parallelism divides."""

from __future__ import annotations

from pathlib import Path

from megavlm.config.checks.rules import facts_problems, problems
from tests.config.checks.configs import facts, tiny


def test_tensor_parallelism_divides_every_size_it_shares(packs: Path):
    found = problems(tiny(packs, "--tensor-model-parallel-size", "3"), 3 * 512)
    named = [problem.split("--architecture.")[1] for problem in found]
    assert [name.split()[0] for name in named] == [
        "vision.ffn_hidden_size",
        "language.num_attention_heads",
        "language.hidden_size",
        "language.num_query_groups",
    ]
    assert all("use 1, 2 or 4" in name for name in named[:3])


def test_heads_of_the_vision_encoder_are_padded_and_query_groups_shared(packs: Path):
    options = [
        "--tensor-model-parallel-size",
        "4",
        "--architecture.vision.num_attention_heads",
        "2",
        "--architecture.language.num_query_groups",
    ]
    assert (
        problems(tiny(packs, *options, "1"), 4)
        == problems(tiny(packs, *options, "2"), 4)
        == problems(tiny(packs, *options, "4"), 4)
        == []
    )


def test_whole_vision_layers_need_not_divide(packs: Path):
    found = problems(
        tiny(packs, "--tensor-model-parallel-size", "3", "--parallel.vision", "data"), 3 * 512
    )
    assert found and not [problem for problem in found if "--architecture.vision" in problem]


def test_sizes_of_nothing_are_reported_and_divide_nothing(packs: Path):
    options = [
        f"--architecture.{name} 0"
        for name in ("vision.patch_size", "connector.pixel_shuffle", "language.num_attention_heads")
    ]
    config = tiny(packs, *" ".join(options).split())
    assert len(problems(config, 1)) == 3
    facts_problems(config, [facts(tiny(packs))], 1)
