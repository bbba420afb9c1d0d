#!/usr/bin/env python3
"""Write the tokenizer of a language model with InternVL's nine special tokens, as a run with
--init.language uses it.

python tools/extend_tokenizer.py --init.language Qwen2.5-0.5B-Instruct --out tokenizer

tools/pack_dataset.py adds the tokens by itself too; a folder made here and the language model's own
give the same packs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.config.option_types import existing
from megavlm.data.text.chat_tokens import DEFAULT
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import (
    extend,
    fingerprint,
    first_tokens,
    load_tokenizer,
    save_tokenizer,
)
from megavlm.io.atomic import new_folder


def main() -> int:
    """Run the tool; 2 with a message where the input is at fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--init.language",
        "--hf",
        dest="language",
        required=True,
        metavar="DIR",
        type=existing,
        help="folder of the language model, or of its tokenizer; or an id in the hub's cache",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        type=Path,
        help="folder to make; must be missing or empty",
    )
    options = parser.parse_args()
    try:
        tokenizer = load_tokenizer(options.language, "--init.language")
        new = extend(tokenizer)
        tokenizer.chat_template = chat_format(DEFAULT).hf_template(
            bos=bool(first_tokens(tokenizer))
        )
        with new_folder(options.out, "--out") as growing:
            save_tokenizer(tokenizer, growing)
    except (ValueError, OSError) as error:
        print(f"extend_tokenizer: error: {error}", file=sys.stderr)
        return 2
    added = (
        f"{len(new)} tokens added, {new[0]} to {new[-1]}" if new else "it has all tokens already"
    )
    print(
        f"{options.out}: {added}; ids up to {max(tokenizer.get_vocab().values())}, fingerprint"
        f" {fingerprint(tokenizer)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
