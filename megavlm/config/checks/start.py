"""Cross checks of the parts that a run starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megavlm.config.exports import HOLDS
from megavlm.config.gone_folders import has_steps
from megavlm.config.recipes import recipe
from megavlm.config.schema import Config


def problems(config: Config) -> Iterator[str]:
    """Everything about parts that cannot be, and exports that the recipe's format cannot hold;
    each names the flag to change.
    """
    init = config.init
    load = config.checkpoint.load
    export = config.checkpoint.export_hf
    for name, folder in vars(init).items():
        # A run that resumes its own checkpoint does not need what it began with.
        if folder and not has_steps(config.checkpoint.save) and not Path(folder).is_dir():
            yield f"--init.{name} {folder}: no such folder"
    if init.tokenizer and not init.language:
        yield f"--init.tokenizer {init.tokenizer} needs --init.language, whose tokenizer it is"
    if init.text and not init.connector:
        yield f"--init.text {init.text} needs --init.connector, the Q-Former that lacks it"
    for part, folder in init.parts.items():
        if load:
            yield (
                f"--init.{part} {folder} and --checkpoint.load {load} both say where weights come"
                " from; give one of them"
            )
    if export:
        form = recipe(config.recipe).format_for(config.architecture)
        for reason in HOLDS[form](config.architecture):
            yield f"--checkpoint.export_hf {export}: {reason}"
