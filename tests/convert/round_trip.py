"""A folder of transformers, imported and exported again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megavlm.config.cli import from_yaml
from megavlm.config.schema import Architecture
from megavlm.convert.hf import convert
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.data.text.tokenizer import add_special_tokens, load_tokenizer
from tests.convert.models import load_all

GOLDEN = Path(__file__).parents[1] / "golden" / "llava_tokenizer"


def golden_words(folder: Path, image_tokens: str) -> int:
    """Write LLaVA's golden tokenizer with the tokens of images of a row of ``IMAGE_TOKEN_SETS``;
    return how many it lacked.
    """
    tokenizer = load_tokenizer(GOLDEN)
    added = add_special_tokens(tokenizer, image_tokens)
    tokenizer.save_pretrained(folder)
    return added


def assert_round_trip(
    source: Path,
    folder: Path,
    words: Path,
    architecture: Architecture,
    recipe: str,
    name_on_disk: Callable[[str], str | None] = str,
) -> dict[str, Tensor]:
    """Import a folder, export it again, and see that nothing has changed.

    Args:
        source: Hugging Face folder.
        folder: where the checkpoint and the export go.
        words: folder of the tokenizer.
        architecture: of the model.
        recipe: that the checkpoint belongs to.
        name_on_disk: gives the name in files of the export for a name in the source.

    Returns:
        The tensors of the export.
    """
    checkpoint = convert.import_(source, folder / "checkpoint", tokenizer=words)
    config = from_yaml(checkpoint / "config.yaml")
    assert config.architecture == architecture and config.recipe == recipe
    out = convert.export(checkpoint, folder / "out")
    before = {name_on_disk(name): tensor for name, tensor in load_all(source).items()}
    after = load_all(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name
    assert architecture_from_hf(out) == architecture
    return after
