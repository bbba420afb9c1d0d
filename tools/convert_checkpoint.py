"""Move a model between Hugging Face folders and the checkpoints of training. `COMMAND --help` tells
how.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.convert.hf.command_line import parse
from megavlm.io.full_disk import in_words


def main() -> int:
    """Run the tool; 0 where it went well, 1 where a check found a difference, 2 with a message
    where the input is at fault.
    """
    args = parse(__doc__)
    # Only now: help and mistakes on the command line should not wait for torch.
    from megavlm.convert.hf.asked import run

    try:
        return run(args)
    except (ValueError, OSError) as error:
        said = in_words(error, "--out", vars(args).get("out"))
        print(f"convert_checkpoint: error: {said}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
