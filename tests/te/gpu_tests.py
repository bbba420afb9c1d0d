"""Runs tests of ``tests/gpu`` on a CPU, with torch operations in place of Transformer Engine's
compiled functions, and prints how each ended, as JSON. ``test_gpu_tests`` starts it.

It tries the tests themselves before a GPU does. Those of FP8, of 16-bit moments and of equal bits
need what a CPU has not.
"""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from tests.te import torch_kernels

CHOSEN = (
    "near_to_float32",
    "one_sample_at_a_time",
    "freeze_mask",
    "goes_on_with_the_other",
    "return_bit_identical",
    "test_kernels",
)
"""Words of the names of the tests that are tried."""


class Outcomes:
    """Keep how the tests ended: what pytest says of those that failed.

    Attributes:
        found: by the name of the test.
    """

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a phase of a test."""
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.split("::")[-1]
            self.found[name] = report.outcome if report.passed else report.longreprtext[-2000:]


def main() -> None:
    """Run the tests and print what was found."""
    torch_kernels.install()
    torch.cuda.empty_cache = lambda: None
    outcomes = Outcomes()
    words = [
        "tests/gpu",
        "-k",
        " or ".join(CHOSEN),
        "-q",
        "--show-capture=no",
        "-p",
        "no:cacheprovider",
    ]
    pytest.main([*words, "--no-header", "--no-summary"], plugins=[outcomes])
    json.dump(outcomes.found, os.fdopen(int(sys.argv[1]), "w"))


if __name__ == "__main__":
    main()
