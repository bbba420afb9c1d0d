"""The tables of models and stages say what the papers say."""

from __future__ import annotations

import pytest

from megavlm.config.cli import parse
from megavlm.config.models import MODELS, architecture
from megavlm.config.recipes import recipe
from megavlm.config.recipes.internvl import RECIPE, STAGES
from megavlm.config.schema import Architecture


def weights(arch: Architecture) -> tuple[int, int]:
    """Weights of the vision encoder and of the language model (its two tables of words not shared),
    from first principles.
    """
    vision = arch.vision
    language = arch.language
    wide = vision.hidden_size
    inner = vision.ffn_hidden_size
    norm_biases = 2 * wide if vision.normalization == "LayerNorm" else 0
    norms = norm_biases + 2 * wide
    qkv_bias = 3 * wide * vision.qkv_bias
    layer = (
        4 * wide**2
        + qkv_bias
        + wide
        + 2 * wide * inner
        + inner
        + wide
        + norms
        + 2 * wide * vision.qk_norm
        + 2 * wide
    )
    encoder = (
        vision.num_layers * layer
        + 3 * vision.patch_size**2 * wide
        + wide
        + (1 + vision.tokens) * wide
    )
    wide = language.hidden_size
    size = language.head_size
    queries = size * language.num_attention_heads
    keys = size * language.num_query_groups
    layer = (
        2 * wide * queries
        + 2 * wide * keys
        + language.qkv_bias * (queries + 2 * keys)
        + 2 * size * language.qk_norm
    )
    layer += 3 * wide * language.ffn_hidden_size + 2 * wide
    return encoder, language.num_layers * layer + wide + 2 * language.vocab_size * wide


@pytest.mark.parametrize(
    ("name", "vision_millions", "language_millions"),
    # Published: InternViT-300M has 304 M weights; Qwen2.5 0.36 B and 2.77 B without its tables;
    # InternLM2.5 1.89 B and 7.74 B with them.
    [
        ("internvl2_5-1b", 304, 358 + 2 * 151674 * 896 // 10**6),
        ("internvl2_5-2b", 304, 1889),
        ("internvl2_5-4b", 304, 2775 + 2 * 151674 * 2048 // 10**6),
        ("internvl2_5-8b", 304, 7738),
    ],
)
def test_models_have_as_many_weights_as_published(
    name: str, vision_millions: int, language_millions: int
):
    vision, language = weights(architecture(name))
    assert vision / 1e6 == pytest.approx(vision_millions, abs=1.0)
    assert language / 1e6 == pytest.approx(language_millions, abs=2.0)


@pytest.mark.parametrize(
    ("name", "billions"),
    # Published, without the tables of words: Qwen2.5 (arXiv 2412.15115) and Qwen3 (their model
    # cards).
    [
        ("internvl3-2b", 1.31),
        ("internvl3-8b", 6.53),
        ("internvl3-14b", 13.1),
        ("internvl2_5-38b", 31.0),
        ("internvl3-78b", 70.0),
        ("internvl3_5-1b", 0.44),
        ("internvl3_5-2b", 1.4),
        ("internvl3_5-4b", 3.6),
        ("internvl3_5-8b", 6.95),
        ("internvl3_5-14b", 13.2),
        ("internvl3_5-38b", 31.2),
    ],
)
def test_larger_language_models_have_as_many_weights_as_published(name: str, billions: float):
    language = architecture(name).language
    tables = 2 * language.vocab_size * language.hidden_size
    assert (weights(architecture(name))[1] - tables) / 1e9 == pytest.approx(billions, rel=0.012)


def test_internvit_6b_has_5540_million_weights():
    for name in (
        "internvl2_5-26b",
        "internvl2_5-38b",
        "internvl2_5-78b",
        "internvl3-38b",
        "internvl3_5-38b",
    ):
        assert weights(architecture(name))[0] / 1e6 == pytest.approx(5540, abs=5)


def test_a_tile_of_448_pixels_gives_256_features():
    for name, arch in MODELS.items():
        if arch.image_tokens != "internvl":
            continue
        assert arch.features_per_tile == {"tiny": 16, "digits": 1}.get(name, 256)
        assert arch.connector_sizes.feature_size == 4 * arch.vision.hidden_size


@pytest.mark.parametrize(
    ("name", "trainable", "lr", "warmup", "batch", "drop_path"),
    [
        ("1", ("connector",), 2e-4, (100, 0.0), 512, 0.0),
        ("1.5", ("vision", "connector"), 1e-5, (100, 0.0), 1024, 0.1),
        ("2", ("vision", "connector", "language"), 4e-5, (0, 0.03), 512, 0.1),
    ],
)
def test_stages_are_those_of_internvl(
    name: str,
    trainable: tuple[str, ...],
    lr: float,
    warmup: tuple[int, float],
    batch: int,
    drop_path: float,
):
    row = RECIPE.stage(name)
    assert (
        row.training.trainable == trainable
        and row.training.global_batch_size == batch
        and row.training.drop_path == drop_path
    )
    assert (row.optimizer.lr, row.optimizer.warmup_steps, row.optimizer.warmup_ratio) == (
        lr,
        *warmup,
    )
    assert (
        row.loss_reduction == "square"
        and row.optimizer.decay == "all"
        and row.optimizer.weight_decay == 0.05
    )


def test_stage_0_trains_the_language_model_alone():
    assert STAGES["0"].training.trainable == ("language",) and STAGES["0"].training.drop_path == 0
    assert STAGES["0"].loss_reduction == "token"


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match=(
            r"--model nano: no such model, no such folder, and none of that name in the hub's"
            r" cache; known models are tiny, internvl2_5-1b"
        ),
    ):
        architecture("nano")
    with pytest.raises(ValueError, match=r"--stage 7: no such stage .*; known are 0, 1, 1\.5, 2"):
        RECIPE.stage("7")
    with pytest.raises(ValueError, match="--recipe nano: no such recipe; known are internvl"):
        recipe("nano")


def test_stages_of_qwen_train_what_their_reports_say():
    trained = {
        name: {stage: row.training.trainable for stage, row in recipe(name).stages.items()}
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    }
    everything = ("vision", "connector", "language")
    assert trained["qwen2_vl"] == {
        "1": everything[:2],
        "2": everything,
        "sft": everything[2:],
        "finetune": everything[1:],
    }
    assert trained["qwen2_5_vl"] == {
        "1": everything[:2],
        "2": everything,
        "3": everything,
        "sft": everything[1:],
        "dpo": everything[1:],
        "finetune": everything[1:],
    }

    assert trained["qwen3_vl"] == {
        "0": everything[1:2],
        **dict.fromkeys(("1", "2", "3", "sft"), everything),
        "finetune": everything[1:],
    }
    tokens = {
        stage: row.training.steps * row.training.global_batch_size * length
        for (stage, row), length in zip(
            recipe("qwen3_vl").stages.items(), (8192, 8192, 32768, 262144), strict=False
        )
    }
    published = {"0": 67e9, "1": 1e12, "2": 1e12, "3": 100e9}
    assert tokens == {stage: pytest.approx(count, rel=0.01) for stage, count in published.items()}
    assert {recipe("qwen3_vl").stage(stage).loss_reduction for stage in published} == {"square"}


def test_a_stage_may_set_the_losses_of_preferences():
    words = ["--recipe", "qwen2_5_vl", "--data.reference", "r"]
    of_dpo = parse([*words, "--stage", "dpo"]).architecture
    assert of_dpo.objective == "preference"
    assert of_dpo.preference.weights == {"dpo": 1.0, "bco": 0.0, "sft": 0.0}
    mixed = [*words, "--stage", "dpo", "--architecture.preference.sft", "0.5"]
    assert parse(mixed).architecture.preference.weights == {"dpo": 1.0, "bco": 0.0, "sft": 0.5}
    other = parse(["--recipe", "internvl", "--model", "tiny", "--stage", "mpo"]).architecture
    assert other.preference.weights == {"dpo": 0.8, "bco": 0.2, "sft": 1.0}
