"""What classes of ``transformers`` read of samples with videos, whose tokens and pixels are apart
there from those of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from megavlm.convert.hf.qwen_vl_kinds import KINDS
from megavlm.data.images.feature_layout import (
    FeatureLayout,
    Tiled,
    images_in_text,
    is_joined,
    sizes_in_text,
)
from megavlm.data.loading.rotary_positions import frame_positions, rotary_positions

# In ``mm_token_type_ids``.
_VIDEO = 2


class _Shown(NamedTuple):
    """What a sample shows, image by image in its text.

    Args:
        are_videos: which of them are videos.
        tiles: of each.
        tokens: of the sample [1, n], those of videos exchanged for the class's own.
        places: bool [n], which of them are of videos.
    """

    are_videos: list[bool]
    tiles: list[int]
    tokens: Tensor
    places: Tensor


@torch.no_grad()
def with_videos(
    model: nn.Module, inputs: Mapping[str, Tensor], images: Sequence[Tiled], layout: FeatureLayout
) -> dict[str, Any]:
    """Return what ``LlavaOnevisionForConditionalGeneration`` and the classes of Qwen2-VL and its
    successors read of a sample with videos.

    Args:
        model: of transformers, of any class.
        inputs: its inputs as if frames were images, with the tokens of one sample [1, n].
        images: images and frames of the sample.
        layout: of their features.
    """
    if not any(map(is_joined, images)):
        return dict(inputs)
    shown = _shown(model.config, inputs["input_ids"], images, layout)
    found: dict[str, Any] = dict(inputs, input_ids=shown.tokens)
    read = _read_by_qwen if model.config.model_type in KINDS else _read_by_onevision
    return read(model, found, images, shown)


def _shown(config: Any, tokens: Tensor, images: Sequence[Tiled], layout: FeatureLayout) -> _Shown:
    """Return what a sample shows; ``config`` gets a token for videos if it has none that can be."""
    tokens = tokens.clone()
    taken = {-1, *tokens[0].tolist()}
    rows = config.get_text_config().vocab_size
    # The tokenizer has none, or the text holds it: any that the sample lacks.
    if config.video_token_id in taken or config.video_token_id >= rows:
        config.video_token_id = min(set(range(len(taken))) - taken)
    tiles, sizes = sizes_in_text(images, layout)
    are_videos = [is_joined(group[0]) for group in images_in_text(images)]
    of_videos = np.repeat(are_videos, [one.features for one in sizes])
    found = (tokens[0] == config.image_token_id).nonzero()[:, 0]
    places = torch.zeros_like(tokens[0], dtype=torch.bool)
    places[found[torch.from_numpy(of_videos)]] = True
    tokens[0, places] = config.video_token_id
    return _Shown(are_videos, tiles, tokens, places)


def _read_by_onevision(
    model: nn.Module, found: dict[str, Any], images: Sequence[Tiled], shown: _Shown
) -> dict[str, Any]:
    """Return what ``LlavaOnevisionForConditionalGeneration`` reads; ``found`` are the other inputs,
    and ``images`` those of the sample.
    """
    pixels = found.pop("pixel_values").split(shown.tiles)
    clips = [own[None] for is_video, own in zip(shown.are_videos, pixels, strict=True) if is_video]
    stills = [own for is_video, own in zip(shown.are_videos, pixels, strict=True) if not is_video]
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


def _read_by_qwen(
    model: nn.Module, found: dict[str, Any], images: Sequence[Tiled], shown: _Shown
) -> dict[str, Any]:
    """Return what the classes of Qwen2-VL and its successors read; arguments as of
    ``_read_by_onevision``.

    transformers 5 lets the text behind a video go on behind its rows and columns alone, so that
    positions of a video of more frames are given to the text again. The authors' code, vLLM,
    transformers 4 and packs let it go on behind the frames too: of such a video the class is told
    where all tokens stand. Of any other it finds that by itself.
    """
    kinds = found["mm_token_type_ids"].clone()
    kinds[0, shown.places] = _VIDEO
    found["mm_token_type_ids"] = kinds
    groups = list(images_in_text(images))
    vision = model.config.vision_config
    side = vision.spatial_merge_size
    patches = found.pop("pixel_values").split([tiles * side**2 for tiles in shown.tiles])
    del found["image_grid_thw"]
    names = {
        False: ("pixel_values", "image_grid_thw"),
        True: ("pixel_values_videos", "video_grid_thw"),
    }
    for is_video, (pixels, grids) in names.items():
        own = [number for number, other in enumerate(shown.are_videos) if other == is_video]
        if own:
            found[pixels] = torch.cat([patches[number] for number in own])
            sizes = [_grid(groups[number], side) for number in own]
            found[grids] = torch.tensor(sizes, device=found[pixels].device)
    clips = [group for group in groups if is_joined(group[0])]
    is_timed = model.config.model_type == "qwen2_5_vl"
    rate = vision.tokens_per_second if is_timed else 0
    if is_timed:
        intervals = [group[0].interval for group in clips]
        found["second_per_grid_ts"] = torch.tensor(intervals, device=shown.tokens.device)
    if any(
        frame_positions(group, rate)[-1] >= max(group[0].columns, group[0].rows) for group in clips
    ):
        found["position_ids"] = _positions(shown, model.config, images, rate)
    return found


def _grid(group: Sequence[Tiled], side: int) -> tuple[int, int, int]:
    """Return frames of an image in the text, and rows and columns of their patches."""
    frames = sum(image.tiles > 0 for image in group)
    return frames, group[0].rows * side, group[0].columns * side


def _positions(shown: _Shown, config: Any, images: Sequence[Tiled], rate: int) -> Tensor:
    """Return frame, row and column of each token [3, 1, n]; ``rate`` as for
    ``rotary_positions``.
    """
    tokens = torch.where(shown.places, config.image_token_id, shown.tokens[0])
    length = np.array([len(tokens)])
    context = config.image_token_id
    found = rotary_positions(tokens.cpu().numpy(), length, images, context, rate)
    return torch.from_numpy(found.of_tokens)[:, None].to(tokens.device)
