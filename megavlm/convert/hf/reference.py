"""The same model as ``transformers`` computes it, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavlm.convert.hf.hub_formats import hub_format_of
from megavlm.convert.hf.json_files import class_of_transformers
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.qwen_vl_kinds import KINDS
from megavlm.data.images.anyres import grids_text
from megavlm.data.images.feature_layout import Tiled, is_joined
from megavlm.data.images.native import PAIR
from megavlm.data.loading.batch import BatchOptions, Instructions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.store.manifest import Manifest


def shown_pixels(dataset: PackedDataset, pack_id: int) -> Tensor:
    """Return the pixels of the tiles of a pack, those of an image row by row: uint8 [I, 3, S, S],
    or of tiles of images that keep their size [I, 2, 3, S, S], the two frames that such a tile
    shows. An image is shown twice.
    """
    if dataset.manifest.tiling != "native":
        return dataset.batch(pack_id, pack_id).tiles
    batch = dataset.batch(pack_id, pack_id, BatchOptions(spans_tiles=True))
    frames = batch.tiles[:, None].repeat(1, PAIR, 1, 1, 1)
    if batch.images.pairs is not None:
        frames[batch.images.pairs, 1] = batch.images.second_frames
    return frames


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


def tile_inputs(
    model: nn.Module, pixels: Tensor, images: Sequence[Tiled], tokens: Tensor
) -> dict[str, Tensor]:
    """Return what a class reads of the tiles of a sample; nothing if there are none.

    Args:
        model: of transformers.
        pixels: of the tiles, normalised, as ``shown_pixels`` has them or as the class reads them;
            those of an image row by row.
        images: of the sample, and frames.
        tokens: of the sample [t].
    """
    if not len(pixels):
        return {}
    if model.config.model_type in KINDS:
        return _patch_inputs(model.config, pixels, images, tokens)
    return {"pixel_values": pixels} | _size_inputs(model, images)


def _patch_inputs(
    config: Any, pixels: Tensor, images: Sequence[Tiled], tokens: Tensor
) -> dict[str, Tensor]:
    """Return what the classes of Qwen2-VL and its successors read of tiles [n, 2, 3, S, S]: their
    patches [patches, 3 * 2 p p], as their image processor makes them of patches of p pixels, the
    patches along the sides of each image, and which tokens are of images.
    """
    size = config.vision_config.patch_size
    side = config.vision_config.spatial_merge_size
    squares = pixels.unflatten(4, (side, size)).unflatten(3, (side, size))
    # [n, row, column, channel, frame, row and column of a pixel]
    patches = squares.permute(0, 3, 5, 2, 1, 4, 6)
    grids = [(1, image.rows * side, image.columns * side) for image in images if image.tiles]
    return {
        "pixel_values": patches.flatten(3).flatten(0, 2),
        "image_grid_thw": torch.tensor(grids, device=pixels.device),
        "mm_token_type_ids": (tokens == config.image_token_id).int()[None],
    }


def _size_inputs(model: nn.Module, images: Sequence[Tiled]) -> dict[str, Tensor]:
    """Return what ``LlavaNextForConditionalGeneration`` and
    ``LlavaOnevisionForConditionalGeneration`` read beside the tiles of a sample's images, which are
    no frames of videos: heights and widths; nothing for other classes, or without images.
    """
    kind = model.config.model_type
    stills = [image for image in images if not is_joined(image)]
    if kind not in ("llava_next", "llava_onevision") or not stills:
        return {}
    device = next(model.parameters()).device
    sizes = [(image.height, image.width) for image in stills]
    found = {"image_sizes": torch.tensor(sizes, device=device)}
    if kind == "llava_onevision":
        found["batch_num_images"] = torch.tensor([len(stills)], device=device)
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
