"""A Q-Former to start from: that of a BLIP-2 or an InstructBLIP, or a BERT, which BLIP-2's Q-Former
started as (arXiv 2301.12597, section 3.1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import BertConfig, Blip2Config, InstructBlipConfig

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
_FORMS = {blip2_config.MODEL_TYPE: Blip2Config, "instructblip": InstructBlipConfig}
_NAMES = {"instructblip": qformer.INSTRUCT_BLIP}
_SPREAD = 0.02
# Weights of a Q-Former that a BERT does not have.
_FRESH_BESIDE_BERT = re.compile(r"connector\.(norm\.|queries$|output\.|.*\.cross_attention)")
_OUTPUT = "connector.output."
_TOKENS = "connector.token_embedding.weight"
_BERT_NAMES = (
    (re.compile(r"^bert\."), ""),
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
    (re.compile(r"^embeddings\.LayerNorm\."), "qformer.layernorm."),
    (re.compile(r"^encoder\."), "qformer.encoder."),
    (re.compile(r"\.attention\.self\."), ".attention.attention."),
)


def read(folder: str | Path, known: QFormer) -> QFormer:
    """Read the sizes of a Q-Former.

    Args:
        folder: Hugging Face folder of a BLIP-2, an InstructBLIP or a BERT.
        known: says whether texts are read, and the rest of what a BERT does not have.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it is of another model, or of one that cannot be trained here.
    """
    path = Path(folder) / json_files.FILE_NAME
    raw = json_files.read_json(path)
    kind = raw.get("model_type")
    if kind == _BERT:
        return _of_bert(path, raw, known)
    if kind not in _FORMS:
        raise ValueError(
            f"--init.connector {path}: model_type is {kind!r}, must be one of"
            f" {', '.join((*_FORMS, _BERT))}"
        )
    settings = _FORMS[kind].from_dict(raw).to_dict()
    wrong = json_files.contradictions(
        "qformer_config", settings["qformer_config"], {"hidden_act": "gelu"}
    )
    json_files.refuse(path, list(wrong))
    found = blip2_config.read_connector(settings).qformer
    if known.text and not found.text:
        raise ValueError(
            f"--init.connector {path}: its Q-Former reads no texts, and the model's does"
            " (--architecture.connector.qformer.text true); name the folder of a first stage"
        )
    rows = (found.vocab_size, found.max_position_embeddings)
    if not known.text:
        rows = (known.vocab_size, known.max_position_embeddings)
    return replace(
        found,
        text=known.text,
        instruction_tokens=known.instruction_tokens,
        vocab_size=rows[0],
        max_position_embeddings=rows[1],
    )


def _of_bert(path: Path, raw: dict[str, Any], known: QFormer) -> QFormer:
    found = BertConfig.from_dict(raw).to_dict()
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
    """Return a function that gives the whole tensors of the connector, those that the folder lacks
    from ``fresh``.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: weights are missing or of other sizes; each is named.
    """
    folder = Path(config.init.connector)
    kind = json_files.read_json(folder / json_files.FILE_NAME)["model_type"]
    table = list(_table(config.architecture, kind))
    known = SafetensorsFolder(folder, rename=_rename(kind, {n for row in table for n in row.names}))
    # A first stage has no layer to a language model, and another language model another width.
    table = [row for row in table if not row.key.startswith(_OUTPUT) or _fits(row, known)]
    used = {name for row in table for name in row.names}
    source = SafetensorsFolder(folder, rename=_rename(kind, used))
    if kind == _BERT:
        table = [_as_long_as(row, source) for row in table]
    view = MegatronView(source, tuple(table))

    def tensor(key: str, shape: Shape) -> Served:
        if key not in view.headers:
            return fresh(key, shape)
        whole = LazyTensor(view, key)
        if key != _TOKENS:
            return whole
        rows = config.architecture.connector.qformer.vocab_size
        seed = config.training.seed
        return ExtendedVocabulary(
            tensor=whole, rows=rows, new=(), std=_SPREAD, seed=seed, averaged=False
        )

    return tensor


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
