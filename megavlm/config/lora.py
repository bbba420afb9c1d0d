"""LoRA adapters (Hu et al., arXiv 2106.09685): which linear layers have one, and how large it is.

An adapter adds ``alpha / rank * B A x`` to what a linear layer makes of ``x``. Queries, keys and
values have an A each, as in PEFT, and so have gate and up; the A's of one layer are stacked. A
family whose files hold them as one weight has one A for all of them, as PEFT gives it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megavlm.config.differences import changed
from megavlm.config.freeze_mask import matches, matches_any

LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Linear layers of a transformer layer, in the order of the forward pass."""
EXPERT_LINEARS = ("linear_fc1", "linear_fc2")
"""Linear layers of an expert."""
MAGNITUDE = ".lora.magnitude"
"""End of the keys of DoRA's norms."""
SMALLEST_NORM = 1e-15
"""Taken for that of a row of zeros, which is padding."""
NF4_BLOCK = 64
"""Numbers of a row that share a scale in 4 bits."""
_ADAPTABLE = re.compile(
    r"(vision\.encoder|language\.decoder)\.layers\.\d+\.("
    + "|".join(re.escape(name) for name in LINEARS)
    + r"|mlp\.experts\.\d+\.linear_fc[12])\.weight"
)


# Families whose files have one weight for queries, keys and values, or for gate and up.
_ONE_QKV = ("eva", "persimmon", "phi3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_ONE_GATE_AND_UP = ("phi3",)


_CALLED = f"{', '.join(LINEARS)}, and of experts mlp.experts.*.linear_fc1 and linear_fc2"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA adapters beside frozen linear layers.

    Args:
        rank: rows of A and columns of B; 0: no adapters.
        alpha: the adapters' output is multiplied by alpha / rank; 0: twice the rank, as in
            InternVL.
        dropout: share of the numbers that enter A which are zero in training. The draws belong to
            the token or tile, so they are the same at every layout.
        targets: linear layers that have an adapter: parts or patterns of names, as for
            ``training.trainable``, such as ``language.*.self_attention``, ``*.linear_fc2`` or
            ``language.*.experts``.
        nf4: frozen linear layers whose weights are kept in 4 bits (QLoRA's NF4), named as in
            ``targets``; empty: none.
        dora: train the norm of each row of an adapted weight apart from its direction, which the
            adapter changes (DoRA, arXiv 2402.09353).
    """

    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("language",)
    nf4: tuple[str, ...] = ()
    dora: bool = False

    @property
    def scale(self) -> float:
        """Factor of the adapters' output."""
        return (self.alpha or 2.0 * self.rank) / self.rank

    def adapts(self, key: str) -> bool:
        """Return whether the weight ``key`` of a linear layer has an adapter."""
        return (
            self.rank > 0
            and _ADAPTABLE.fullmatch(key) is not None
            and matches_any(key, self.targets)
        )

    def quantises(self, key: str) -> bool:
        """Return whether the weight ``key`` of a linear layer is kept in 4 bits."""
        return _ADAPTABLE.fullmatch(key) is not None and matches_any(key, self.nf4)


def linear_names(experts: int) -> tuple[str, ...]:
    """Return the names of the linear layers of a transformer layer.

    Args:
        experts: in the place of its MLP; 0: none.
    """
    if not experts:
        return LINEARS
    of_experts = (f"mlp.experts.{number}" for number in range(experts))
    return (*LINEARS[:2], *(f"{stem}.{name}" for stem in of_experts for name in EXPERT_LINEARS))


def stacked(architecture: Any, key: str) -> int:
    """Return the number of A's of a layer: one for each of Hugging Face's weights that its weight
    holds.

    Args:
        architecture: ``schema.Architecture``.
        key: of the weight.
    """
    part = architecture.vision if key.startswith("vision.") else architecture.language
    family = part.family
    if key.endswith("linear_qkv.weight"):
        return 1 if family in _ONE_QKV else 3
    holds_both = part.is_gated and key.endswith("linear_fc1.weight")
    return 2 if holds_both and family not in _ONE_GATE_AND_UP else 1


def is_adapter(key: str) -> bool:
    """Return whether a checkpoint key is one of an adapter."""
    return key.endswith((".lora.a", ".lora.b", MAGNITUDE))


def dropout_problems(lora: Lora, parallel: Any) -> Iterator[str]:
    """Name what keeps the draws of dropout from being those of every layout.

    Args:
        lora: the settings.
        parallel: ``schema.Parallel``.
    """
    flag = f"--architecture.lora.dropout {lora.dropout}"
    if not 0 <= lora.dropout < 1:
        yield f"{flag}: must be 0 or more, and less than 1"
    if not lora.dropout:
        return
    if parallel.context_parallel_size > 1:
        yield (
            f"{flag}: with --parallel.context_parallel_size {parallel.context_parallel_size} an"
            " adapter does not know the positions of its tokens; use 0, or no context parallelism"
        )


def lora_problems(lora: Lora, trainable: Sequence[str], keys: Collection[str]) -> Iterator[str]:
    """Name what is wrong with the adapters of a model.

    Args:
        lora: the settings.
        trainable: the freeze mask.
        keys: checkpoint keys of all parameters.
    """
    if lora.rank < 0 or lora.alpha < 0:
        yield "--architecture.lora.rank and --architecture.lora.alpha: must be 0 or more"
        return
    if not lora.rank:
        for name in changed(lora):
            yield (
                f"--architecture.lora.{name} has no effect without --architecture.lora.rank, such"
                " as 16"
            )
        return
    yield from _dora_problems(lora)
    for pattern in lora.targets:
        one = replace(lora, targets=(pattern,))
        if not any(one.adapts(key) for key in keys):
            yield (
                f"--architecture.lora.targets {pattern}: means no linear layer of the vision"
                f" encoder or language model; those are called {_CALLED}"
            )
    for pattern in lora.nf4:
        one = replace(lora, nf4=(pattern,))
        if not any(one.quantises(key) for key in keys):
            yield (
                f"--architecture.lora.nf4 {pattern}: means no linear layer of the vision encoder or"
                f" language model; those are called {_CALLED}"
            )
        for key in keys:
            if one.quantises(key) and matches_any(key, trainable):
                yield (
                    f"--architecture.lora.nf4 {pattern}: {key} is trained, and 4 bits are for"
                    " frozen weights; leave it out of --training.trainable"
                )
                break
    frozen = [key for key in keys if lora.adapts(key)]
    for pattern in trainable:
        both = next((key for key in frozen if matches(key, pattern)), None)
        if both:
            yield (
                f"--training.trainable {pattern}: trains {both}, which has an adapter; leave it"
                " out, or take it out of --architecture.lora.targets"
            )
    own = [key for key in keys if is_adapter(key)]
    if own and not any(matches(key, pattern) for key in own for pattern in trainable):
        parts = sorted({key.split(".")[0] for key in own})
        yield "--training.trainable: must hold the adapters, " + ", ".join(
            f"{part}.*.lora" for part in parts
        )


def _dora_problems(lora: Lora) -> Iterator[str]:
    """Name what DoRA excludes."""
    if lora.dora and lora.dropout:
        yield (
            f"--architecture.lora.dropout {lora.dropout}: with --architecture.lora.dora true the"
            " frozen weight would need a product of its own with what dropout leaves; use 0"
        )
    if lora.dora and lora.nf4:
        yield (
            "--architecture.lora.dora true reads the frozen weights for their norms, and those of"
            " --architecture.lora.nf4 are in 4 bits; use one of them"
        )
