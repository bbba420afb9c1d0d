"""Folders of InternVL-C: a folder of its InternViT, a folder of its language model, and beside them
the pool, the projection of the texts and the scale. No class of transformers holds the whole.

OpenGVLab's class ``InternVL_C`` reads one file of PyTorch, in which the names of InternViT are
older; those of the pool, of the projection and of the scale are the same there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megavlm.config.connectors import Connector
from megavlm.config.schema import Architecture, Contrastive, Language
from megavlm.convert.hf import chat_config, json_files, language_config, one_tile, tokenizer_files
from megavlm.convert.hf.json_files import FILE_NAME, IMAGE_PROCESSOR_NAME, read_config, write_json
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.hf.processor import tile_processor
from megavlm.convert.hf.token_ids import TextIds
from megavlm.convert.weights.families import written_as
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import load_tokenizer

CLASS_NAME = "InternVL_C"
MODEL_TYPE = "internvl_c"
VISION = "vision"
LANGUAGE = "language"
FOLDERS = {"vision_model.": VISION, "language_model.": LANGUAGE}
_NEEDED = ("clip_embed_dim", "attn_pool_num_heads")
# The repository with the Python files of InternViT.
_CODE = "OpenGVLab/InternViT-6B-224px"


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture; arguments and errors as of ``native_config.read``."""
    path = folder / FILE_NAME
    json_files.refuse(path, list(json_files.needed_sizes("", raw, *_NEEDED)))
    vision_path = folder / VISION / FILE_NAME
    vision = read_config(vision_path)
    json_files.refuse(vision_path, list(chat_config.vision_problems(vision, "")))
    pixels = json_files.pixel_fields(folder / VISION)
    return Architecture(
        objective="contrastive",
        vision=chat_config.read_vision(vision, pixels),
        connector=Connector(kind="mean_query", heads=raw["attn_pool_num_heads"]),
        language=_language(folder / LANGUAGE / FILE_NAME),
        contrastive=Contrastive(
            size=raw["clip_embed_dim"], max_scale=float(raw.get("max_scale", 0.0))
        ),
        image_tokens="none",
    )


def _language(path: Path) -> Language:
    settings = read_config(path)
    json_files.refuse(path, list(language_config.problems(settings, "")))
    return language_config.read_bare(settings, tied_head=False)


def usage(folder: Path) -> Usage:
    """Return how the model sees pairs: as its image processor says."""
    tiling = one_tile.read_tiling(folder, "")
    return Usage(template="internvl_c", system_message="", max_tiles=1, tiling=tiling)


def write(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights; see ``processor.write_native``."""
    number = str(dtype).removeprefix("torch.")
    form = chat_format("internvl_c")
    settings = {
        "architectures": [CLASS_NAME],
        "model_type": MODEL_TYPE,
        "torch_dtype": number,
        "clip_embed_dim": architecture.contrastive.size,
        "attn_pool_num_heads": architecture.connector.heads,
        "max_scale": architecture.contrastive.max_scale,
        "text_prompt": form.pair_prompt,
        "context_length": form.pair_length,
        "vision_folder": VISION,
        "language_folder": LANGUAGE,
    }
    write_json(folder / FILE_NAME, settings)
    processor = tile_processor(architecture, usage, "CLIPImageProcessor")
    for name in ("", VISION):
        (folder / name).mkdir(exist_ok=True)
        write_json(folder / name / IMAGE_PROCESSOR_NAME, processor)
    vision = chat_config.vision_config(architecture.vision) | {
        "torch_dtype": number,
        "auto_map": {
            "AutoConfig": f"{_CODE}--configuration_intern_vit.InternVisionConfig",
            "AutoModel": f"{_CODE}--modeling_intern_vit.InternVisionModel",
        },
    }
    write_json(folder / VISION / FILE_NAME, vision)
    (folder / LANGUAGE).mkdir()
    language = _written_language(architecture.language, tokenizer) | {"torch_dtype": number}
    write_json(folder / LANGUAGE / FILE_NAME, language)
    for name in ("", LANGUAGE):
        tokenizer_files.copy(tokenizer, folder / name)


def _written_language(language: Language, tokenizer: Path) -> dict[str, Any]:
    """Return config.json of the language model, which has no head."""
    words = load_tokenizer(tokenizer)
    end = words.eos_token_id
    if end is None:
        raise ValueError(f"--tokenizer {tokenizer}: has no eos_token, which ends a text")
    ids = TextIds(
        begin=end if words.bos_token_id is None else words.bos_token_id,
        end=end,
        pad=end if words.pad_token_id is None else words.pad_token_id,
    )
    found = language_config.write(language, written_as(language, "internvl_c"), ids)
    [name] = found["architectures"]
    return found | {"architectures": [name.replace("ForCausalLM", "Model")]}
