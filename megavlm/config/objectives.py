"""Objectives: what a model is trained to do, and what that asks of the model and of its packs.

An objective is known in two places, by the same name: what it needs here, which the planner, the
checks and the loader read, and its module in ``megavlm/model/objective``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from megavlm.config import image_text, preference
from megavlm.config.pieces import Piece, linear, norm, table, vector

EMBEDDING = "language.embedding.word_embeddings.weight"


class Parts(Protocol):
    """The parts of a model, as ``Architecture`` has them, which asks this module."""

    vision: Any
    connector: Any
    language: Any
    contrastive: Any
    image_text: Any
    preference: Any
    cross_attention: Any
    memory_size: int
    added_tokens: int
    table_rows: int


def _longest_sample(arch: Parts) -> tuple[str, int] | None:
    """Learned positions are a table; rotary ones have no end."""
    language = arch.language
    if not language.has_learned_positions:
        return None
    return "--architecture.language.max_position_embeddings", language.max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class ObjectiveNeeds:
    """What an objective needs.

    Args:
        description: one line, for people.
        has_language: whether the model has a language model. Without one the pipeline ends behind
            the vision encoder: connector and objective stand in the last chunk.
        has_vocabulary_head: whether the language model ends in logits over its vocabulary.
        is_of_pairs: whether each sample of a pack is one image and its text, the image without
            placeholder tokens in the text.
        is_of_preferences: whether packs hold preferences: each sample is a chosen answer, or a
            rejected one beside it.
        takes_one_embedding: whether the connector gives one embedding of a tile.
        spans_step: whether the loss of a sample depends on all samples of the step, those of other
            microbatches and data-parallel ranks included.
        head: yields what stands behind the last layer, for the planner.
        head_input: width of what the head reads; its fresh matrices are drawn for it.
        kept: activations that the head keeps for the backward pass, in elements for each tile.
        step_bytes: bytes of what the loss of a step needs beside embeddings, on a data-parallel
            rank with so many samples of so many.
        packs_at_once: packs of a data-parallel rank whose losses are computed together, of so many
            packs of so many ranks. If they are several, all packs run forward twice, first without
            gradients.
        riding: elements that ride through the language model beside the tokens, for each tile.
        gathered_bytes: bytes for each pair that data-parallel ranks gather from each other, and of
            gradients that they send back, under a freeze mask, for activations of so many bytes.
        pooled: elements that each rank holds for each tile of all packs that are contrasted with
            each other.
        losses: names of the losses that the total is made of, and their weights; none: there is one
            loss.
        readings: names of figures that are logged beside the losses.
        vocabulary: option that holds the rows of the table that token ids index, and the rows.
        connector_output: width of what the connector gives.
        fit: changes the model of a recipe to what the objective trains.
        problems: yields what is wrong with the model's settings for it, for the checks.
        longest_sample: option that bounds the tokens of a sample, and the bound; none: no bound.
        constants: values that weights start from, for weights that are not drawn.
    """

    description: str
    has_language: bool = True
    has_vocabulary_head: bool = True
    is_of_pairs: bool = False
    is_of_preferences: bool = False
    takes_one_embedding: bool = False
    spans_step: bool = False
    head: Callable[[Parts], Iterator[Piece]]
    connector_output: Callable[[Parts], int]
    fit: Callable[[Any], Any] = lambda arch: arch
    problems: Callable[[Parts], Iterator[str]] = lambda arch: iter(())
    longest_sample: Callable[[Parts], tuple[str, int] | None] = _longest_sample
    constants: Callable[[Parts], dict[str, float]] = lambda arch: {}
    head_input: Callable[[Parts], int] = lambda arch: arch.language.hidden_size
    kept: Callable[[Parts], float] = lambda arch: 0.0
    step_bytes: Callable[[Parts, float, float], float] = lambda arch, own, everyone: 0.0
    packs_at_once: Callable[[Parts, int, int], int] = lambda arch, packs, ranks: 1
    riding: Callable[[Parts], int] = lambda arch: 0
    gathered_bytes: Callable[[Parts, Sequence[str], int], float] = lambda arch, mask, size: 0.0
    pooled: Callable[[Parts], float] = lambda arch: 0.0
    losses: Callable[[Parts], dict[str, float]] = lambda arch: {}
    readings: tuple[str, ...] = ()
    vocabulary: Callable[[Parts], tuple[str, int]] = lambda arch: (
        "--architecture.language.vocab_size",
        arch.language.vocab_size,
    )

    def trains_model_of(self, other: ObjectiveNeeds) -> bool:
        """Return whether the models of both objectives have the same parts, so that one can go on
        with what the other has trained.
        """
        return self is other or (self.has_vocabulary_head and other.has_vocabulary_head)


def vocabulary_head(arch: Parts) -> Iterator[Piece]:
    """Yield the final norm, and the head over the vocabulary."""
    language = arch.language
    width = language.hidden_size
    words = arch.table_rows
    has_bias = language.has_layer_norm
    yield from norm("language.decoder.final_layernorm", "head", width, has_bias=has_bias)
    if language.tied_head:
        yield Piece(
            key=EMBEDDING, part="head", elements=0, forward=2 * width * words, unit="supervised"
        )
    else:
        yield from linear(
            "language.output_layer", "head", width, words, rows=1, unit="supervised", has_bias=False
        )
    if arch.added_tokens:
        yield replace(
            table("language.added_head.weight", "head", arch.added_tokens, width),
            forward=2 * width * arch.added_tokens,
            unit="supervised",
        )


def _next_token_input(arch: Parts) -> int:
    """Return the width of what enters the language model, beside its tokens or in their places."""
    return arch.memory_size if arch.cross_attention.every else arch.language.hidden_size


def _contrastive_head(arch: Parts) -> Iterator[Piece]:
    """Yield the final norm, the projection of the texts, scale and bias of the loss."""
    language = arch.language
    width = language.hidden_size
    settings = arch.contrastive
    has_bias = language.has_layer_norm
    yield from norm("language.decoder.final_layernorm", "head", width, has_bias=has_bias)
    # A text is a pair's, and so is its tile.
    yield from linear(
        "objective.text_projection",
        "head",
        width,
        settings.size,
        rows=1,
        unit="tile",
        has_bias=settings.text_bias,
    )
    yield vector("objective.logit_scale", "head", 1)
    if settings.loss == "sigmoid":
        yield vector("objective.logit_bias", "head", 1)


def _similarity_bytes(arch: Parts, own: float, everyone: float) -> float:
    """Count the float32 similarities of a rank's pairs, forward and backward: by cross-entropy in
    both directions, before and after scale and softmax, with their gradients; by the sigmoid loss
    with bias, signs and gradients; around a ring with the pairs of one rank at a time.
    """
    settings = arch.contrastive
    if settings.exchange == "ring":
        return 4 * 5 * own * own
    return 4 * (8 if settings.loss == "softmax" else 6) * own * everyone


def _embedding_bytes(arch: Parts, mask: Sequence[str], size: int) -> float:
    """Count the float32 embeddings of a pair that are gathered, and their gradients: by
    cross-entropy of image and text, by the sigmoid loss of the text. Around a ring the texts go
    twice, and their gradients once.
    """
    settings = arch.contrastive
    times = 3 if settings.exchange == "ring" else {"softmax": 4, "sigmoid": 2}[settings.loss]
    return 4.0 * times * settings.size


def _contrastive_constants(arch: Parts) -> dict[str, float]:
    """Return scale and bias as the papers start them: 1 / 0.07; and 10 and -10."""
    if arch.contrastive.loss == "softmax":
        return {"objective.logit_scale": math.log(1 / 0.07)}
    return {"objective.logit_scale": math.log(10.0), "objective.logit_bias": -10.0}


OBJECTIVES: dict[str, ObjectiveNeeds] = {
    "next_token": ObjectiveNeeds(
        description="cross-entropy of the next token of answers, images among the tokens",
        head=vocabulary_head,
        connector_output=_next_token_input,
    ),
    "preference": ObjectiveNeeds(
        description="a chosen answer against a rejected one, behind a frozen reference (DPO, MPO)",
        is_of_preferences=True,
        head=vocabulary_head,
        connector_output=_next_token_input,
        losses=lambda arch: arch.preference.weights,
        readings=preference.READINGS,
        problems=preference.problems,
    ),
    "contrastive": ObjectiveNeeds(
        description="similar embeddings of an image and its own text, others unlike",
        has_vocabulary_head=False,
        is_of_pairs=True,
        takes_one_embedding=True,
        spans_step=True,
        head=_contrastive_head,
        connector_output=lambda arch: arch.contrastive.size,
        step_bytes=_similarity_bytes,
        packs_at_once=lambda arch, packs, ranks: packs,
        riding=lambda arch: arch.contrastive.size,
        gathered_bytes=_embedding_bytes,
        constants=_contrastive_constants,
    ),
    "qformer": ObjectiveNeeds(
        description="a Q-Former's contrast, matching and generation of texts; no language model",
        has_language=False,
        has_vocabulary_head=False,
        is_of_pairs=True,
        spans_step=True,
        head=image_text.head,
        head_input=lambda arch: arch.connector.qformer.hidden_size,
        kept=image_text.kept,
        pooled=image_text.pooled,
        packs_at_once=lambda arch, packs, ranks: arch.image_text.packs_at_once(packs, ranks),
        gathered_bytes=image_text.gathered_bytes,
        connector_output=lambda arch: 0,
        constants=lambda arch: {"objective.temperature": image_text.START_TEMPERATURE},
        losses=lambda arch: arch.image_text.weights,
        readings=image_text.READINGS,
        fit=image_text.fit,
        problems=image_text.problems,
        vocabulary=lambda arch: (
            "--architecture.connector.qformer.vocab_size",
            arch.connector.qformer.vocab_size,
        ),
        longest_sample=lambda arch: (
            "--architecture.image_text.text_tokens",
            arch.image_text.text_tokens,
        ),
    ),
}


def needs_of(name: str) -> ObjectiveNeeds:
    """Return what an objective needs.

    Raises:
        ValueError: there is no such objective; the message lists the names.
    """
    if name not in OBJECTIVES:
        raise ValueError(
            f"--architecture.objective {name}: no such objective; known are {', '.join(OBJECTIVES)}"
        )
    return OBJECTIVES[name]
