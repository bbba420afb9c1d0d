"""Models that start from parts: a folder of a vision encoder and a folder of a language model, each
a Hugging Face model of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, PreTrainedTokenizerBase, SiglipVisionConfig

from megavlm.config.connectors import LLAVA, Connector
from megavlm.config.lora import is_adapter
from megavlm.config.schema import Architecture, Config, Init, Language, Vision
from megavlm.convert.hf import blip2_config, chat_config, json_files, language_config, qformer_part
from megavlm.convert.hf.lazy_tensors import (
    ExtendedVocabulary,
    FullTensor,
    LazyTensor,
    Served,
    head_source,
    vision_tensor,
)
from megavlm.convert.hf.llava_config import ACTIVATIONS
from megavlm.convert.hf.model_config import architecture_from_hf, differences
from megavlm.convert.hf.safetensors_files import SafetensorsFolder, tensor_names
from megavlm.convert.weights.families import FAMILIES, clip, eva, family_of, internvit
from megavlm.convert.weights.mapping import within
from megavlm.convert.weights.tables import EMBEDDING_KEY, HEAD_KEY
from megavlm.convert.weights.transforms import Shape
from megavlm.convert.weights.views import MegatronView
from megavlm.data.text.tokenizer import extend, load_tokenizer

_INTERNVIT = "intern_vit_6b"  # what OpenGVLab calls every InternViT
_CLIP_KINDS: dict[str, tuple[str, type]] = {
    "clip": ("clip", CLIPVisionConfig),
    "clip_vision_model": ("clip", CLIPVisionConfig),
    "siglip": ("siglip", SiglipVisionConfig),
    "siglip_vision_model": ("siglip", SiglipVisionConfig),
}
_EVA_KINDS = (*blip2_config.VISION_TYPES, *blip2_config.WHOLE_TYPES)
# Features come from before the last layer, as in LLaVA; it, what follows it, and the half that
# reads text are left out.
_LEFT_OUT = re.compile(
    r"(text_model|text_projection|visual_projection|logit_scale|logit_bias|post_layernorm|head)\b|embeddings\.position_ids$"
)
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$")
_INITIALIZER_RANGE = 0.02


def read_model(folder: str, init: Init, default: Architecture | None = None) -> Architecture:
    """Read what a model is made of.

    Args:
        folder: a Hugging Face folder of a whole model, or of a vision encoder if a language model
            is named; may be empty.
        init: the parts; without a vision encoder, it is the default's or InternViT-300M, or as
            ``--architecture.vision`` changes it.
        default: the recipe's model: the parts that no folder is named for, and the connector.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: a model that ours is not; every difference is named.
    """
    if folder and not (init.language and _is_vision_encoder(folder)):
        return architecture_from_hf(folder)
    known = default or Architecture()
    named = folder or init.vision
    vision = vision_from_hf(named) if named else known.vision
    language = language_from_hf(init, known.image_tokens) if init.language else known.language
    if default is not None:
        found = replace(default, vision=vision, language=language)
        return _with_connector(found, init.connector) if init.connector else found
    return _compose(vision, language)


def _with_connector(architecture: Architecture, folder: str) -> Architecture:
    """Replace the sizes of a model's Q-Former by those of a folder; errors as of
    ``qformer_part.read``.
    """
    known = architecture.connector
    if known.kind != "qformer":
        raise ValueError(
            f"--init.connector {folder}: the connector is {known.kind}, which starts from no folder"
        )
    found = qformer_part.read(folder, known.qformer)
    return replace(architecture, connector=replace(known, qformer=found))


def image_model(folder: str, init: Init) -> Architecture:
    """Read what packing must know of a model: from the Hugging Face folder of a whole model, or
    from the folder of a vision encoder.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: a model that ours is not; every difference is named.
    """
    if _is_vision_encoder(folder):
        return _compose(vision_from_hf(folder), Language())
    return read_model(folder, init)


def _is_vision_encoder(folder: str) -> bool:
    """Return whether a folder holds a vision encoder alone; raises as ``read_json``."""
    kind = json_files.read_json(Path(folder) / json_files.FILE_NAME).get("model_type")
    return kind == _INTERNVIT or kind in _CLIP_KINDS or kind in blip2_config.VISION_TYPES


def _compose(vision: Vision, language: Language) -> Architecture:
    """Combine two parts into a model: with InternVL's connector after its own vision encoder, with
    LLaVA's after any other.
    """
    return Architecture(
        vision=vision,
        language=language,
        connector=Connector() if vision.family == "internvit" else LLAVA,
    )


def vision_from_hf(folder: str | Path) -> Vision:
    """Read the vision encoder in a folder: an InternViT as OpenGVLab publishes it, a CLIP, a SigLIP
    or an EVA, alone or in a BLIP-2.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it is none of them, or none that can be trained here.
    """
    path = Path(folder) / json_files.FILE_NAME
    raw = json_files.read_json(path)
    kind = raw.get("model_type")
    mean, std = json_files.normalisation(Path(folder))
    if kind == _INTERNVIT:
        json_files.refuse(path, list(chat_config.vision_problems(raw, "")))
        return chat_config.read_vision(raw, mean, std)
    if kind in _EVA_KINDS:
        settings = blip2_config.vision_settings(raw)
        json_files.refuse(path, list(blip2_config.vision_problems(settings, "")))
        return blip2_config.read_vision(settings, Path(folder))
    if kind not in _CLIP_KINDS:
        raise ValueError(
            f"--init.vision {path}: model_type is {kind!r}, must be one of"
            f" {', '.join((_INTERNVIT, *_CLIP_KINDS, *_EVA_KINDS))}"
        )
    family, form = _CLIP_KINDS[kind]
    found = form.from_dict(
        raw.get("vision_config", raw)
    ).to_dict()  # fills in what the file leaves out
    json_files.refuse(path, list(_clip_problems(found)))
    return Vision(
        family=family,
        image_size=found["image_size"],
        patch_size=found["patch_size"],
        num_layers=found["num_hidden_layers"] - 1,
        unused_layers=1,
        hidden_size=found["hidden_size"],
        ffn_hidden_size=found["intermediate_size"],
        num_attention_heads=found["num_attention_heads"],
        layernorm_epsilon=found["layer_norm_eps"],
        activation=ACTIVATIONS[found["hidden_act"]],
        pixel_mean=mean,
        pixel_std=std,
    )


def _clip_problems(found: dict[str, Any]) -> Iterator[str]:
    """Yield settings that our model does not support."""
    if found["hidden_act"] not in ACTIVATIONS:
        yield f"hidden_act is {found['hidden_act']!r}, must be one of {', '.join(ACTIVATIONS)}"
    if found["num_hidden_layers"] < 2:
        yield (
            f"num_hidden_layers is {found['num_hidden_layers']}, must be 2 or more: features are"
            " taken before the last layer"
        )
    yield from json_files.contradictions("", found, {"num_channels": 3})


def language_from_hf(init: Init, image_tokens: str = "internvl") -> Language:
    """Read the language model to start from, with the vocabulary that its tokenizer and the special
    tokens of images need.

    Raises:
        FileNotFoundError: the folder has no config.json or no tokenizer.
        ValueError: it is of no known family, or its tokenizer cannot be read.
    """
    found = _language(Path(init.language))
    tokenizer, _ = extend_tokenizer(init, image_tokens)
    return replace(found, vocab_size=max(tokenizer.get_vocab().values()) + 1)


def _language(folder: Path) -> Language:
    """Read the language model exactly as its folder describes it."""
    path = folder / json_files.FILE_NAME
    raw = json_files.read_json(path)
    if raw.get("model_type") not in FAMILIES:
        raise ValueError(
            f"--init.language {path}: model_type is {raw.get('model_type')!r}, must be one of"
            f" {', '.join(FAMILIES)}"
        )
    json_files.refuse(path, list(language_config.problems(raw, "")))
    found = language_config.read(raw, tied_head=False)
    head = {
        name
        for row in family_of(found).rows(found)
        if row.key == "output_layer.weight"
        for name in row.names
    }
    return replace(found, tied_head=head.isdisjoint(tensor_names(folder) or head))


def notes(init: Init, architecture: Architecture) -> list[str]:
    """Return what a model makes of its parts that they are not by themselves, a sentence each."""
    if not init.language or architecture.language.tied_head:
        return []
    if not _language(Path(init.language)).tied_head:
        return []
    return [
        f"the head of --init.language {init.language} is its token embedding; here it is a tensor"
        " of its own, which starts as a copy (--architecture.language.tied_head true keeps it tied)"
    ]


def words_of(init: Init) -> tuple[str, str]:
    """Return the option that names the tokenizer's folder, and the folder."""
    return (
        ("--init.tokenizer", init.tokenizer)
        if init.tokenizer
        else ("--init.language", init.language)
    )


def extend_tokenizer(
    init: Init, image_tokens: str = "internvl"
) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """Add the special tokens of images to the tokenizer of a language model; return it and the ids
    of the tokens that it lacked.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no tokenizer that can be read.
    """
    flag, folder = words_of(init)
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in _VOCABULARIES):
        # transformers would make an empty tokenizer of what config.json says.
        raise ValueError(
            f"{flag} {folder}: holds no tokenizer ({', '.join(_VOCABULARIES)}); name the folder of"
            " one with --init.tokenizer"
        )
    tokenizer = load_tokenizer(folder, flag)
    return tokenizer, extend(tokenizer, image_tokens)


def refuse_other(init: Init, architecture: Architecture) -> None:
    """Raise ValueError where parts are not those of ``architecture``; every difference is named,
    and no weights are read.
    """
    for part, folder in init.parts.items():
        different = differences(_found(init, part, architecture), architecture)
        if different:
            listed = "\n  ".join(different)
            raise ValueError(
                f"--init.{part} {folder}: the part there is another one than --model's:\n  {listed}"
            )
    if init.language:
        least = language_from_hf(init, architecture.image_tokens).vocab_size
        if architecture.language.vocab_size < least:
            raise ValueError(
                f"--architecture.language.vocab_size {architecture.language.vocab_size}: the"
                f" tokenizer of {' '.join(words_of(init))} has ids up to {least - 1}, the"
                f" special tokens of images counted; use {least}"
            )


def _found(init: Init, part: str, wanted: Architecture) -> Architecture:
    """Replace a part of the wanted model by what its folder holds; the vocabulary and the number of
    CLIP's layers may differ and are kept.
    """
    if part == "language":
        return replace(
            wanted,
            language=replace(_language(Path(init.language)), vocab_size=wanted.language.vocab_size),
        )
    if part == "connector":
        return _with_connector(wanted, init.connector)
    vision = vision_from_hf(init.vision)
    if vision.family == wanted.vision.family and vision.unused_layers:
        layers = min(vision.num_layers + vision.unused_layers, wanted.vision.num_layers)
        vision = replace(vision, num_layers=layers)
    return replace(wanted, vision=vision)


def full_tensors(config: Config, fresh: FullTensor) -> FullTensor:
    """Return a function that fills a model from ``config.init``: it takes a checkpoint key (and a
    shape, which may be padded) and gives the whole tensor.

    Args:
        config: the run.
        fresh: fills what no part does.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: parts are not those of the model, or damaged; every difference is named.
    """
    refuse_other(config.init, config.architecture)
    parts: dict[str, Callable[[str], Served]] = {}
    connector = qformer_part.serve(config, fresh) if config.init.connector else fresh
    if config.init.vision:
        parts["vision"] = _serve_vision(config)
    if config.init.language:
        parts["language"] = _serve_language(config)

    def tensor(key: str, shape: Shape) -> Served:
        part = key.split(".")[0]
        if part == "connector":
            return connector(key, shape)
        is_served = part in parts and not is_adapter(key)
        return parts[part](key) if is_served else fresh(key, shape)

    return tensor


def _serve_vision(config: Config) -> Callable[[str], Served]:
    wanted = config.architecture
    folder = Path(config.init.vision)
    found = _found(config.init, "vision", wanted)
    if found.vision.family == "internvit":
        source = SafetensorsFolder(folder)
        table = internvit.rows(found.vision, internvit.CHAT)
    elif found.vision.family == "eva":
        source = SafetensorsFolder(folder, rename=_used_by_eva(folder))
        table = eva.rows(found.vision)
    else:
        source = SafetensorsFolder(folder, rename=_used_by(found.vision))
        table = clip.rows(found.vision)
    view = MegatronView(source, tuple(within(table, "vision.", "")))
    return lambda key: vision_tensor(view, found, wanted, key)


def _used_by(vision: Vision) -> Callable[[str], str | None]:
    """Rename the tensors of a CLIP or SigLIP, with or without its text half, and leave out those
    that features do not need.
    """

    def name_in_table(name: str) -> str | None:
        name = name.removeprefix("vision_model.")
        layer = _LAYER.match(name)
        return (
            None
            if _LEFT_OUT.match(name) or (layer and int(layer[1]) >= vision.num_layers)
            else name
        )

    return name_in_table


def _used_by_eva(folder: Path) -> Callable[[str], str | None]:
    """Rename the tensors of an EVA, alone or in a BLIP-2, and leave out the others; the norm behind
    it belongs to the connector.
    """
    raw = json_files.read_json(folder / json_files.FILE_NAME)
    start = "vision_model." if raw["model_type"] in blip2_config.WHOLE_TYPES else ""

    def name_in_table(name: str) -> str | None:
        inside = name.removeprefix(start)
        is_other = not name.startswith(start) or inside.startswith("post_layernorm.")
        return None if is_other else inside

    return name_in_table


def _serve_language(config: Config) -> Callable[[str], Served]:
    wanted = config.architecture
    folder = Path(config.init.language)
    language = _language(folder)
    found = replace(wanted, language=language)
    source = SafetensorsFolder(folder, rename=lambda name: None if _BUFFER.search(name) else name)
    view = MegatronView(source, tuple(within(family_of(language).rows(language), "language.", "")))
    _, new = extend_tokenizer(config.init, wanted.image_tokens)
    std = float(
        json_files.read_json(folder / json_files.FILE_NAME).get(
            "initializer_range", _INITIALIZER_RANGE
        )
    )

    def tensor(key: str) -> Served:
        whole = LazyTensor(view, head_source(key, found, wanted))
        if key not in (EMBEDDING_KEY, HEAD_KEY):
            return whole
        averaged = key == HEAD_KEY or wanted.language.tied_head
        rows = wanted.language.vocab_size
        seed = config.training.seed
        return ExtendedVocabulary(
            tensor=whole, rows=rows, new=new, std=std, seed=seed, averaged=averaged
        )

    return tensor
