"""``tokenizer.model``, the file of sentencepiece, made of a ``tokenizer.json``.

transformers 5 reads a sentencepiece model and saves ``tokenizer.json`` alone; the slow tokenizers
of transformers 4 need the model. Both encode by merging pairs: sentencepiece takes the pair whose
joined piece has the highest score, ``tokenizers`` the pair that comes first in its list. So a
piece's score is the negative place of the first merge that makes it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import Tokenizer

from megavlm.data.text.tokenizer import PROBE

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = re.compile(r"<[^<>]+>")


def build(content: dict[str, Any]) -> bytes | None:
    """Return the sentencepiece model that encodes as ``tokenizer.json`` does.

    Args:
        content: of tokenizer.json; its model is BPE with bytes to fall back to.

    Returns:
        None if no such model exists: ids have gaps, or a sample text gets other ids.
    """
    vocab = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    if [number for _, number in vocab] != list(range(len(vocab))):
        return None
    special = {token["content"] for token in content["added_tokens"]}
    unknown = content["model"].get("unk_token") or "<unk>"
    if vocab[0][0] != unknown:
        return None
    scores: dict[str, float] = {}
    for rank, pair in enumerate(content["model"]["merges"]):
        scores.setdefault("".join(pair), -float(rank))
    model = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece.Type
    for piece, number in vocab:
        entry = model.pieces.add()
        entry.piece = piece
        entry.score = scores.get(piece, -float(len(content["model"]["merges"]) + number))
        if piece == unknown:
            entry.type = kinds.UNKNOWN
        elif _BYTE.fullmatch(piece):
            entry.type = kinds.BYTE
        elif piece in special:
            entry.type = kinds.CONTROL
        else:
            entry.type = kinds.NORMAL
    _set_up(model, content, unknown)
    proto = model.SerializeToString()
    return proto if _encodes_alike(proto, content) else None


def _set_up(model: Any, content: dict[str, Any], unknown: str) -> None:
    """Say how texts are cut and normalised."""
    trainer = model.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.ModelType.BPE
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = True
    trainer.unk_piece = unknown
    trainer.unk_id = 0
    scheme = (content.get("pre_tokenizer") or {}).get("prepend_scheme", "never")
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = scheme != "never"
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True


def _encodes_alike(proto: bytes, content: dict[str, Any]) -> bool:
    """Return whether the model gives ordinary text the ids that ``tokenizers`` gives it."""
    ours = Tokenizer.from_str(json.dumps(content))
    theirs = SentencePieceProcessor(model_proto=proto)
    # Whether a space is put before a leading space is up to the slow class, not to the model.
    texts = [text.strip(" ") for text in _SPECIAL.split(PROBE) if text.strip(" ")]
    return all(
        theirs.encode(text) == ours.encode(text, add_special_tokens=False).ids for text in texts
    )
