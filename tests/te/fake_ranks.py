"""Runs the real step as each rank of some layouts, on CUDA devices that are not there, and
prints what would go wrong, as ``fake_step`` does for one rank. ``test_fake_ranks`` starts it.
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import Any

from megavlm.config.schema import Fp8
from tests.ranks.runs import EVERYTHING
from tests.te import fake_cuda
from tests.te.fake_step import Reader, Stray, measure, prepare

ALIGNMENT = 8
TP2 = dict(tensor_model_parallel_size=2)
SP = TP2 | dict(sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
CP2 = dict(context_parallel_size=2)
FP8 = dict(fp8=Fp8(vision="tensorwise", language="tensorwise"))
CUT = dict(layout="v*2|v,c,t*3,h")
# Letters of a layout's text that stand for a part.
LETTERS = {"vision": "v", "connector": "c", "language": "th"}
PACKS = 6
# Number of ranks and settings.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TP2),
    "TP2 with SP": (2, SP),
    "TP2 with SP, replicated vision encoder": (2, SP | dict(vision="data")),
    "TP2 with SP, recompute full": (2, SP | dict(recompute="full", drop_path=0.3)),
    "TP2 with SP, fp8": (2, SP | FP8),
    "DP2": (2, {}),
    "DP2, connector": (2, dict(trainable=("connector",))),
    "PP2": (2, PP2 | dict(layout="v*3,c,t|t*2,h")),
    "PP2, boundary in the vision encoder": (2, PP2 | CUT),
    "PP2, boundary in the frozen vision encoder": (
        2,
        PP2 | CUT | dict(trainable=("connector",)),
    ),
    "PP3": (3, dict(pipeline_model_parallel_size=3, layout="v*2|v,c,t|t*2,h")),
    "PP3, connector": (
        3,
        dict(pipeline_model_parallel_size=3, layout="v*2|v,c,t|t*2,h", trainable=("connector",)),
    ),
    "PP2, interleaved": (
        2,
        PP2 | dict(virtual_pipeline_model_parallel_size=2, layout="v|v*2|c,t|t*2,h"),
    ),
    "PP3, interleaved": (
        3,
        dict(
            pipeline_model_parallel_size=3,
            virtual_pipeline_model_parallel_size=2,
            layout="v|v|v|c,t|t|t,h",
        ),
    ),
    "PP2, interleaved, connector": (
        2,
        PP2
        | dict(
            virtual_pipeline_model_parallel_size=2,
            layout="v|v*2|c,t|t*2,h",
            trainable=("connector",),
        ),
    ),
    "CP2": (2, CP2),
    "CP2, fp8": (2, CP2 | FP8),
    "CP4": (4, dict(context_parallel_size=4)),
    "TP2 x CP2 x PP2 with SP": (8, SP | CP2 | PP2 | CUT),
    "TP2 x PP2 x DP2, replicated vision encoder": (8, SP | PP2 | CUT | dict(vision="data")),
}


def let_others_train(settings: dict[str, Any]) -> None:
    """Let the other ranks say what they train, and in which chunk that begins."""
    from megavlm.model import freeze

    parts = settings.get("trainable", EVERYTHING)
    letters = "".join(LETTERS[part] for part in parts)
    chunks = settings.get("layout", "vcth").split("|")
    first = next(number for number, text in enumerate(chunks) if set(letters) & set(text))
    told = (set(parts), {first: {f"{parts[0]}.first": (1, True)}})

    def all_gather_object(found: list[Any], own: Any, group: Any) -> None:
        found[:] = [own] + [told] * (len(found) - 1)

    freeze.dist = types.SimpleNamespace(all_gather_object=all_gather_object)


def main() -> None:
    """Run every rank of every layout, and two planted faults."""
    from tests.gpu.models import SMALL
    from tests.te.numbers import make_packs

    folder = make_packs(SMALL.features_per_tile, ALIGNMENT)
    waits = prepare()
    found: dict[str, list[dict[str, Any]]] = {}
    for name in sys.argv[2:] or LAYOUTS:
        (ranks, settings) = LAYOUTS[name]
        found[name] = []
        for rank in range(ranks):
            fake_cuda.join(rank, ranks)
            let_others_train(settings)
            told = measure(folder, waits, settings, packs_a_step=PACKS)
            found[name].append(told | {"exchanges": list(fake_cuda.exchanges.lines)})
    fake_cuda.join(1, 2)
    let_others_train({})
    found["planted wait"] = [measure(folder, waits, SP, [Reader()])]
    found["planted mismatch"] = [measure(folder, waits, SP, [Stray()])]
    json.dump(found, os.fdopen(int(sys.argv[1]), "w"))


if __name__ == "__main__":
    main()
