"""What the device lacks for a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.config.checks.device import DeviceCapabilities, device_problems
from megavlm.config.checks.rules import ConfigError, check, problems
from tests.config.checks.configs import tiny

HOPPER = DeviceCapabilities(capability=(9, 0), has_transformer_engine=True)
LACKING = [
    (
        "--training.kernels transformer_engine",
        DeviceCapabilities(),
        ["this machine has no CUDA device and no Transformer Engine; use local or auto"],
    ),
    (
        "--optimizer.moments bfloat16",
        DeviceCapabilities(capability=(9, 0)),
        ["Transformer Engine's AdamW, and this machine has no Transformer Engine"],
    ),
    (
        "--fp8.vision delayed",
        DeviceCapabilities(has_transformer_engine=True),
        ["--fp8.vision delayed", "has no CUDA device; use none"],
    ),
    (
        "--fp8.language mxfp8",
        HOPPER,
        [
            "needs compute capability 10.0, and less than 12.0, this GPU has 9.0; use delayed,"
            " tensorwise, blockwise, none"
        ],
    ),
]


@pytest.mark.parametrize(
    ("options", "device", "words"), LACKING, ids=[options for options, _, _ in LACKING]
)
def test_what_the_device_lacks_is_named_with_the_flag(
    options: str, device: DeviceCapabilities, words: list[str], packs: Path
):
    config = tiny(packs, *options.split())
    assert not problems(config, 1)
    found = device_problems(config, device)
    assert len(found) == 1 and all(word in found[0] for word in words), found
    with pytest.raises(ConfigError, match="--"):
        check(config, 1, device=device)


def test_a_hopper_gpu_runs_what_it_can(packs: Path):
    options = (
        "--fp8.vision blockwise --fp8.language delayed --optimizer.moments bfloat16"
        " --training.kernels transformer_engine"
    )
    check(tiny(packs, *options.split()), 1, device=HOPPER)
