"""The layouts that training is compared at, and the table of how far each was from one process."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.ranks.runs import EVERYTHING, TINY

DOCS = Path(__file__).parents[2] / "docs"
# By the stage that has it.
MASKS = {"0": ("language",), "1": ("connector",), "1.5": ("vision", "connector"), "2": EVERYTHING}
LIMIT = 1e-5
# The text of the layout for each number of chunks; borders lie inside the vision encoder wherever
# there are two or more of its layers.
_CUTS = {
    1: "auto",
    2: "v*2|v,c,t*3,h",
    4: "v|v*2|c,t|t*2,h",
    6: "v|v|v|c,t|t|t,h",
    8: "v|v|v|v|c,t|t|t|t,h",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A row of the table.

    Args:
        tensor, pipeline, context, data: sizes of the axes.
        virtual: chunks on each rank of the pipeline.
        sequence: whether activations are shared over the tensor-parallel ranks too.
        vision: how tensor-parallel ranks share the vision encoder.
        everyday: masks that it is tried with when not all of the matrix is asked for.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    virtual: int = 1
    sequence: bool = False
    vision: str = "tensor"
    everyday: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of ``config.schema.Parallel``."""
        return dict(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            context_parallel_size=self.context,
            sequence_parallel=self.sequence,
            vision=self.vision,
            layout=_CUTS[self.pipeline * self.virtual],
            virtual_pipeline_model_parallel_size=self.virtual,
        )

    @property
    def layers(self) -> int:
        """Layers that each part of the model has: as many as the tiny model, or more where there
        are more chunks than these.
        """
        return max(TINY.vision.num_layers, self.pipeline * self.virtual // 2)

    def __str__(self) -> str:
        sizes = {"TP": self.tensor, "PP": self.pipeline, "CP": self.context, "DP": self.data}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        if self.sequence:
            words.append("SP")
        if self.virtual > 1:
            words.append(f"virtual {self.virtual}")
        if self.vision == "data":
            words.append("whole vision layers")
        return " ".join(words)


LAYOUTS = (
    Layout(data=2, everyday=("2",)),
    Layout(tensor=2, everyday=("1.5",)),
    Layout(tensor=2, sequence=True),
    Layout(tensor=2, vision="data", everyday=("2",)),
    Layout(tensor=2, sequence=True, vision="data"),
    Layout(tensor=4),
    Layout(tensor=4, sequence=True, everyday=("2",)),
    Layout(tensor=4, sequence=True, vision="data"),
    Layout(pipeline=2, everyday=("0", "1", "2")),
    Layout(pipeline=4, everyday=("1", "1.5")),
    Layout(context=2, everyday=("2",)),
    Layout(tensor=2, data=2),
    Layout(tensor=2, sequence=True, vision="data", data=2, everyday=("1.5",)),
    Layout(pipeline=2, data=2, everyday=("2",)),
    Layout(context=2, data=2, everyday=("1.5",)),
    Layout(tensor=2, pipeline=2, everyday=("1",)),
    Layout(tensor=2, pipeline=2, sequence=True, everyday=("2",)),
    Layout(tensor=2, pipeline=2, vision="data", everyday=("1.5",)),
    Layout(tensor=2, context=2, sequence=True),
    Layout(tensor=2, context=2, vision="data", everyday=("1.5",)),
    Layout(pipeline=2, context=2, everyday=("1",)),
    Layout(tensor=4, pipeline=2, sequence=True),
    Layout(tensor=4, context=2, sequence=True, vision="data"),
    Layout(tensor=4, data=2),
    Layout(tensor=2, pipeline=4, sequence=True),
    Layout(tensor=2, pipeline=2, context=2, sequence=True, everyday=("2",)),
    Layout(tensor=2, pipeline=2, context=2, sequence=True, vision="data"),
    Layout(tensor=2, pipeline=2, sequence=True, data=2),
    Layout(tensor=2, context=2, sequence=True, data=2),
    Layout(pipeline=4, context=2),
    Layout(pipeline=4, data=2, everyday=("1",)),
    Layout(pipeline=2, context=2, data=2),
    Layout(pipeline=2, virtual=2, everyday=("1",)),
    Layout(pipeline=2, virtual=2, data=2),
    Layout(pipeline=2, virtual=3, everyday=("1.5",)),
    Layout(pipeline=4, virtual=2, everyday=("2",)),
    Layout(tensor=2, pipeline=4, sequence=True, virtual=2),
    Layout(tensor=2, pipeline=2, sequence=True, virtual=2, everyday=("1.5",)),
    Layout(tensor=2, pipeline=2, virtual=2, vision="data"),
    Layout(pipeline=2, context=2, virtual=2, everyday=("1.5",)),
    Layout(tensor=2, pipeline=2, context=2, sequence=True, virtual=2, vision="data"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """How far a layout was from one process: the largest relative differences over ten steps.

    Args:
        layout, ranks, mask: what was compared; the mask by the stage that has it.
        loss, grad_norm: of any step.
        weights: of any weight after the last step, relative to the largest of its tensor.
    """

    layout: str
    ranks: int
    mask: str
    loss: float
    grad_norm: float
    weights: float

    @property
    def largest(self) -> float:
        """The largest of the three."""
        return max(self.loss, self.grad_norm, self.weights)


def asks_for_all() -> bool:
    """Whether all of the matrix is to be run, and its table kept in the documentation."""
    return os.environ.get("MEGAVLM_MATRIX") == "all"


def keep(found: Row) -> None:
    """Take a row into ``docs/benchmarks/layouts.json`` in the place of an older one, and write
    ``docs/layouts.md`` from it.
    """
    path = DOCS / "benchmarks" / "layouts.json"
    rows = {}
    if path.is_file():
        rows = {
            (row["layout"], row["mask"]): Row(**row) for row in json.loads(path.read_text())["rows"]
        }
    rows[found.layout, found.mask] = found
    ordered = [
        rows[key] for layout in LAYOUTS for mask in MASKS if (key := (str(layout), mask)) in rows
    ]
    packages = {name: version(name) for name in ("torch", "megatron-core")} | {
        "python": platform.python_version()
    }
    path.write_text(
        json.dumps({"versions": packages, "rows": [asdict(row) for row in ordered]}, indent=1)
        + "\n"
    )
    (DOCS / "layouts.md").write_text(_page(ordered, packages))


def _page(rows: list[Row], packages: dict[str, str]) -> str:
    lines = [
        "# Every layout trains like one process",
        "",
        (
            "Look up here how closely a parallel layout reproduces training in one process:"
            f" {len({row.layout for row in rows})} layouts with the freeze masks of the stages,"
            f" {len(rows)} pairs."
        ),
        (
            "The figures are the largest relative differences from one process over 10 steps of 4"
            " packs, some without images, in float32:"
        ),
        (
            "the loss, the norm of the gradient, and every parameter after the last step (relative"
            " to the largest of its tensor)."
        ),
        (
            f"A test fails above {LIMIT:.0e}. Measured on a CPU over gloo, with"
            f" {', '.join(f'{name} {number}' for name, number in packages.items())}."
        ),
        "",
        (
            "`MEGAVLM_MATRIX=all bash tests/run.sh tests/ranks/test_layouts.py` runs all pairs and"
            " writes this page; without the variable, a part of them runs."
        ),
        "",
        "| layout | ranks | stage | loss | gradient norm | weights |",
        "|---|--:|---|--:|--:|--:|",
    ]
    return "\n".join(lines + [line(row) for row in rows]) + "\n"


def line(row: Row) -> str:
    """Write a row as the table shows it."""
    return (
        f"| {row.layout} | {row.ranks} | {row.mask} | {row.loss:.1e} | {row.grad_norm:.1e} |"
        f" {row.weights:.1e} |"
    )
