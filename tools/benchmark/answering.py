"""Time answers that grow from keys and values that layers keep, and answers of which every token
takes a pass over whole packs. Weights are fresh, and no answer ends before it is as long as asked.

python examples/quickstart/make_data.py q && python tools/pack_dataset.py --model digits \\
    --jsonl q/mixed_train.jsonl --root q/images --tokenizer q/tokenizer --capacity 1024 \\
    --max_tiles 6 --workers 0 --out q/packs
python tools/benchmark/answering.py --model digits --tasks q/exam.jsonl --packs q/packs \\
    --out docs/benchmarks/answering.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.benchmark.figures import write_figures

if TYPE_CHECKING:  # help should not wait for torch
    from megavlm.config.schema import Config
    from megavlm.evaluate.packs import TaskPacks
    from megavlm.train.job import Job


def longer(task: TaskPacks, answers: Sequence[Sequence[int]]) -> TaskPacks:
    """Return a task whose questions end in the answers so far; they all belong to the prompt."""
    import numpy as np

    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.evaluate.packs import RequestReader, arrange

    requests = tuple(
        dataclasses.replace(
            one,
            tokens=np.append(one.tokens, answer).astype(one.tokens.dtype),
            supervised=np.append(one.supervised, np.zeros(len(answer), bool)),
        )
        for one, answer in zip(task.requests, answers, strict=True)
    )
    manifest = task.packs.manifest
    order = arrange(requests, manifest)
    return dataclasses.replace(
        task,
        requests=requests,
        order=tuple(map(tuple, order)),
        packs=PackedDataset(RequestReader(requests, order, manifest)),
    )


def by_whole_packs(
    job: Job, task: TaskPacks, count: int, progress: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """Answer in ``count`` tokens, each from a pass over the questions and the answers so far."""
    from megavlm.train.generate import generate

    answers: list[list[int]] = [[] for _ in task.requests]
    for _ in range(count):
        found = generate(job, longer(task, answers), 1, progress)
        answers = [answer + new for answer, new in zip(answers, found, strict=True)]
    return answers


def endless(task: TaskPacks, questions: int = 0) -> TaskPacks:
    """Return the first questions of a task, all by default, whose answers never end by
    themselves.
    """
    from megavlm.evaluate.packs import TaskPacks

    class Endless(TaskPacks):
        def is_over(self, tokens: Sequence[int]) -> bool:
            return False

    found = Endless(**vars(task))
    return longer(
        dataclasses.replace(found, requests=task.requests[: questions or None]),
        [()] * len(task.requests[: questions or None]),
    )


def make_job(config: Config, store: Path) -> Job:
    """Build a model with fresh weights, in evaluation mode, in a world of one process.

    Args:
        config: of the model and its packs.
        store: file that the process group uses.
    """
    import torch.distributed as dist

    from megavlm.data.loading.dataset import PackedDataset
    from megavlm.data.loading.order import Plan
    from megavlm.model import weights
    from megavlm.parallel import backend, process_groups
    from megavlm.planner.layout import make_layout
    from megavlm.train.build_model import build_model
    from megavlm.train.job import Job

    device_backend = backend.start(5, store=dist.FileStore(str(store), 1))
    layout = make_layout(config)
    groups = process_groups.create(config.parallel, 0, layout.embedding_chunk)
    built = build_model(
        config,
        layout,
        groups,
        device_backend,
        lambda chunks: weights.fill(chunks, weights.fresh_tensor(config)),
    )
    for chunk in built.ddp_chunks:
        chunk.eval()
    packs = PackedDataset(config.data.train)
    plan = Plan(num_packs=len(packs), seed=0)
    parts = dict(config=config, backend=device_backend, groups=groups)
    return Job(**vars(built), **parts, train=packs, plan=plan, valid=None)


def measure(job: Job, task: TaskPacks, counts: Sequence[int]) -> list[dict[str, float | bool]]:
    """Answer in so many tokens, both ways; return seconds, and whether answers are the same."""
    from megavlm.train.generate import generate

    generate(job, task, 2)  # to warm up
    rows = []
    for count in counts:
        start = time.perf_counter()
        cached = generate(job, task, count)
        middle = time.perf_counter()
        whole = by_whole_packs(job, task, count)
        end = time.perf_counter()
        row = {"tokens": count, "cached_s": round(middle - start, 2)}
        row |= {"whole_packs_s": round(end - middle, 2), "same": cached == whole}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits", help="of the table of models")
    parser.add_argument("--tasks", type=Path, required=True, metavar="FILE", help="one task")
    parser.add_argument("--packs", type=Path, required=True, metavar="DIR")
    parser.add_argument("--questions", type=int, default=48, metavar="N")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import torch

    from megavlm.evaluate.packs import prepare
    from megavlm.evaluate.task import read_task
    from tools.benchmark.cases import Case

    torch.set_num_threads(1)
    task = endless(prepare(read_task(options.tasks), options.packs), options.questions)
    lengths = [len(one.tokens) for one in task.requests]
    facts = {
        "model": options.model,
        "questions": len(lengths),
        "tokens_of_a_question": round(sum(lengths) / len(lengths), 1),
        "tiles": sum(one.tiles for one in task.requests),
        "packs": len(task.order),
    }
    print(json.dumps(facts), flush=True)
    config = Case(model=options.model, stage="2", precision="fp32").config(str(options.packs))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(make_job(config, Path(folder) / "store"), task, options.tokens)
    if options.out:
        write_figures(options.out, facts | {"cases": rows})


if __name__ == "__main__":
    main()
