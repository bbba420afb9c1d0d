"""What attention with sinks, windows, soft caps and YaRN cannot be is refused, with the flag to
change.
"""

from __future__ import annotations

import pytest

from megavlm.config.checks.device import DeviceCapabilities, device_problems
from megavlm.config.checks.rules import problems
from megavlm.config.cli import parse

MODEL = "internvl3_5-gpt-oss-20b"
PLAIN = "internvl3_5-8b"
CAPPED = "paligemma2-3b"
CROSSES = ("--architecture.cross_attention.every", "2", "--architecture.connector.kind")
CROSSES += ("resampler",)
PAIRS = ("--architecture.objective", "contrastive", "--architecture.connector.kind", "mean")
PAIRS += ("tied_head", "false")
ADAPTERS = ("--architecture.lora.rank", "8", "--architecture.lora.targets", "language.*.experts")


def found(model: str, *options: str) -> list[str]:
    """List the problems of a run on eight ranks."""
    flag = "--architecture.language."
    named = [
        flag + one if index % 2 == 0 and "-" not in one else one
        for index, one in enumerate(options)
    ]
    return problems(parse([*_model(model), *named]), 8)


def _model(name: str) -> list[str]:
    """Return the options of a model and its recipe."""
    recipe = "paligemma" if name == CAPPED else "internvl"
    return ["--recipe", recipe, "--stage", "2", "--model", name]


def test_the_models_of_the_table_have_no_problem() -> None:
    assert not [one for one in found(MODEL) if "architecture" in one]
    assert not [one for one in found(CAPPED) if "architecture" in one]
    split = ("--expert-model-parallel-size", "8")
    assert not [one for one in found(MODEL, *split) if "architecture" in one]


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        (PLAIN, ("window_size", "128"), "qwen3 has no sliding windows, as gpt_oss and gemma2 have"),
        (PLAIN, ("attention_softcap", "50"), "attention_softcap 50.0: a model of"),
        (PLAIN, ("final_softcap", "30"), "qwen3 has none, as gemma2 has; leave it out"),
        (PLAIN, ("query_pre_attn_scalar", "256"), "query_pre_attn_scalar 256: a model of"),
        (PLAIN, ("sandwich_norm", "true"), "sandwich_norm true: a model of"),
        (CAPPED, ("attention_softcap", "-1"), "attention_softcap -1.0: must be 0 or more"),
        (CAPPED, ("final_softcap", "-0.5"), "final_softcap -0.5: must be 0 or more"),
        (CAPPED, ("query_pre_attn_scalar", "-4"), "query_pre_attn_scalar -4: must be 0 or more"),
        (CAPPED, ("window_size", "0"), "window_attn_skip_freq 2 has no effect without"),
        (CAPPED, CROSSES, "(--architecture.cross_attention.every 2) have no norms behind"),
        (CAPPED, PAIRS, "final_softcap 30.0 has no effect: --architecture.objective contrastive"),
        (CAPPED, ("--context-parallel-size", "2"), "--architecture.prefix_lm true"),
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


def test_attention_in_blocks_stands_between_transformer_engine_s_layers() -> None:
    gpu = DeviceCapabilities(capability=(9, 0), has_transformer_engine=True)
    for model in (MODEL, CAPPED):
        config = parse([*_model(model), "--training.kernels", "transformer_engine"])
        assert not device_problems(config, gpu)
        config = parse([*_model(model), "--fp8.language", "tensorwise"])
        told = [*problems(config, 8), *device_problems(config, gpu)]
        assert not [one for one in told if "fp8" in one]
