"""Ask a checkpoint or a Hugging Face folder one question.

python tools/chat.py checkpoints/stage2 "What is in the picture?" --image cat.png
python tools/chat.py my-hf/ "What differs between <image> and <image>?" --image a.png b.png \\
    --packs packs/

Options of pretrain_vlm.py go behind --.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.config.option_types import existing, existing_file
from megavlm.data.records.record import IMAGE_PLACEHOLDER
from tools.evaluation.options import add_options, parse_options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=existing, metavar="DIR", help="what to ask")
    parser.add_argument("question", help="<image> stands for an image")
    parser.add_argument(
        "--image",
        nargs="+",
        default=[],
        type=existing_file,
        metavar="FILE",
        help="pictures, in the order of the question's <image>",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, if not the template's")
    add_options(parser, max_new_tokens=64)
    (options, others) = parse_options(parser, arguments)
    shown = options.question.count(IMAGE_PLACEHOLDER)
    # One image without a placeholder goes in front.
    if shown != len(options.image) and (shown or len(options.image) > 1):
        parser.error(
            f"argument --image: names {len(options.image)} pictures, but the question has"
            f" {IMAGE_PLACEHOLDER} {shown} times; write it where each picture stands"
        )
    # Only now: help and mistakes on the command line should not wait for torch.
    from megavlm.evaluate.run import answer_with

    row = dict(question=options.question, image=[str(path.resolve()) for path in options.image])
    row |= dict(answer="") if options.system is None else dict(answer="", system=options.system)
    with tempfile.TemporaryDirectory(prefix="megavlm-chat-") as folder:
        task = Path(folder) / "question.jsonl"
        task.write_text(json.dumps(row) + "\n", encoding="utf-8")
        try:
            answered = answer_with(
                options.model,
                [task],
                Path(folder),
                packs=options.packs,
                max_new_tokens=options.max_new_tokens,
                ranks=options.ranks,
                others=others,
                is_quiet=True,
            )
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for rows in answered.rows.values():  # several with --eval.shots
        print(rows[0]["prediction"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
