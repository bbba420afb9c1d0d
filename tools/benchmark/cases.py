"""What is measured, and in which order: the rows that answer most come first, so that a run that is cut short is of use.

A case is one model, stage, number format and implementation. `megavlm` is this project; what `transformers` and its variants are, says
`peer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from megavlm.config.mask import matches
from megavlm.config.models import architecture
from megavlm.config.schema import Architecture
from megavlm.config.stages import STAGES
from megavlm.parallel.cost import pieces, training_cost

OURS = "megavlm"
CAPACITY = 16384
# What a pack of real data holds on average; the packs that are made are alike.
TYPICAL_PACK = {"tokens": 16200.0, "squared_lengths": 16200.0 * 3000, "tiles": 50.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the results.

    Args:
        model: name in the table of models.
        stage: name in the table of stages.
        precision: bf16, fp32, or fp8_ and a recipe.
        implementation: megavlm, or a variant of transformers.
        recompute: what the backward pass computes again: none, selective or full.
        moments: number format of Adam's moments.
        kernels: layers of megavlm: auto (Transformer Engine's, where they run) or local.
        is_profiled: whether one more step is looked into, kernel by kernel.
        limit_s: seconds after which the case is given up.
    """

    model: str
    stage: str
    precision: str = "bf16"
    implementation: str = OURS
    recompute: str = "none"
    moments: str = "float32"
    kernels: str = "auto"
    is_profiled: bool = False
    limit_s: int = 75

    @property
    def name(self) -> str:
        """Unlike every other case's, such as ``2b-stage2-bf16-megavlm-recompute_full``."""
        extras = [f"recompute_{self.recompute}"] * (self.recompute != "none")
        extras += ["bf16_moments"] * (self.moments == "bfloat16") + ["local"] * (self.kernels == "local")
        return "-".join([self.model.rpartition("-")[2], f"stage{self.stage}", self.precision, self.implementation, *extras])

    @property
    def architecture(self) -> Architecture:
        """The model's shapes."""
        return architecture(self.model)

    @property
    def trainable(self) -> tuple[str, ...]:
        """The stage's freeze mask."""
        return STAGES[self.stage].training.trainable


def stage_of(*trainable: str) -> str:
    """Name of the stage that trains these parts."""
    return next(name for name, stage in STAGES.items() if stage.training.trainable == trainable)


PROJECTOR, VISION, ALL = stage_of("projector"), stage_of("vision", "projector"), stage_of("vision", "projector", "language")


def _case(size: str, stage: str, precision: str = "bf16", implementation: str = OURS, **settings) -> Case:
    return Case(model=f"internvl2_5-{size}", stage=stage, precision=precision, implementation=implementation, **settings)


def all_cases() -> list[Case]:
    """Every case, in order."""
    return [
        # Is it fast, does FP8 help, is it faster than what people use?
        _case("2b", ALL, is_profiled=True),
        _case("2b", ALL, "fp8_tensorwise", is_profiled=True),
        _case("2b", ALL, implementation="transformers", is_profiled=True),
        _case("4b", ALL, recompute="selective", is_profiled=True),
        _case("2b", PROJECTOR, is_profiled=True),
        _case("2b", ALL, "fp8_blockwise", is_profiled=True),
        _case("2b", ALL, "fp8_delayed"),
        _case("2b", VISION),
        _case("2b", ALL, implementation="transformers_packed"),
        _case("4b", ALL, "fp8_tensorwise", recompute="selective"),
        # What does saving memory cost?
        _case("2b", ALL, recompute="selective"),
        _case("2b", ALL, recompute="full"),
        # What if Transformer Engine cannot be had?
        _case("2b", ALL, recompute="selective", kernels="local", is_profiled=True),
        _case("1b", ALL),
        _case("2b", ALL, implementation="transformers_packed", recompute="full"),
        _case("8b", PROJECTOR, recompute="full"),
        _case("8b", ALL, recompute="full", moments="bfloat16"),
        _case("2b", ALL, implementation="transformers_compiled", limit_s=110),
        # The rest of the grid.
        _case("2b", ALL, implementation="transformers_padded"),
        _case("2b", ALL, implementation="transformers_packed_compiled", recompute="full", limit_s=110),
        _case("2b", PROJECTOR, "fp8_tensorwise"),
        _case("2b", VISION, "fp8_tensorwise"),
        _case("2b", PROJECTOR, implementation="transformers"),
        _case("1b", ALL, "fp8_tensorwise"),
        _case("1b", ALL, implementation="transformers"),
        _case("4b", ALL, "fp8_blockwise", recompute="selective"),
        _case("4b", ALL, implementation="transformers", recompute="full"),
        _case("8b", VISION, recompute="full"),
        _case("8b", PROJECTOR, "fp8_tensorwise", recompute="full"),
        _case("2b", ALL, "fp8_tensorwise", recompute="full"),
        _case("2b", ALL, implementation="transformers_packed_flex", recompute="full", limit_s=110),
    ]


def smoke_cases() -> list[Case]:
    """The same kinds of cases with a model of a few weights, for trying the benchmark itself on any machine."""
    kinds: dict[tuple[str, ...], Case] = {}
    for case in all_cases():
        if case.moments == "float32":
            alike = replace(case, model="tiny", limit_s=2 * case.limit_s)
            kinds.setdefault((case.stage, case.precision, case.implementation, case.recompute, case.kernels), alike)
    return list(kinds.values())


def chosen(cases: list[Case], patterns: str) -> list[Case]:
    """The cases whose name is, holds or matches one of the patterns, which commas separate; all for none.

    Raises:
        ValueError: there are none.
    """
    wanted, names = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()], {case.name for case in cases}

    def fits(name: str, pattern: str) -> bool:
        return name == pattern if pattern in names else pattern in name or fnmatchcase(name, pattern)

    found = [case for case in cases if not wanted or any(fits(case.name, pattern) for pattern in wanted)]
    if not found:
        raise ValueError(f"--cases {patterns}: no case is called so; --dry_run lists them")
    return found


def predicted_tflop(case: Case) -> float:
    """Model FLOPs of one step, in 10^12, on a typical pack."""
    return training_cost(case.architecture, case.trainable).total(**TYPICAL_PACK) / 1e12


def predicted_gib(case: Case) -> float:
    """Memory of a step of megavlm on a typical pack, reckoned, not measured.

    Weights take 2 bytes; trained ones also a float32 gradient and float32 main weights, and two moments. Activations are counted as
    Korthikanti et al. (arXiv 2205.05198, section 4) do, for layers whose attention keeps no probabilities.
    """
    arch, trainable = case.architecture, case.trainable
    vision, language = arch.vision, arch.language
    listed = [piece for piece in pieces(arch) if piece.key]
    trained = sum(piece.numbers for piece in listed if any(matches(piece.key, pattern) for pattern in trainable))
    moments = 4 if case.moments == "bfloat16" else 8
    weights = 2 * sum(piece.numbers for piece in listed) + (8 + moments) * trained
    kv = 2 * language.num_query_groups * (language.hidden_size // language.num_attention_heads)
    language_layer = 6 * language.hidden_size + kv + 3 * language.ffn_hidden_size
    vision_layer = 10 * vision.hidden_size + 2 * vision.ffn_hidden_size
    if case.recompute == "full":
        kept = language.num_layers * language.hidden_size + language_layer, vision.num_layers * vision.hidden_size + vision_layer
    else:
        inside = case.recompute == "selective"
        kept = (
            language.num_layers * (language_layer - 3 * language.ffn_hidden_size * inside),
            vision.num_layers * (vision_layer - 2 * vision.ffn_hidden_size * inside),
        )
    vision_is_trained = any(pattern == "vision" for pattern in trainable)
    tile_tokens = TYPICAL_PACK["tiles"] * vision.tokens
    activations = 2 * (CAPACITY * kept[0] + tile_tokens * (kept[1] if vision_is_trained else vision_layer))
    logits = CAPACITY * language.vocab_size * (2 + 4 + 2)
    return (weights + activations + logits) / 2**30
