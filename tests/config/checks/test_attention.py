"""What attention with sinks, windows and YaRN cannot be is refused, with the flag to change."""

from __future__ import annotations

import pytest

from megavlm.config.checks.device import DeviceCapabilities, device_problems
from megavlm.config.checks.rules import problems
from megavlm.config.cli import parse

MODEL = "internvl3_5-gpt-oss-20b"
PLAIN = "internvl3_5-8b"
ADAPTERS = ("--architecture.lora.rank", "8", "--architecture.lora.targets", "language.*.experts")


def found(model: str, *options: str) -> list[str]:
    """List the problems of a run on eight ranks."""
    flag = "--architecture.language."
    named = [
        flag + one if index % 2 == 0 and "-" not in one else one
        for index, one in enumerate(options)
    ]
    config = parse(["--stage", "2", "--model", model, *named])
    return problems(config, 8)


def test_the_model_of_the_table_has_no_problem() -> None:
    assert not [one for one in found(MODEL) if "architecture" in one]
    split = ("--expert-model-parallel-size", "8")
    assert not [one for one in found(MODEL, *split) if "architecture" in one]


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        (PLAIN, ("window_size", "128"), "only computed beside sinks"),
        (PLAIN, ("window_attn_skip_freq", "2"), "has no effect without"),
        (PLAIN, ("rotary_yarn_truncate", "false"), "rotary_yarn_truncate false has no effect"),
        (PLAIN, ("rotary_yarn_factor", "0.5"), "rotary_yarn_factor"),
        (MODEL, ("window_attn_skip_freq", "1"), "no layer would have a window"),
        (MODEL, ("window_size", "-1"), "window_size"),
        (MODEL, ("rotary_dynamic_factor", "2"), "stretches positions in another way"),
        (MODEL, ("rotary_percent", "0.5"), "YaRN rotates whole heads"),
        (MODEL, ("--architecture.prefix_lm", "true"), "attention with sinks is causal"),
        (MODEL, ("--expert-tensor-parallel-size", "2"), "add the bias of an expert's second"),
        (MODEL, ADAPTERS, "no file of adapters names one of them"),
    ],
)
def test_what_cannot_run_is_named(model: str, options: tuple[str, ...], told: str) -> None:
    assert any(told in one for one in found(model, *options)), found(model, *options)


def test_transformer_engine_has_no_sinks() -> None:
    gpu = DeviceCapabilities(capability=(9, 0), has_transformer_engine=True)
    for kernels, is_refused in (("auto", True), ("transformer_engine", True), ("local", False)):
        config = parse(["--stage", "2", "--model", MODEL, "--training.kernels", kernels])
        told = [one for one in device_problems(config, gpu) if "attention_sinks" in one]
        assert bool(told) == is_refused
