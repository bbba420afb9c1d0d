"""The doctor's report on a CPU, and what it says about what is missing."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch

from megavlm.health import doctor


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.slow
def test_a_cpu_is_ready_and_called_a_cpu() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "megavlm.health.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU is found: training runs on this CPU over gloo" in done.stdout
    assert "step in bfloat16" in done.stdout and done.stdout.endswith("ready to train\n")


def test_a_needed_package_that_is_missing_is_a_fault_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("jsonargparse", "transformer-engine", "triton"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.5.1" if name == "pytorch-triton" else known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {one.topic: one for one in doctor.examine()}
    assert found["jsonargparse"].is_fault and not found["transformer-engine"].is_fault
    assert 'pip install "jsonargparse"' in str(found["jsonargparse"])
    assert "transformer-engine[pytorch]" in found["transformer-engine"].remedy
    # Under the name that NVIDIA's images have for it.
    assert found["triton"].text == "3.5.1" and not found["triton"].remedy


def test_a_kernel_that_fails_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(dtype: torch.dtype, place: torch.device):
        def step() -> torch.Tensor:
            raise RuntimeError("no kernel image is available\nmore")

        return step

    monkeypatch.setattr(doctor, "_linear_step", broken)
    faults = list(doctor.steps(torch.device("cpu")))
    assert [one.is_fault for one in faults] == [True, True]
    assert faults[0].text == "no kernel image is available"


def test_another_cudnn_than_torchs_is_told_and_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> int:
        raise RuntimeError("cuDNN version incompatibility: 9.19 and 9.14\nmore")

    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    found = doctor._cudnn()
    assert "incompatibility: 9.19 and 9.14" in found.text and "more" not in found.text
    assert found.remedy and not found.is_fault
