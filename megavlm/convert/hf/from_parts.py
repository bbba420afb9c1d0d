"""Models that start from parts: a folder of a vision encoder and a folder of a language model, each
a Hugging Face model of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavlm.checkpoint import directory, train_state
from megavlm.config.connectors import LLAVA, Connector
from megavlm.config.lora import is_adapter
from megavlm.config.schema import Architecture, Config, Init, Language, Vision
from megavlm.convert.hf import json_files, language_config, qformer_part, vision_part
from megavlm.convert.hf.lazy_tensors import (
    ExtendedVocabulary,
    FullTensor,
    LazyTensor,
    Served,
    head_source,
    vision_tensor,
)
from megavlm.convert.hf.model_config import architecture_from_hf, differences
from megavlm.convert.hf.safetensors_files import SafetensorsFolder, tensor_names
from megavlm.convert.hf.vision_part import vision_from_hf
from megavlm.convert.weights.families import FAMILIES, family_of
from megavlm.convert.weights.fused_experts import separate_experts
from megavlm.convert.weights.mapping import within
from megavlm.convert.weights.tables import EMBEDDING_KEY, HEAD_KEY
from megavlm.convert.weights.transforms import Shape
from megavlm.convert.weights.views import MegatronView
from megavlm.data.text.tokenizer import extend, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$")
# What the language model of a folder does not have.
_OWN = re.compile(r"language\.(decoder\.layers\.\d+\.cross|added_)")
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
    _check_folders(folder, init)
    if folder and not (init.language and vision_part.is_encoder(folder)):
        return architecture_from_hf(folder)
    known = default or Architecture()
    named = folder or init.vision
    like = default.vision if default else None
    vision = vision_from_hf(named, like) if named else known.vision
    language = known.language
    if init.language:
        read = language_from_hf(init, known.image_tokens)
        language = replace(read, **_positions(known.language))
    if default is not None:
        found = replace(default, vision=vision, language=language)
        return _with_connector(found, init) if init.connector else found
    return _compose(vision, language)


def _positions(language: Language) -> dict[str, Any]:
    """Return the fields of a language model that say how positions are rotated in sections, which
    no language model alone has.
    """
    return dict(
        rotary_sections=language.rotary_sections, rotary_interleaved=language.rotary_interleaved
    )


def _check_folders(model: str, init: Init) -> None:
    """Raise FileNotFoundError if a folder that is named holds no model in Hugging Face's format."""
    named = {"--model": model, **{f"--init.{part}": name for part, name in init.parts.items()}}
    for flag, folder in named.items():
        path = Path(folder)
        if not folder or (path / json_files.FILE_NAME).is_file():
            continue
        what = f"{path / json_files.FILE_NAME}: no such file; it is no Hugging Face folder"
        if not path.is_dir():
            what = "no such folder"
        elif (path / train_state.FILE_NAME).is_file() or directory.candidates(path):
            what = (
                "holds a checkpoint, and a Hugging Face folder is needed: make one with"
                f" tools/convert_checkpoint.py export --load {folder} --out DIR"
            )
        raise FileNotFoundError(f"{flag} {folder}: {what}")


def _with_connector(architecture: Architecture, init: Init) -> Architecture:
    """Replace the sizes of a model's Q-Former by those of its folders; errors as of
    ``qformer_part.read``.
    """
    known = architecture.connector
    if known.kind != "qformer":
        raise ValueError(
            f"--init.connector {init.connector}: the connector is {known.kind}, which starts from"
            " no folder"
        )
    found = qformer_part.read(init.connector, known.qformer, init.text)
    return replace(architecture, connector=replace(known, qformer=found))


def image_model(folder: str, init: Init) -> Architecture:
    """Read what packing must know of a model: from the Hugging Face folder of a whole model, or
    from the folder of a vision encoder.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: a model that ours is not; every difference is named.
    """
    _check_folders(folder, init)
    if vision_part.is_encoder(folder):
        return _compose(vision_from_hf(folder), Language())
    return read_model(folder, init)


def _compose(vision: Vision, language: Language) -> Architecture:
    """Combine two parts into a model: with InternVL's connector after its own vision encoder, with
    LLaVA's after any other.

    Raises:
        ValueError: the vision encoder goes with neither.
    """
    if vision.spans_tiles:
        raise ValueError(
            "--init.vision: patches of that vision encoder see all tiles of an image, which only"
            f" --recipe {vision.family} goes with"
        )
    return Architecture(
        vision=vision,
        language=language,
        connector=Connector() if vision.family == "internvit" else LLAVA,
    )


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
    raw = json_files.read_config(path)
    if raw.get("model_type") not in FAMILIES:
        whole = "; no part of a vision-language model is read: name a language model alone"
        raise ValueError(
            f"--init.language {path}: model_type is {raw.get('model_type')!r}, must be one of"
            f" {', '.join(FAMILIES)}{whole if json_files.is_whole_model(raw) else ''}"
        )
    json_files.refuse(path, list(language_config.problems(raw, "")))
    settings = json_files.completed(raw, path)
    json_files.refuse(path, list(language_config.problems(settings, "")))
    found = language_config.read(settings, tied_head=False)
    head = {
        name
        for row in family_of(found).rows(found)
        if row.key == "output_layer.weight"
        for name in row.names
    }
    # A class such as LlamaModel, whose config.json ties nothing, has no head at all.
    named = (raw.get("architectures") or [""])[0]
    has_none = named.endswith("Model") and raw.get("tie_word_embeddings") is False
    is_absent = head.isdisjoint(tensor_names(folder) or head)
    return replace(found, tied_head=is_absent and not has_none)


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
        _refuse_added(init, architecture)


def _refuse_added(init: Init, architecture: Architecture) -> None:
    """Raise ValueError if the tokens that a tokenizer lacked are not the added ones of a model."""
    count = architecture.added_tokens
    if not count:
        return
    _, new = extend_tokenizer(init, architecture.image_tokens)
    rows = architecture.language.vocab_size
    if new != tuple(range(rows - count, rows)):
        listed = ", ".join(map(str, new)) or "none"
        raise ValueError(
            f"--architecture.added_tokens {count}: must be the tokens that the tokenizer of"
            f" {' '.join(words_of(init))} lacked, at the end of --architecture.language.vocab_size"
            f" {rows}; their ids are {listed}"
        )


def _found(init: Init, part: str, wanted: Architecture) -> Architecture:
    """Replace a part of the wanted model by what its folder holds; the vocabulary, how positions
    are rotated in sections and the number of CLIP's layers may differ and are kept.
    """
    if part == "language":
        kept = dict(vocab_size=wanted.language.vocab_size, **_positions(wanted.language))
        return replace(wanted, language=replace(_language(Path(init.language)), **kept))
    if part in ("connector", "text"):
        return _with_connector(wanted, init)
    vision = vision_from_hf(init.vision, wanted.vision)
    if vision.family == wanted.vision.family and vision.family in vision_part.CLIP_FAMILIES:
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
        is_served = part in parts and not is_adapter(key) and not _OWN.match(key)
        return parts[part](key) if is_served else fresh(key, shape)

    return tensor


def _serve_vision(config: Config) -> Callable[[str], Served]:
    wanted = config.architecture
    folder = Path(config.init.vision)
    found = _found(config.init, "vision", wanted)
    source, table = vision_part.open_encoder(folder, found.vision)
    view = MegatronView(source, tuple(within(table, "vision.", "")))
    return lambda key: vision_tensor(view, found, wanted, key)


def _serve_language(config: Config) -> Callable[[str], Served]:
    wanted = config.architecture
    folder = Path(config.init.language)
    language = _language(folder)
    found = replace(wanted, language=language)
    source = separate_experts(
        SafetensorsFolder(folder, rename=lambda name: None if _BUFFER.search(name) else name)
    )
    table = list(within(family_of(language).rows(language), "language.", ""))
    if not wanted.needs.has_vocabulary_head:  # a folder may then have a head, or none
        table = [
            row
            for row in table
            if row.key != HEAD_KEY or not source.headers.keys().isdisjoint(row.names)
        ]
    view = MegatronView(source, tuple(table))
    _, new = extend_tokenizer(config.init, wanted.image_tokens)
    std = float(
        json_files.read_config(folder / json_files.FILE_NAME).get(
            "initializer_range", _INITIALIZER_RANGE
        )
    )

    def tensor(key: str) -> Served:
        whole = LazyTensor(view, head_source(key, found, wanted))
        if key not in (EMBEDDING_KEY, HEAD_KEY):
            return whole
        averaged = key == HEAD_KEY or wanted.language.tied_head
        rows = wanted.table_rows
        seed = config.training.seed
        return ExtendedVocabulary(
            tensor=whole, rows=rows, new=new, std=std, seed=seed, averaged=averaged
        )

    return tensor
