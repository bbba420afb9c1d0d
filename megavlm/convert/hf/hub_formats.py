"""The formats of Hugging Face folders, a row for each. What differs between them is reached through
this table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from megavlm.config.schema import Architecture
from megavlm.convert.hf import (
    blip2_config,
    blip2_processor,
    blip2_retrieval,
    chat_config,
    fuyu_config,
    idefics_config,
    instructblip,
    internvl_c_config,
    llava_config,
    llava_next_config,
    llava_next_processor,
    llava_onevision_config,
    llava_onevision_processor,
    llava_processor,
    native_config,
    pairs_config,
    paligemma_config,
    preprocessing,
    processor,
    qwen_vl_config,
    qwen_vl_kinds,
    qwen_vl_processor,
)
from megavlm.convert.hf.json_files import FILE_NAME, is_whole_model, read_config
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.weights import pairs
from megavlm.convert.weights.fused_experts import FusedExperts
from megavlm.convert.weights.joined_experts import JoinedExperts
from megavlm.convert.weights.tables import (
    Dialect,
    llava_name_on_disk,
    name_on_disk,
    qwen_vl_name_on_disk,
)
from megavlm.convert.weights.views import Tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReadArchitecture(Protocol):
    """Reads the architecture that a config.json states."""

    def __call__(
        self, raw: dict[str, Any], folder: Path, *, has_head: bool | None
    ) -> Architecture: ...


class WriteFiles(Protocol):
    """Writes every file of a folder but the weights: config.json, tokenizer, processor."""

    def __call__(
        self,
        folder: Path,
        tokenizer: Path,
        architecture: Architecture,
        usage: Usage,
        dtype: torch.dtype,
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class HubFormat:
    """The format in which a class of models is kept in Hugging Face folders.

    Args:
        class_name: the class.
        model_type: what config.json calls it.
        is_in_transformers: whether transformers has the class; otherwise it is Python code of its
            own.
        read_architecture: reads config.json, see ``native_config.read``.
        read_usage: reads conversation template and tile limits from a folder.
        write_files: see ``processor.write_native``.
        name_on_disk: gives the name of a weight in files of the format for a name in the folder;
            None: it is no weight.
        gather_experts: shows the tensors of each expert of a layer as files hold them together.
        folders: folders of the parts, by what the names of their weights begin with; none: the
            model is one folder.
        check_tokenizer: raises ValueError for the folder of a tokenizer whose texts the class would
            read otherwise than training does; none: every tokenizer will do.
        end_problems: yields why config.json and a tokenizer end texts at different tokens, if the
            class computes something of the token there.
    """

    class_name: str
    model_type: str
    is_in_transformers: bool = True
    read_architecture: ReadArchitecture
    read_usage: Callable[[Path], Usage]
    write_files: WriteFiles
    name_on_disk: Callable[[str], str | None] = str
    gather_experts: Callable[[Tensors], Tensors] = JoinedExperts
    folders: Mapping[str, str] = field(default_factory=dict)
    check_tokenizer: Callable[[Path], object] | None = None
    end_problems: Callable[[Mapping[str, Any], PreTrainedTokenizerBase], Iterator[str]] | None = (
        None
    )


def _qwen_vl(kind: qwen_vl_kinds.Kind) -> HubFormat:
    """Return the row of one of the classes."""
    return HubFormat(
        class_name=kind.class_name,
        model_type=kind.model_type,
        read_architecture=partial(qwen_vl_config.read, kind=kind),
        read_usage=partial(qwen_vl_processor.read_usage, kind=kind),
        write_files=partial(qwen_vl_processor.write, kind=kind),
        name_on_disk=str if kind.is_third else qwen_vl_name_on_disk,
        gather_experts=FusedExperts if kind is qwen_vl_kinds.QWEN3_VL_MOE else JoinedExperts,
    )


# By the dialect that names the weights, see ``convert/weights/tables``.
HUB_FORMATS: dict[Dialect, HubFormat] = {
    "native": HubFormat(
        class_name=native_config.CLASS_NAME,
        model_type=native_config.MODEL_TYPE,
        read_architecture=native_config.read,
        read_usage=preprocessing.of_native,
        write_files=processor.write_native,
        name_on_disk=name_on_disk,
    ),
    "chat": HubFormat(
        class_name=chat_config.CLASS_NAME,
        model_type=chat_config.MODEL_TYPE,
        is_in_transformers=False,
        read_architecture=chat_config.read,
        read_usage=preprocessing.of_chat,
        write_files=processor.write_chat,
    ),
    "llava": HubFormat(
        class_name=llava_config.CLASS_NAME,
        model_type=llava_config.MODEL_TYPE,
        read_architecture=llava_config.read,
        read_usage=llava_processor.read_usage,
        write_files=llava_processor.write,
        name_on_disk=llava_name_on_disk,
    ),
    "llava_next": HubFormat(
        class_name=llava_next_config.CLASS_NAME,
        model_type=llava_next_config.MODEL_TYPE,
        read_architecture=llava_next_config.read,
        read_usage=llava_next_processor.read_usage,
        write_files=llava_next_processor.write,
        name_on_disk=llava_name_on_disk,
    ),
    "llava_onevision": HubFormat(
        class_name=llava_onevision_config.CLASS_NAME,
        model_type=llava_onevision_config.MODEL_TYPE,
        read_architecture=llava_onevision_config.read,
        read_usage=llava_onevision_processor.read_usage,
        write_files=llava_onevision_processor.write,
        name_on_disk=llava_name_on_disk,
    ),
    "paligemma": HubFormat(
        class_name=paligemma_config.CLASS_NAME,
        model_type=paligemma_config.MODEL_TYPE,
        read_architecture=paligemma_config.read,
        read_usage=paligemma_config.read_usage,
        write_files=paligemma_config.write_files,
        name_on_disk=llava_name_on_disk,
    ),
    "fuyu": HubFormat(
        class_name=fuyu_config.CLASS_NAME,
        model_type=fuyu_config.MODEL_TYPE,
        read_architecture=fuyu_config.read,
        read_usage=fuyu_config.read_usage,
        write_files=fuyu_config.write_files,
        name_on_disk=name_on_disk,
        check_tokenizer=fuyu_config.check_tokenizer,
    ),
    **{name: _qwen_vl(kind) for name, kind in qwen_vl_kinds.KINDS.items()},
    "clip": HubFormat(
        class_name="CLIPModel",
        model_type="clip",
        read_architecture=pairs_config.read_clip,
        read_usage=pairs_config.usage_of_clip,
        write_files=pairs_config.write_clip,
        name_on_disk=pairs.name_on_disk,
        check_tokenizer=pairs_config.check_clip_tokenizer,
        end_problems=pairs_config.end_problems,
    ),
    "siglip": HubFormat(
        class_name="SiglipModel",
        model_type="siglip",
        read_architecture=pairs_config.read_siglip,
        read_usage=pairs_config.usage_of_siglip,
        write_files=pairs_config.write_siglip,
        name_on_disk=pairs.name_on_disk,
    ),
    "internvl_c": HubFormat(
        class_name=internvl_c_config.CLASS_NAME,
        model_type=internvl_c_config.MODEL_TYPE,
        is_in_transformers=False,
        read_architecture=internvl_c_config.read,
        read_usage=internvl_c_config.usage,
        write_files=internvl_c_config.write,
        folders=internvl_c_config.FOLDERS,
    ),
    "blip2": HubFormat(
        class_name=blip2_config.CLASS_NAME,
        model_type=blip2_config.MODEL_TYPE,
        read_architecture=blip2_config.read,
        read_usage=blip2_processor.read_usage,
        write_files=blip2_processor.write,
    ),
    "blip2_retrieval": HubFormat(
        class_name=blip2_retrieval.CLASS_NAME,
        model_type=blip2_config.MODEL_TYPE,
        read_architecture=blip2_retrieval.read,
        read_usage=blip2_retrieval.read_usage,
        write_files=blip2_retrieval.write,
    ),
    "instructblip": HubFormat(
        class_name=instructblip.CLASS_NAME,
        model_type=instructblip.MODEL_TYPE,
        read_architecture=instructblip.read,
        read_usage=instructblip.read_usage,
        write_files=instructblip.write,
    ),
    "idefics": HubFormat(
        class_name=idefics_config.CLASS_NAME,
        model_type=idefics_config.MODEL_TYPE,
        read_architecture=idefics_config.read,
        read_usage=idefics_config.read_usage,
        write_files=idefics_config.write_files,
    ),
}


def dialect_of(folder: str | Path) -> Dialect:
    """Tell which dialect a Hugging Face folder is written in.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it is of another kind of model.
    """
    path = Path(folder) / FILE_NAME
    settings = read_config(path)
    found = settings.get("model_type")
    of_kind = {dialect: row for dialect, row in HUB_FORMATS.items() if row.model_type == found}
    if not of_kind:
        known = dict.fromkeys(row.model_type for row in HUB_FORMATS.values())
        remedy = (
            "no other vision-language model can be trained here; one can be made of a vision"
            " encoder and a language model, by --init.vision and --init.language of"
            " pretrain_vlm.py, which docs/conversion.md lists (What is supported)"
            if is_whole_model(settings)
            else "a language model or vision encoder alone is for --init.language or --init.vision"
            " of pretrain_vlm.py"
        )
        raise ValueError(
            f"{path}: model_type is {found!r}, must be {' or '.join(map(repr, known))}; {remedy}"
        )
    # Several classes may have one kind of config.json, which then names the class.
    named = settings.get("architectures") or []
    return next(
        (one for one, row in of_kind.items() if row.class_name in named), next(iter(of_kind))
    )


def hub_format_of(folder: str | Path) -> HubFormat:
    """Return the format of a Hugging Face folder; errors as in ``dialect_of``."""
    return HUB_FORMATS[dialect_of(folder)]
