"""One case in a process of its own, which `runner.py` starts.

It imports all it needs, waits for a line on standard input, measures, and writes a JSON file.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone needs no installation

from tools.benchmark.cases import OURS, all_cases, smoke_cases


def main(name: str, folder: str, out: str, settings: str) -> None:
    """Measure the case ``name`` on the packs in ``folder``; ``settings`` are those of
    ``runner.Settings`` as JSON.
    """
    case = next(case for case in [*all_cases(), *smoke_cases()] if case.name == name)
    chosen = json.loads(settings)
    if case.implementation == OURS:
        from tools.benchmark.trainer import Trainer as Session
    else:
        from tools.benchmark.peer import Peer as Session
    from megavlm.data.loading.dataset import PackedDataset
    from tools.benchmark.measure import measure
    from tools.benchmark.packs import fullest

    packs = PackedDataset(Path(folder))
    # So far no device was touched: another case may still be running.
    print("ready", flush=True)
    if not sys.stdin.readline():
        return  # whoever started this process is gone
    began = time.perf_counter()
    ids = fullest(packs, chosen["packs"])
    session = Session(case, packs, ids, chosen["workers"])
    built = time.perf_counter()
    figures = measure(
        session, case, packs, ids, steps_s=chosen["steps_s"], peak_tflops=chosen["peak_tflops"]
    )
    figures |= {
        "build_s": round(built - began, 2),
        "measure_s": round(time.perf_counter() - built, 2),
    }
    Path(out).write_text(json.dumps(figures))
    session.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
