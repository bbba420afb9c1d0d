"""The same model as ``transformers`` computes it, to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megavlm.convert.hf.hub_formats import hub_format_of
from megavlm.convert.hf.json_files import class_of_transformers
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.qwen_vl_kinds import KINDS
from megavlm.data.images.anyres import grids_text
from megavlm.data.images.feature_layout import (
    FeatureLayout,
    Tiled,
    images_in_text,
    is_joined,
    sizes_in_text,
)
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


def tile_inputs(
    model: nn.Module, pixels: Tensor, images: Sequence[Tiled], tokens: Tensor
) -> dict[str, Tensor]:
    """Return what a class reads of the tiles of a sample; nothing if there are none.

    Args:
        model: of transformers.
        pixels: of the tiles, normalised, [n, 3, S, S] or as the class reads them; those of an image
            row by row.
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
    """Return what the classes of Qwen2-VL and its successors read of tiles: their patches [patches,
    3 f p p], as their image processor makes them for f frames of patches of p pixels, the patches
    along the sides of each image, and which tokens are of images.
    """
    vision = config.vision_config
    size = vision.patch_size
    side = vision.spatial_merge_size
    squares = pixels.unflatten(3, (side, size)).unflatten(2, (side, size))
    patches = squares.permute(0, 2, 4, 1, 3, 5)[:, :, :, :, None]
    frames = patches.expand(-1, -1, -1, -1, vision.temporal_patch_size, -1, -1)
    grids = [(1, image.rows * side, image.columns * side) for image in images]
    return {
        "pixel_values": frames.flatten(3).flatten(0, 2),
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


@torch.no_grad()
def with_videos(
    model: nn.Module, inputs: Mapping[str, Tensor], images: Sequence[Tiled], layout: FeatureLayout
) -> dict[str, Any]:
    """Return what ``LlavaOnevisionForConditionalGeneration`` reads of a sample with videos, whose
    tokens and pixels are apart there from those of images.

    Args:
        model: of transformers, of any class.
        inputs: its inputs as if frames were images, with the tokens of one sample [1, n].
        images: images and frames of the sample.
        layout: of their features.
    """
    if not any(map(is_joined, images)):
        return dict(inputs)
    config = model.config
    tokens = inputs["input_ids"].clone()
    taken = {-1, *tokens[0].tolist()}
    # The tokenizer has none, or the text holds it: any that the sample lacks.
    if config.video_token_id in taken:
        config.video_token_id = min(set(range(len(taken))) - taken)
    tiles, shown = sizes_in_text(images, layout)
    are_videos = [is_joined(group[0]) for group in images_in_text(images)]
    of_videos = np.repeat(are_videos, [one.features for one in shown])
    places = (tokens[0] == config.image_token_id).nonzero()[:, 0]
    tokens[0, places[torch.from_numpy(of_videos)]] = config.video_token_id
    found: dict[str, Any] = dict(inputs, input_ids=tokens)
    pixels = list(zip(are_videos, found.pop("pixel_values").split(tiles), strict=True))
    clips = [own[None] for is_video, own in pixels if is_video]
    stills = [own for is_video, own in pixels if not is_video]
    if stills:
        found["pixel_values"] = torch.cat(stills)
    if len({clip.shape for clip in clips}) == 1:
        return found | {"pixel_values_videos": torch.cat(clips)}
    # Of unlike lengths: they are no tensor, but their features are. Imported only now, since it
    # takes seconds.
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    features = [model.get_video_features(clip).pooler_output for clip in clips]
    outputs = {"video": BaseModelOutputWithPooling(pooler_output=torch.cat(features, dim=1))}
    if stills:
        names = ("pixel_values", "image_sizes", "batch_num_images")
        outputs["image"] = model.get_image_features(**{name: found.pop(name) for name in names})
    return found | {"mm_encoder_outputs": outputs}


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
