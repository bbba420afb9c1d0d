"""Choose a parallel layout: list every layout that fits into memory, with its predicted memory,
communication and step time, the fastest first; or predict them for one layout (--layout).

python tools/plan_parallel.py --model internvl2_5-78b --stage 2 --gpus 512 --memory_gib 80
python tools/plan_parallel.py --model internvl2_5-8b --stage 1 --gpus 64 --data packs/train \\
    --picture chunks.png
python tools/plan_parallel.py --recipe llava --stage 2 --gpus 8
python tools/plan_parallel.py --model InternVL2_5-8B/ --stage 2 --gpus 64 --layout \\
    '--parallel.tensor_model_parallel_size 4 --parallel.sequence_parallel true'
python tools/plan_parallel.py --model internvl2_5-8b --stage 2 --gpus 8 \\
    --architecture.lora.rank 16 --training.trainable connector --training.drop_path 0

Options that are not listed below are those of pretrain_vlm.py, --config FILE too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.config.schema import Config
from megavlm.planner import search
from megavlm.planner.estimate import Estimate, Hardware, Packs
from megavlm.planner.report import draw, options_to_text, to_text
from tools.planning.layouts import alignment_note, judge
from tools.planning.options import (
    make_parser,
    number_problems,
    read_config,
    read_hardware,
    read_packs,
    unread,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options, others = make_parser(__doc__ or "").parse_known_args(arguments)
    try:
        if wrong := [*number_problems(options), *unread(options)]:
            raise ValueError("\n  ".join(wrong))
        config = read_config(options, others)
        packs = read_packs(options, config)
        hardware = read_hardware(options)
        print(
            f"{options.model or config.recipe}, stage {options.stage}, {options.gpus} GPUs,"
            f" {config.training.global_batch_size} packs a step, each of {packs.capacity}"
        )
        if options.layout is None:
            found = search.find_layouts(config, options.gpus, packs, hardware)
            shown = search.without_recompute_variants(found)[: options.top]
            fit = f"{len(found)} layouts fit into nine tenths of {hardware.memory_gib:g} GiB"
        else:
            found = [judge(config, options.gpus, packs, hardware)]
            shown = found
            fits = "fits" if found[0].fits(hardware) else "does NOT fit"
            fit = f"the layout {fits} into nine tenths of {hardware.memory_gib:g} GiB"
        has_experts = config.architecture.language.num_experts > 0
        print(f"{fit}\n\n{to_text(shown, has_experts)}\n")
        _explain(config, found[0], options.gpus, packs, hardware)
        if options.json:
            rows = [dataclasses.asdict(one) | {"memory_gib": one.memory_gib} for one in found]
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if options.picture:
            draw(shown, options.picture)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _explain(config: Config, first: Estimate, gpus: int, packs: Packs, hardware: Hardware) -> None:
    """Print what changes the first layout, and how to ask for it."""
    changed = search.estimate_changes(config, first, gpus, packs, hardware)
    flags = [search.to_flags(first)]
    if config.training.kernels == "local":  # asked for, or all that can compute the model
        flags.append("--training.kernels local")
    print(
        "the first, with one option changed at a time:\n"
        f"{options_to_text(changed, hardware)}\n\n"
        f"to use the first:\n{' '.join(filter(None, flags)) or 'no option of --parallel'}"
    )
    if note := alignment_note(first.parallel, packs.alignment):
        print(note)


if __name__ == "__main__":
    sys.exit(main())
