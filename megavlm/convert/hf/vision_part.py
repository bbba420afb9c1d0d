"""Vision encoders to start from: folders of an InternViT, a CLIP, a SigLIP, an EVA, or a whole
Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megavlm.config.schema import Vision
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import (
    blip2_config,
    chat_config,
    clip_vision,
    json_files,
    qwen_vl_vision,
)
from megavlm.convert.hf.qwen_vl_kinds import KINDS
from megavlm.convert.hf.safetensors_files import SafetensorsFolder
from megavlm.convert.weights.families import clip, eva, internvit, qwen_vl
from megavlm.convert.weights.mapping import Row
from megavlm.convert.weights.tables import qwen_vl_name_on_disk

_INTERNVIT = "intern_vit_6b"  # what OpenGVLab calls every InternViT
_CLIP_KINDS: dict[str, tuple[str, str]] = {
    "clip": ("clip", "CLIPVisionConfig"),
    "clip_vision_model": ("clip", "CLIPVisionConfig"),
    "siglip": ("siglip", "SiglipVisionConfig"),
    "siglip_vision_model": ("siglip", "SiglipVisionConfig"),
}
_EVA_KINDS = (*blip2_config.VISION_TYPES, *blip2_config.WHOLE_TYPES)
CLIP_FAMILIES = {family for family, _ in _CLIP_KINDS.values()}
# The half that reads text, and what makes one embedding of an image.
_LEFT_OUT = re.compile(
    r"(text_model|text_projection|visual_projection|logit_scale|logit_bias|head)\b"
    r"|embeddings\.position_ids$"
)
_NORM = "post_layernorm."
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


def is_encoder(folder: str) -> bool:
    """Return whether a folder holds a vision encoder alone; raises as ``read_json``."""
    kind = json_files.read_config(Path(folder) / json_files.FILE_NAME).get("model_type")
    return kind == _INTERNVIT or kind in _CLIP_KINDS or kind in blip2_config.VISION_TYPES


def vision_from_hf(folder: str | Path, like: Vision | None = None) -> Vision:
    """Read the vision encoder in a folder: an InternViT as OpenGVLab publishes it, a CLIP, a SigLIP
    or an EVA, alone or in a BLIP-2, or that of a whole Qwen2-VL, Qwen2.5-VL or Qwen3-VL.

    Args:
        folder: the folder.
        like: says how many of the last layers of a CLIP or SigLIP are not built, and whether its
            last norm is; none: features come from before the last layer, as in LLaVA.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it is none of them, or none that can be trained here.
    """
    path = Path(folder) / json_files.FILE_NAME
    raw = json_files.read_config(path)
    kind = raw.get("model_type")
    if kind == _INTERNVIT:
        json_files.refuse(path, list(chat_config.vision_problems(raw, "")))
        return chat_config.read_vision(raw, json_files.pixel_fields(Path(folder)))
    if kind in _EVA_KINDS:
        settings = blip2_config.vision_settings(raw)
        json_files.refuse(path, list(blip2_config.vision_problems(settings, "")))
        return blip2_config.read_vision(settings, Path(folder))
    if kind in KINDS:
        return _of_qwen_vl(raw, Path(folder))
    if kind not in _CLIP_KINDS:
        whole = "; no part of another vision-language model is read: name a vision encoder alone"
        raise ValueError(
            f"--init.vision {path}: model_type is {kind!r}, must be one of"
            f" {', '.join((_INTERNVIT, *_CLIP_KINDS, *_EVA_KINDS, *KINDS))}"
            f"{whole if json_files.is_whole_model(raw) else ''}"
        )
    family, form = _CLIP_KINDS[kind]
    found = json_files.complete(form, raw.get("vision_config", raw), path)
    has_like = like is not None and like.family == family
    unused = like.unused_layers if has_like else 1
    json_files.refuse(path, list(_clip_problems(found, unused)))
    final_norm = has_like and like.final_norm
    return clip_vision.read(
        found,
        family=family,
        pixels=json_files.pixel_fields(Path(folder), PIXELS[family]),
        unused_layers=unused,
        unused_head=family == "siglip" and found.get("vision_use_head", True) and not final_norm,
        final_norm=final_norm,
    )


def _of_qwen_vl(raw: dict[str, Any], folder: Path) -> Vision:
    """Read the vision encoder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL; errors as of
    ``vision_from_hf``.
    """
    kind = KINDS[raw["model_type"]]
    path = folder / json_files.FILE_NAME
    settings = json_files.complete(kind.form, raw, path)["vision_config"]
    json_files.refuse(path, list(qwen_vl_vision.problems(settings, kind)))
    return qwen_vl_vision.read(settings, folder, kind)


def _clip_problems(found: dict[str, Any], unused: int) -> Iterator[str]:
    """Yield settings that our model does not support; ``unused`` layers are not built."""
    yield from clip_vision.problems(found, "")
    if found["num_hidden_layers"] <= unused:
        yield (
            f"num_hidden_layers is {found['num_hidden_layers']}, must be {unused + 1} or more:"
            f" the last {unused} are not used"
        )
    yield from json_files.contradictions("", found, {"num_channels": 3})


def open_encoder(folder: Path, vision: Vision) -> tuple[SafetensorsFolder, list[Row]]:
    """Return the weights in a folder of an encoder, and their table."""
    if vision.family == "internvit":
        return SafetensorsFolder(folder), internvit.rows(vision, internvit.CHAT)
    if vision.family == "eva":
        return SafetensorsFolder(folder, rename=_used_by_eva(folder)), eva.rows(vision)
    if vision.family in KINDS:
        return SafetensorsFolder(folder, rename=_used_by_qwen_vl), qwen_vl.rows(vision)
    return SafetensorsFolder(folder, rename=_used_by(vision)), clip.rows(vision)


def _used_by(vision: Vision) -> Callable[[str], str | None]:
    """Rename the tensors of a CLIP or SigLIP, with or without its text half, and leave out those
    that features do not need.
    """

    def name_in_table(name: str) -> str | None:
        name = name.removeprefix("vision_model.")
        layer = _LAYER.match(name)
        return (
            None
            if _LEFT_OUT.match(name)
            or (name.startswith(_NORM) and not vision.final_norm)
            or (layer and int(layer[1]) >= vision.num_layers)
            else name
        )

    return name_in_table


def _used_by_eva(folder: Path) -> Callable[[str], str | None]:
    """Rename the tensors of an EVA, alone or in a BLIP-2, and leave out the others; the norm behind
    it belongs to the connector.
    """
    raw = json_files.read_config(folder / json_files.FILE_NAME)
    start = "vision_model." if raw["model_type"] in blip2_config.WHOLE_TYPES else ""

    def name_in_table(name: str) -> str | None:
        inside = name.removeprefix(start)
        is_other = not name.startswith(start) or inside.startswith("post_layernorm.")
        return None if is_other else inside

    return name_in_table


def _used_by_qwen_vl(name: str) -> str | None:
    """Rename the tensors of the vision encoder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, and leave out
    the others.
    """
    start = "visual."
    found = qwen_vl_name_on_disk(name)
    mergers = (f"{start}merger.", f"{start}deepstack_merger_list.")
    is_other = not found.startswith(start) or found.startswith(mergers)
    return None if is_other else found.removeprefix(start)
