"""The same model as ``transformers`` computes it, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megavlm.convert.hf.hub_formats import hub_format_of
from megavlm.convert.hf.json_files import class_of_transformers
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.data.images.anyres import grids_text
from megavlm.data.loading.batch import Instructions
from megavlm.data.store.manifest import Manifest


def instruction_inputs(instructions: Instructions | None, tiles: slice) -> dict[str, Tensor]:
    """Return what ``InstructBlipForConditionalGeneration`` reads beside tiles of a pack; nothing
    if there are none, or no instructions.
    """
    if instructions is None or not len(instructions.tokens[tiles]):
        return {}
    tokens = instructions.tokens[tiles]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    real = places < instructions.lengths[tiles, None]
    return {"qformer_input_ids": tokens, "qformer_attention_mask": real.long()}


def size_inputs(model: nn.Module, sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Return what ``LlavaNextForConditionalGeneration`` and
    ``LlavaOnevisionForConditionalGeneration`` read beside the tiles of a sample's images: their
    widths and heights, the other way round; nothing for other classes, or without images.
    """
    kind = model.config.model_type
    if kind not in ("llava_next", "llava_onevision") or not len(sizes):
        return {}
    device = next(model.parameters()).device
    found = {"image_sizes": torch.tensor([(height, width) for width, height in sizes]).to(device)}
    if kind == "llava_onevision":
        found["batch_num_images"] = torch.tensor([len(sizes)]).to(device)
    return found


def refuse_other_tiles(flag: str, packs: Manifest, folder: Path) -> None:
    """Raise ValueError if the tiles of packs with images are not those that the model of a Hugging
    Face folder reads; ``flag`` names the packs.
    """
    if not packs.totals.tiles:
        return
    architecture = architecture_from_hf(folder)
    for name, packed, needed in (
        ("pixels a side", packs.image_size, architecture.vision.image_size),
        ("image tokens", packs.features_per_tile, architecture.placeholders_per_tile),
    ):
        if packed != needed:
            raise ValueError(
                f"{flag}: has tiles of {packed} {name}, and the model's have {needed}; name packs"
                " that the model was trained on"
            )
    usage = hub_format_of(folder).read_usage(folder)
    grids = usage.grids
    is_same = packs.grids == grids and packs.tiling == usage.tiling
    if is_same or not (packs.grids or grids):  # no image has a grid
        return
    of_packs = f"{flag}: packs of --tiling {packs.tiling}"
    if packs.grids:
        of_packs += f" --grids {grids_text(packs.grids)}"
    if not grids:
        raise ValueError(
            f"{of_packs}, and {folder} makes other tiles; name packs of another --tiling"
        )
    raise ValueError(
        f"{of_packs}, and {folder} makes a grid of tiles of an image; name packs of --tiling"
        f" {usage.tiling} --grids {grids_text(grids)}"
    )


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load the model of a Hugging Face folder in the class of its format, such as
    ``InternVLForConditionalGeneration``, ready to be called, on the CPU.

    Raises:
        ValueError: there is no such model, or it is in the chat dialect, which transformers does
            not read by itself.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no Hugging Face model is there (config.json is missing)")
    row = hub_format_of(folder)
    if not row.is_in_transformers:
        raise ValueError(
            f"{folder}: in the format of {row.class_name}, which transformers does not read by"
            " itself; export it with another --dialect, such as native, if that holds the model"
        )
    form = class_of_transformers(row.class_name)
    # One expert after the other: torch multiplies groups of 16 bits in multiples of 16 bytes alone.
    options = dict(dtype=dtype, local_files_only=True, experts_implementation="eager")
    return form.from_pretrained(folder, **options).eval()
