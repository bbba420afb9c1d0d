"""What of experts cannot run is refused, with the flag to change."""

from __future__ import annotations

import pytest

from megavlm.config.checks.device import DeviceCapabilities, device_problems
from megavlm.config.checks.rules import problems
from megavlm.config.cli import parse

MODEL = "internvl3_5-30b-a3b"
ATTENTION = ("--architecture.lora.targets", "language.*.self_attention")


def found(*options: str, model: str = MODEL, ranks: int = 8) -> list[str]:
    """List the problems with experts of a run."""
    config = parse(["--stage", "2", "--model", model, *options])
    words = ("expert", "topk", "sequence_parallel")
    return [one for one in problems(config, ranks) if any(word in one for word in words)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--parallel.expert_model_parallel_size", "3"), "does not divide the experts"),
        (("--parallel.expert_model_parallel_size", "16"), "does not divide the 8 ranks"),
        (("--parallel.expert_model_parallel_size", "0"), "must be 1 or more"),
        (("--expert-tensor-parallel-size", "0"), "must be 1 or more"),
        (("--expert-tensor-parallel-size", "5"), "does not divide the width of an expert"),
        (
            ("--expert-tensor-parallel-size", "4", "--expert-model-parallel-size", "4"),
            "make 16, which does not divide the 8 ranks",
        ),
        (
            ("--expert-tensor-parallel-size", "2", "--architecture.lora.rank", "8"),
            "the whole gradient of their adapters",
        ),
        (
            ("--expert-tensor-parallel-size", "2", "--optimizer.kind", "muon"),
            "muon needs the whole gradient of an expert",
        ),
        (("--parallel.tensor_model_parallel_size", "2"), "use true"),
        (("--fp8.language", "delayed"), "use tensorwise or blockwise"),
        (
            ("--architecture.lora.rank", "8", "--architecture.lora.dropout", "0.1"),
            "dropout draws by position",
        ),
        (
            ("--architecture.lora.rank", "8", "--architecture.lora.dora", "true"),
            "DoRA would read all of their weights",
        ),
        (("--architecture.language.experts_per_token", "129"), "there are only"),
        (("--architecture.language.experts_per_token", "0"), "must be 1 or more"),
        (("--architecture.language.experts_per_token", "1"), "the router would learn nothing"),
        (("--architecture.language.num_experts", "0"), "has no effect without"),
        (("--architecture.language.num_experts", "-1"), "must be 0 or more"),
        (("--architecture.language.activation", "gelu"), "experts are gated MLPs"),
        (("--experts.balance_loss", "-1"), "must be 0 or more"),
        (("--experts.dispatcher", "allgather"), "no token leaves its rank"),
        (("--architecture.language.shared_expert_gate", "true"), "has no effect without"),
        (("--architecture.language.routed_scaling", "0"), "must be more than 0"),
        (("--architecture.language.shared_expert_ffn_hidden_size", "-1"), "must be 0 or more"),
        (
            (
                *("--architecture.language.shared_expert_ffn_hidden_size", "768"),
                *("--architecture.language.linear_bias", "true"),
            ),
            "shared expert (--architecture.language.shared_expert_ffn_hidden_size 768) has no bias",
        ),
        (
            (
                *("--architecture.language.shared_expert_ffn_hidden_size", "33"),
                *("--parallel.tensor_model_parallel_size", "2", "--sequence-parallel", "true"),
            ),
            "2 does not divide --architecture.language.shared_expert_ffn_hidden_size 33",
        ),
        (("--experts.bias_update_rate", "0.01"), "has no effect without"),
        (
            ("--experts.balance_over", "global_batch", "--experts.balance_loss", "0"),
            "has no effect with --experts.balance_loss 0",
        ),
        (
            ("--training.trainable", "connector", "--experts.balance_over", "global_batch"),
            "trains no router",
        ),
        (
            ("--training.trainable", "connector", "--experts.balance_loss", "0.1"),
            "trains no router",
        ),
        (
            ("--training.trainable", "language.*.experts", "--experts.router_z_loss", "0.1"),
            "trains no router",
        ),
    ],
)
def test_what_cannot_run_is_refused(options: tuple[str, ...], told: str) -> None:
    assert any(told in one for one in found(*options)), found(*options)


@pytest.mark.parametrize(
    "pattern", ["language.decoder.layers.5", "*.layers.47.*.experts.127.linear_fc2"]
)
def test_experts_of_any_layer_are_not_in_4_bits(pattern: str) -> None:
    told = found("--architecture.lora.rank", "8", *ATTENTION, "--architecture.lora.nf4", pattern)
    assert any("weights of experts cannot be in 4 bits" in one for one in told), told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--parallel.expert_model_parallel_size", "2"), "the model has no experts"),
        (("--parallel.expert_tensor_parallel_size", "2"), "the model has no experts"),
        (("--experts.router_z_loss", "0.1"), "has no effect"),
    ],
)
def test_settings_of_experts_need_experts(options: tuple[str, ...], told: str) -> None:
    assert any(told in one for one in found(*options, model="internvl3_5-8b"))


def test_the_models_of_the_table_can_run() -> None:
    assert not found()
    assert not found("--expert-model-parallel-size", "8")
    split = ("--expert-model-parallel-size", "8", "--experts.dispatcher", "allgather")
    assert not found(*split, "--experts.balance_loss", "0.1")
    split = ("--expert-tensor-parallel-size", "2", "--expert-model-parallel-size", "4")
    assert not found(*split, "--architecture.lora.rank", "8", *ATTENTION)
    assert not found("--expert-tensor-parallel-size", "2", "--experts.dispatcher", "allgather")
    assert not found("--training.trainable", "language.*.router", "--experts.balance_loss", "0.1")
    assert not found("--architecture.lora.rank", "8", *ATTENTION)
    assert not found("--architecture.lora.rank", "8")
    assert not found("--fp8.language", "blockwise")
    odd = ("--fp8.language", "blockwise", "--architecture.language.expert_ffn_hidden_size", "760")
    assert "makes matrices 760 wide, not a multiple of 16" in found(*odd)[0]
    shared = "--architecture.language.shared_expert_ffn_hidden_size"
    assert not found("--fp8.language", "blockwise", shared, "768")
    (told,) = found("--fp8.language", "blockwise", shared, "760")
    assert "shared_expert_ffn_hidden_size makes matrices 760 wide" in told
    split = ("--parallel.tensor_model_parallel_size", "4", "--sequence-parallel", "true")
    assert not found(*split, "--expert-model-parallel-size", "8", model="internvl3_5-241b-a28b")


GPU = DeviceCapabilities(capability=(9, 0), has_transformer_engine=True)


def test_a_mask_of_single_experts_needs_local_layers() -> None:
    one = "language.decoder.layers.3.mlp.experts.17"
    for mask, count in ((f"connector,{one}", 1), ("language.*.experts", 0), ("connector", 0)):
        config = parse(["--stage", "2", "--model", MODEL, "--training.trainable", mask])
        found = [told for told in device_problems(config, GPU) if "all experts of a layer" in told]
        assert len(found) == count, mask
        assert not device_problems(config, DeviceCapabilities())


@pytest.mark.parametrize(
    ("mask", "count"),
    [
        ("language.*.experts.*.linear_fc1.bias", 1),
        ("language.*.experts.*.bias", 1),
        ("language.*.experts.3.linear_fc1.bias", 1),
        ("language.*.experts.*.linear_fc2.bias", 0),
        ("language.*.experts.*.linear_fc1", 0),
        ("language.*.experts.*.weight", 0),
        ("language", 0),
    ],
)
def test_first_biases_of_experts_need_their_weights_or_local_layers(mask: str, count: int) -> None:
    words = ["--stage", "2", "--model", "internvl3_5-gpt-oss-20b", "--training.trainable", mask]
    for device, told in ((GPU, count), (DeviceCapabilities(), 0)):
        found = device_problems(parse(words), device)
        assert len([one for one in found if "no gradients of biases without" in one]) == told
