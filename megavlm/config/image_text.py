"""The objective qformer, stage 1 of BLIP-2 (arXiv 2301.12597, section 3.1): its settings, and what
it adds to a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megavlm.config.freeze_mask import trains
from megavlm.config.pieces import Piece, linear, norm, vector

START_TEMPERATURE = 0.07


@dataclass(frozen=True, kw_only=True)
class ImageText:
    """The objective qformer: what the model ends in, and its losses.

    Args:
        size: width of the embeddings that images and texts are contrasted by.
        contrast: weight of image-text contrast (ITC); a loss of weight 0 is measured only.
        matching: weight of image-text matching (ITM).
        generation: weight of generating the text from the image (ITG).
        label_smoothing: of contrast and generation: this share of the label is spread over all
            classes in training; held-out losses have none.
        gradient: of contrast: exact (global), or without the part that reaches an embedding as
            another pair's negative, as in the authors' code (local).
        pool_packs: neighbouring packs of a step whose pairs are contrasted with each other and give
            each other negatives; 0: all of the step.
        text_tokens: longest text of a pair.
    """

    size: int = 256
    contrast: float = 1.0
    matching: float = 1.0
    generation: float = 1.0
    label_smoothing: float = 0.1
    gradient: Literal["global", "local"] = "global"
    pool_packs: int = 0
    text_tokens: int = 32

    @property
    def weights(self) -> dict[str, float]:
        """The losses by name, with their weights."""
        return {"itc": self.contrast, "itm": self.matching, "itg": self.generation}

    def packs_at_once(self, packs: int, ranks: int) -> int:
        """Return the packs of a data-parallel rank, of so many of so many ranks, that whole pools
        are made of.
        """
        return math.lcm(self.pool_packs, ranks) // ranks if self.pool_packs else packs


READINGS = (
    "itm_accuracy",
    "itm_accuracy_of_pairs",
    "itm_accuracy_of_negatives",
    "recall_image_to_text",
    "recall_text_to_image",
    "temperature",
)


def head(arch: Any) -> Iterator[Piece]:
    """Yield the heads of the three losses, and the passes of the Q-Former over texts."""
    settings = arch.image_text
    qformer = arch.connector.qformer
    width = qformer.hidden_size
    words = qformer.vocab_size
    rows = qformer.queries
    texts = settings.text_tokens
    yield Piece(key="", part="head", elements=0, forward=_text_passes(arch), unit="tile")
    for name, count in (("image", rows), ("text", 1)):
        key = f"objective.{name}_projection"
        yield from linear(key, "head", width, settings.size, rows=count, unit="tile", has_bias=True)
    yield vector("objective.temperature", "head", 1)
    yield from linear(
        "objective.matching", "head", width, 2, rows=3 * rows, unit="tile", has_bias=True
    )
    yield from linear(
        "objective.transform", "head", width, width, rows=texts, unit="tile", has_bias=True
    )
    yield from norm("objective.transform_norm", "head", width, has_bias=True)
    # The matrix of the vocabulary is the Q-Former's token embedding.
    yield Piece(key="", part="head", elements=0, forward=2 * texts * width * words, unit="tile")
    yield vector("objective.vocabulary_bias", "head", words)


def _text_passes(arch: Any) -> int:
    """Count the FLOPs of a pair's texts beside the queries, and of matching."""
    qformer = arch.connector.qformer
    width = qformer.hidden_size
    inner = qformer.ffn_hidden_size
    queries = qformer.queries
    tokens = arch.vision.tokens
    texts = arch.image_text.text_tokens

    def layer(rows: int, pairs: int) -> int:
        return rows * (8 * width * width + 4 * width * inner) + 4 * pairs * width

    beside = layer(2 * texts, texts * (2 * texts + queries))
    matched = layer(queries + texts, (queries + texts) ** 2)
    cross = 4 * queries * width * width + 4 * tokens * arch.vision.hidden_size * width
    cross += 4 * queries * tokens * width
    crossed = sum(map(qformer.has_cross_attention, range(qformer.num_layers)))
    return qformer.num_layers * (beside + 3 * matched) + 3 * crossed * cross


def kept(arch: Any) -> float:
    """Count the elements of a pair that the passes over texts keep for the backward pass."""
    qformer = arch.connector.qformer
    texts = arch.image_text.text_tokens
    rows = 2 * texts + 3 * (qformer.queries + texts)
    of_row = qformer.num_layers * (7 * qformer.hidden_size + 2 * qformer.ffn_hidden_size)
    crossed = sum(map(qformer.has_cross_attention, range(qformer.num_layers)))
    of_tokens = 2 * arch.vision.hidden_size + crossed * 2 * qformer.hidden_size
    return rows * of_row + 3 * arch.vision.tokens * of_tokens + 2 * texts * qformer.vocab_size


def pooled(arch: Any) -> float:
    """Count the elements of a pair that each rank holds for its whole pool: hidden states of the
    vision encoder, as gathered and in the order of the packs.
    """
    return 2 * arch.vision.tokens * arch.vision.hidden_size


def fit(arch: Any) -> Any:
    """Let the Q-Former of a model read texts of pairs."""
    qformer = replace(arch.connector.qformer, text=True, instruction_tokens=0)
    return replace(arch, connector=replace(arch.connector, qformer=qformer))


def problems(arch: Any) -> Iterator[str]:
    """Yield what is wrong with the settings, or with the connector for this objective."""
    settings = arch.image_text
    flag = "--architecture.image_text"
    if arch.connector.kind != "qformer" or not arch.connector.qformer.text:
        yield (
            f"--architecture.connector.kind {arch.connector.kind}: --architecture.objective qformer"
            " trains a Q-Former that reads texts; use qformer with"
            " --architecture.connector.qformer.text true"
        )
    if arch.connector.instruction_tokens:
        yield (
            "--architecture.connector.qformer.instruction_tokens"
            f" {arch.connector.instruction_tokens}: --architecture.objective qformer reads texts of"
            " pairs, and no instructions; use 0"
        )
    for name in ("contrast", "matching", "generation"):
        if not 0 <= vars(settings)[name] < float("inf"):
            yield f"{flag}.{name} {vars(settings)[name]}: must be 0 or more"
    if not any(settings.weights.values()):
        yield f"{flag}.contrast, .matching and .generation are all 0, so nothing would be trained"
    if not 0 <= settings.label_smoothing < 1:
        yield f"{flag}.label_smoothing {settings.label_smoothing}: must be from 0 to below 1"
    for name, least in (("size", 1), ("text_tokens", 2), ("pool_packs", 0)):
        if vars(settings)[name] < least:
            yield f"{flag}.{name} {vars(settings)[name]}: must be {least} or more"
    longest = arch.connector.qformer.max_position_embeddings
    if settings.text_tokens > longest:
        yield (
            f"{flag}.text_tokens {settings.text_tokens}: the Q-Former reads texts of at most"
            f" --architecture.connector.qformer.max_position_embeddings {longest} tokens"
        )


def gathered_bytes(arch: Any, mask: Sequence[str], size: int) -> float:
    """Count the bytes of a pair that data-parallel ranks gather, and of gradients: embeddings in
    float32, hidden states of the vision encoder, and the text with its length.

    Args:
        arch: the model.
        mask: freeze mask.
        size: bytes of an element of the hidden states.
    """
    settings = arch.image_text
    embeddings = 4 * (arch.connector.qformer.queries + 1) * settings.size
    hidden = size * arch.vision.layer_tokens * arch.vision.hidden_size
    found = embeddings * (2 if settings.gradient == "global" else 1)
    found += hidden * (2 if trains("vision", mask) else 1)
    return found + 8.0 * (settings.text_tokens + 1)
