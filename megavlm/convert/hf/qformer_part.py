"""A Q-Former to start from: that of a BLIP-2 or an InstructBLIP, or a BERT, which BLIP-2's Q-Former
started as (arXiv 2301.12597, section 3.1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megavlm.config.qformer import QFormer
from megavlm.config.schema import Architecture, Config
from megavlm.convert.hf import blip2_config, json_files
from megavlm.convert.hf.lazy_tensors import ExtendedVocabulary, FullTensor, LazyTensor, Served
from megavlm.convert.hf.safetensors_files import SafetensorsFolder
from megavlm.convert.weights import qformer
from megavlm.convert.weights.mapping import Row, within
from megavlm.convert.weights.transforms import Shape
from megavlm.convert.weights.views import MegatronView

_BERT = "bert"
_FORMS = {blip2_config.MODEL_TYPE: blip2_config.FORM, "instructblip": "InstructBlipConfig"}
_NAMES = {"instructblip": qformer.INSTRUCT_BLIP}
_SPREAD = 0.02
# Weights of a Q-Former that a BERT does not have.
_FRESH_BESIDE_BERT = re.compile(r"connector\.(norm\.|queries$|output\.|.*\.cross_attention)")
_OUTPUT = "connector.output."
_TOKENS = "connector.token_embedding.weight"
# What a Q-Former reads texts with.
_OF_TEXTS = re.compile(r"connector\.((token|position)_embedding\.|.*\.text_mlp)")
_BERT_NAMES = (
    (re.compile(r"^bert\."), ""),
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
    (re.compile(r"^embeddings\.LayerNorm\."), "qformer.layernorm."),
    (re.compile(r"^encoder\."), "qformer.encoder."),
    (re.compile(r"\.attention\.self\."), ".attention.attention."),
)


def read(folder: str | Path, known: QFormer, text: str | Path = "") -> QFormer:
    """Read the sizes of a Q-Former.

    Args:
        folder: Hugging Face folder of a BLIP-2, an InstructBLIP or a BERT.
        known: says whether texts are read, and the rest of what a BERT does not have.
        text: another such folder, which has what reads texts; none: ``folder`` has it.

    Raises:
        FileNotFoundError: a folder has no config.json.
        ValueError: it is of another model, or of one that cannot be trained here; or the two do not
            fit together.
    """
    found, has_text = _read(folder, known, "--init.connector")
    if text:
        return _with_text(found, text, known)
    if known.text and not has_text:
        raise ValueError(
            f"--init.connector {folder}: its Q-Former reads no texts, and the model's does"
            " (--architecture.connector.qformer.text true); name the folder of a first stage, or"
            " give one that has what reads texts with --init.text"
        )
    return found


def _with_text(found: QFormer, text: str | Path, known: QFormer) -> QFormer:
    """Give a Q-Former the rows of the embeddings in another folder."""
    if not known.text:
        raise ValueError(
            f"--init.text {text}: the model's Q-Former reads no texts"
            " (--architecture.connector.qformer.text false); leave it out"
        )
    other, has_text = _read(text, known, "--init.text")
    if not has_text:
        raise ValueError(
            f"--init.text {text}: its Q-Former reads no texts; name the folder of a first stage of"
            " BLIP-2, of an InstructBLIP or of a BERT"
        )
    here = vars(found)
    there = vars(other)
    wrong = [
        f"{name} {there[name]}, and that of --init.connector has {here[name]}"
        for name in ("num_layers", "hidden_size", "ffn_hidden_size")
        if there[name] != here[name]
    ]
    if wrong:
        raise ValueError(f"--init.text {text}: its Q-Former has {'; '.join(wrong)}")
    return replace(
        found,
        vocab_size=other.vocab_size,
        max_position_embeddings=other.max_position_embeddings,
    )


def _read(folder: str | Path, known: QFormer, flag: str) -> tuple[QFormer, bool]:
    """Return the sizes of a folder's Q-Former, and whether it has what reads texts."""
    path = Path(folder) / json_files.FILE_NAME
    raw = json_files.read_config(path)
    kind = raw.get("model_type")
    if kind == _BERT:
        return _of_bert(path, raw, known), True
    if kind not in _FORMS:
        raise ValueError(
            f"{flag} {path}: model_type is {kind!r}, must be one of {', '.join((*_FORMS, _BERT))}"
        )
    settings = json_files.complete(_FORMS[kind], raw, path)
    wrong = json_files.contradictions(
        "qformer_config", settings["qformer_config"], {"hidden_act": "gelu"}
    )
    json_files.refuse(path, list(wrong))
    found = blip2_config.read_connector(settings).qformer
    rows = found if known.text else known
    sizes = replace(
        found,
        text=known.text,
        instruction_tokens=known.instruction_tokens,
        vocab_size=rows.vocab_size,
        max_position_embeddings=rows.max_position_embeddings,
    )
    return sizes, found.text


def _of_bert(path: Path, raw: dict[str, Any], known: QFormer) -> QFormer:
    found = json_files.complete("BertConfig", raw, path)
    json_files.refuse(path, list(json_files.contradictions("", found, {"hidden_act": "gelu"})))
    return replace(
        known,
        num_layers=found["num_hidden_layers"],
        hidden_size=found["hidden_size"],
        ffn_hidden_size=found["intermediate_size"],
        num_attention_heads=found["num_attention_heads"],
        layernorm_epsilon=found["layer_norm_eps"],
        max_position_embeddings=found["max_position_embeddings"],
        vocab_size=max(found["vocab_size"], known.vocab_size),
    )


def serve(config: Config, fresh: FullTensor) -> FullTensor:
    """Return a function that gives the whole tensors of the connector, those that the folders lack
    from ``fresh``.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: weights are missing or of other sizes; each is named.
    """
    init = config.init
    arch = config.architecture
    if init.text:
        views = [
            _open(init.connector, arch, lambda key: not _OF_TEXTS.match(key)),
            _open(init.text, arch, lambda key: bool(_OF_TEXTS.match(key))),
        ]
    else:
        views = [_open(init.connector, arch, lambda key: True)]

    def tensor(key: str, shape: Shape) -> Served:
        view = next((one for one in views if key in one.headers), None)
        if view is None:
            return fresh(key, shape)
        whole = LazyTensor(view, key)
        if key != _TOKENS:
            return whole
        rows = arch.connector.qformer.vocab_size
        seed = config.training.seed
        return ExtendedVocabulary(
            tensor=whole, rows=rows, new=(), std=_SPREAD, seed=seed, averaged=False
        )

    return tensor


def _open(path: str, architecture: Architecture, wants: Callable[[str], bool]) -> MegatronView:
    """Open the weights of a folder whose keys are wanted; errors as of ``serve``."""
    folder = Path(path)
    kind = json_files.read_config(folder / json_files.FILE_NAME)["model_type"]
    table = [row for row in _table(architecture, kind) if wants(row.key)]
    known = SafetensorsFolder(folder, rename=_rename(kind, {n for row in table for n in row.names}))
    # A first stage has no layer to a language model, and another language model another width.
    table = [row for row in table if not row.key.startswith(_OUTPUT) or _fits(row, known)]
    used = {name for row in table for name in row.names}
    source = SafetensorsFolder(folder, rename=_rename(kind, used))
    if kind == _BERT:
        table = [_as_long_as(row, source) for row in table]
    return MegatronView(source, tuple(table))


def _table(architecture: Architecture, kind: str) -> Iterator[Row]:
    """Yield the weights that a folder of a kind has; a BERT's MLPs are those of the queries,
    too.
    """
    names = _NAMES.get(kind, qformer.BLIP2)
    for row in within(qformer.rows(architecture, names), "connector.", ""):
        if kind != _BERT:
            yield row
        elif not _FRESH_BESIDE_BERT.match(row.key):
            yield replace(row, names=tuple(name.replace("_query.", ".") for name in row.names))


def _rename(kind: str, used: set[str]) -> Callable[[str], str | None]:
    """Leave out tensors that the table does not name, and give BERT's the names of BLIP-2."""

    def name_in_table(name: str) -> str | None:
        if kind == _BERT:
            for pattern, replacement in _BERT_NAMES:
                name = pattern.sub(replacement, name)
        return name if name in used else None

    return name_in_table


def _fits(row: Row, source: SafetensorsFolder) -> bool:
    """Return whether a folder has the tensors of a row in its shapes."""
    return all(
        name in source.headers and tuple(source.headers[name].shape) == shape
        for name, shape in zip(row.names, row.part_shapes, strict=True)
    )


def _as_long_as(row: Row, source: SafetensorsFolder) -> Row:
    """Give the token embedding the rows that a BERT has, to which a few are added."""
    if row.key != _TOKENS or row.names[0] not in source.headers:
        return row
    return replace(row, shape=tuple(source.headers[row.names[0]].shape))
