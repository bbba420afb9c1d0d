"""Ask a checkpoint or a Hugging Face folder one question.

python tools/chat.py checkpoints/stage2 "What is in the picture?" --image cat.png
python tools/chat.py my-hf/ "What differs between <image> and <image>?" --image a.png b.png \\
    --packs packs/
python tools/chat.py checkpoints/stage2 "What happens?" --video a.mp4 --frames 8

Options of pretrain_vlm.py go behind --.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.config.option_types import existing, existing_file, existing_path
from megavlm.data.records.record import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from tools.evaluation.options import add_options, parse_options


def _parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=existing, metavar="DIR", help="what to ask")
    parser.add_argument("question", help="<image> stands for an image, <video> for a video")
    parser.add_argument(
        "--image",
        nargs="+",
        default=[],
        type=existing_file,
        metavar="FILE",
        help="pictures, in the order of the question's <image>",
    )
    parser.add_argument(
        "--video",
        nargs="+",
        default=[],
        type=existing_path,
        metavar="PATH",
        help="videos or folders of frames, in the order of the question's <video>",
    )
    parser.add_argument("--frames", type=int, metavar="N", help="most frames of a video (16)")
    parser.add_argument("--system", metavar="TEXT", help="system message, if not the template's")
    add_options(parser, max_new_tokens=64)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options, others = parse_options(parser, arguments)
    for flag, placeholder, named in (
        ("--image", IMAGE_PLACEHOLDER, options.image),
        ("--video", VIDEO_PLACEHOLDER, options.video),
    ):
        shown = options.question.count(placeholder)
        # One without a placeholder goes in front.
        if shown != len(named) and (shown or len(named) > 1):
            parser.error(
                f"argument {flag}: names {len(named)} files, but the question has {placeholder}"
                f" {shown} times; write it where each one stands"
            )
    if options.frames is not None and not options.video:
        parser.error(f"argument --frames: {options.frames} has no effect without --video")
    # Only now: help and mistakes on the command line should not wait for torch.
    from megavlm.evaluate.run import AnswerOptions, answer_with

    asked = AnswerOptions(
        packs=options.packs,
        max_new_tokens=options.max_new_tokens,
        ranks=options.ranks,
        others=others,
        is_quiet=True,
    )
    row = dict(question=options.question, answer="")
    row |= dict(image=[str(path.resolve()) for path in options.image])
    row |= dict(video=[str(path.resolve()) for path in options.video])
    row |= {} if options.frames is None else dict(frames=options.frames)
    row |= {} if options.system is None else dict(system=options.system)
    with tempfile.TemporaryDirectory(prefix="megavlm-chat-") as folder:
        task = Path(folder) / "question.jsonl"
        task.write_text(json.dumps(row) + "\n", encoding="utf-8")
        try:
            answered = answer_with(options.model, [task], Path(folder), asked)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for rows in answered.rows.values():  # several with --eval.shots
        print(rows[0]["prediction"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
