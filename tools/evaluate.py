"""Answer tasks with checkpoints or Hugging Face folders, and compare the models.

python tools/evaluate.py checkpoints/stage2 my-hf/ --tasks exam.jsonl --packs packs/ --out evaluated
python tools/evaluate.py checkpoints/stage2 --tasks a.jsonl b.jsonl --out evaluated --ranks 8 -- \\
    --parallel.tensor_model_parallel_size 2

OUT/summary.json has the figures, OUT/index.html the pictures, questions and answers. The same
command again leaves alone what is done. Options of pretrain_vlm.py go behind --.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.config.option_types import count_from, existing_file, existing_named
from tools.evaluation.options import add_options, parse_options


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the tool's options, and those of pretrain_vlm.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="+", type=existing_named, metavar="[NAME=]DIR", help="what to evaluate"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        type=existing_file,
        metavar="FILE",
        help="questions with their answers, a JSON object a line (docs/evaluation.md)",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder of the figures and pages; made if it is missing",
    )
    add_options(parser, max_new_tokens=16)
    parser.add_argument(
        "--transformers",
        action="store_true",
        help="let transformers answer with Hugging Face folders, and not the trainer",
    )
    parser.add_argument(
        "--shown",
        type=count_from(0),
        default=200,
        metavar="N",
        help="questions of a task on the page (default: %(default)s)",
    )
    return parse_options(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options, others = parse(arguments)
    # Only now: help and mistakes on the command line should not wait for torch.
    from megavlm.evaluate.page import table_lines, write_page
    from megavlm.evaluate.run import AnswerOptions, answer_with_all, is_hub_folder

    asked = AnswerOptions(
        packs=options.packs,
        max_new_tokens=options.max_new_tokens,
        ranks=options.ranks,
        others=others,
        by_transformers=options.transformers,
    )
    try:
        if options.transformers and not any(map(is_hub_folder, options.models)):
            raise ValueError("--transformers: no model is a Hugging Face folder; leave it out")
        answered = answer_with_all(options.models, options.tasks, options.out, asked)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table_lines(answered)))
    summary = {model.model: model.figures for model in answered}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_page(options.out / "index.html", answered, options.shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
