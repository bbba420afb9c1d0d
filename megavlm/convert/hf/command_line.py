"""The command line of ``tools/convert_checkpoint.py``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from megavlm.config.exports import HOLDS
from megavlm.config.option_types import existing

_EXAMPLE = """examples:
  python tools/convert_checkpoint.py import --hf InternVL2_5-1B-hf/ --out checkpoints/start
  python tools/convert_checkpoint.py export --load checkpoints/stage2 --out my-hf/ --dtype bfloat16
  python tools/convert_checkpoint.py export --load checkpoints/stage2 --out my-model/ --dialect chat
  python tools/convert_checkpoint.py import --hf InternVL3_5-8B-HF/ --out moe --upcycle_experts 8
  python tools/convert_checkpoint.py check --hf InternVL2_5-1B-hf/

Training also starts from a Hugging Face folder itself: --checkpoint.load DIR.
"""
DTYPES = ("bfloat16", "float16", "float32")
SHARD_SIZE = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_import(commands.add_parser("import", help="make a checkpoint of a Hugging Face folder"))
    exporter = commands.add_parser("export", help="make a Hugging Face folder of a checkpoint")
    _add_export(exporter)
    _add_upload(exporter)
    check = commands.add_parser(
        "check", help="convert a Hugging Face folder there and back, and compare"
    )
    check.add_argument(
        "--hf",
        metavar="DIR",
        required=True,
        type=existing,
        help="Hugging Face folder, or id in the hub's cache",
    )
    args = parser.parse_args(arguments)
    if wrong := "; ".join(_without_effect(args)):
        parser.error(wrong)
    return args


def _without_effect(args: argparse.Namespace) -> Iterator[str]:
    """Yield the options that do not go with the others."""
    if args.command == "import":
        for name in ("topk", "seed"):
            if vars(args)[f"upcycle_{name}"] is not None and args.upcycle_experts is None:
                yield f"--upcycle_{name}: no effect without --upcycle_experts"
        if args.upcycle_experts is not None and args.peft:
            yield (
                f"--upcycle_experts {args.upcycle_experts}: the adapters of --peft are of a dense"
                " model; export them merged, and upcycle that"
            )
    elif args.command == "export":
        if args.private and not args.push_to_hub:
            yield "--private: no effect without --push_to_hub; leave it out"
        names = ("dialect", "dtype", "tokenizer", "vision", "license")
        unread = [f"--{name}" for name in names if vars(args)[name]]
        unread += ["--max_shard_size"] if args.max_shard_size != SHARD_SIZE else []
        if args.peft and unread:
            yield f"{', '.join(unread)}: no effect with --peft; leave it out"


def _add_import(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``import``."""
    parser.add_argument(
        "--hf",
        metavar="DIR",
        required=True,
        type=existing,
        help="Hugging Face folder, in any dialect, or the id of a model in the hub's cache",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="folder of the checkpoint to make; must be missing or empty",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        default="",
        type=existing,
        help="folder of the tokenizer, if the model's own is Python code",
    )
    parser.add_argument(
        "--peft",
        metavar="DIR",
        default="",
        type=existing,
        help="folder of LoRA adapters of that model, by PEFT",
    )
    _add_upcycling(parser)


def _add_upcycling(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``import`` that make a mixture of experts."""
    parser.add_argument(
        "--upcycle_experts",
        metavar="N",
        type=int,
        help="put this many copies of each MLP of a dense language model into a mixture of experts,"
        " with random routers; its logits are those of the dense model",
    )
    parser.add_argument(
        "--upcycle_topk", metavar="K", type=int, help="experts that each token takes (default: 2)"
    )
    parser.add_argument(
        "--upcycle_seed", metavar="SEED", type=int, help="of the random routers (default: 0)"
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export``."""
    parser.add_argument(
        "--load",
        metavar="DIR",
        required=True,
        type=existing,
        help="folder of one step, or a run's save folder (then its newest)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="Hugging Face folder to make; must be missing or empty",
    )
    parser.add_argument(
        "--dialect",
        choices=tuple(HOLDS),
        help="class: InternVLForConditionalGeneration (native), InternVLChatModel (chat), CLIPModel"
        " (clip), LlavaForConditionalGeneration (llava), ... (default: that of the recipe)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights (default: as in the checkpoint)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        default="",
        type=existing,
        help="folder of the tokenizer, if the checkpoint has none",
    )
    parser.add_argument(
        "--vision",
        metavar="DIR",
        default="",
        type=existing,
        help="folder of the vision encoder that the model started from, if the checkpoint lacks the"
        " weights of it that LlavaForConditionalGeneration has and training does not use",
    )
    parser.add_argument(
        "--license",
        metavar="[PART=]NAME",
        action="append",
        default=[],
        help="licence for the model card, of the model or of a part: vision, language, data;"
        " repeatable",
    )
    _add_form(parser)


def _add_form(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export`` that say which weights are written, and how."""
    parser.add_argument(
        "--peft",
        metavar="BASE",
        default="",
        help="write the LoRA adapters alone, in PEFT's format, for the model in the Hugging Face"
        " folder BASE that they were trained on; otherwise they are merged into the weights",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="write the moving averages of the parameters, of a run with --ema.decay",
    )
    parser.add_argument(
        "--max_shard_size",
        metavar="SIZE",
        default=SHARD_SIZE,
        help="largest file of weights, such as 500MB; a larger tensor gets a file of its own"
        " (default: 5GB)",
    )


def _add_upload(parser: argparse.ArgumentParser) -> None:
    """Add the options of uploads."""
    parser.add_argument(
        "--push_to_hub",
        metavar="OWNER/NAME",
        default="",
        help="upload the folder to this repository of the hub, which is made if it is missing",
    )
    parser.add_argument(
        "--private", action="store_true", help="make the repository of --push_to_hub a private one"
    )


def read_size(text: str) -> int:
    """Return the bytes that a size such as ``5GB`` means.

    Raises:
        ValueError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B)?", text.strip())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise ValueError(f"--max_shard_size {text}: must be bytes, or a number with KB, MB or GB")
    return size
