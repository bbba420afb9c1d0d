"""What is measured, and in which order: the rows that answer most come first, so that a run that is
cut short is of use.

A case is one model, stage, dtype and implementation. `megavlm` is this project; what
`transformers` and its variants are, says `peer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from megavlm.config.models import architecture
from megavlm.config.recipes import RECIPES
from megavlm.config.recipes.internvl import STAGES
from megavlm.config.recipes.recipe import Stage
from megavlm.config.schema import Architecture, Checkpoint, Config, Data, Fp8, Parallel
from megavlm.planner.flops import training_cost
from megavlm.planner.layout import make_layout
from megavlm.planner.memory import memory

OURS = "megavlm"
PRECISIONS = {"bf16": "bfloat16", "fp32": "float32"}
CAPACITY = 16384
# The rest is for CUDA, NCCL, and what the allocator cannot use.
USABLE = 0.93
# What a pack of real data holds on average; the packs that are made are alike.
TYPICAL_PACK = {
    "tokens": 16200.0,
    "squared_lengths": 16200.0 * 3000,
    "tiles": 47.0,
    "supervised": 4050.0,
}
# The same for images that keep their size, each tile of which is one token.
TYPICAL_NATIVE_PACK = {
    "tokens": 16300.0,
    "squared_lengths": 16300.0 * 1080,
    "tiles": 11400.0,
    "squared_tiles": 11400.0 * 770,
    "supervised": 4050.0,
}
_QWEN = RECIPES["qwen2_5_vl"].architecture
# Qwen2.5-VL's parts with a few weights, to try the benchmark.
_TINY_NATIVE = replace(
    _QWEN,
    vision=replace(
        _QWEN.vision,
        image_size=8,
        patch_size=4,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        window_size=16,
        full_attention_layers=(1,),
    ),
    language=replace(
        _QWEN.language,
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=512,
        rotary_sections=(2, 3, 3),
        max_position_embeddings=2048,
    ),
)
SMOKE_MODELS = {"tiny_native": _TINY_NATIVE}
"""Models of a few weights that are in no other table."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the results.

    Args:
        model: name in the table of models.
        stage: name in the recipe's table of stages.
        recipe: of the model.
        precision: bf16, fp32, or fp8_ and a recipe.
        implementation: megavlm, or a variant of transformers.
        recompute: what the backward pass computes again: none, selective or full.
        recompute_parts: of which parts.
        moments: dtype of Adam's moments.
        kernels: layers of megavlm: auto (Transformer Engine's, where they run) or local.
        is_profiled: whether one more step is looked into, kernel by kernel.
        fp8_parts: what is in FP8, if anything is.
        head_tokens: tokens that logits are computed for: supervised ones or all.
        packs_per_step: microbatches of a step, which share one update of the optimizer.
        layers: of the language model, so that a large one fits; 0: all.
        limit_s: seconds after which the case is given up.
    """

    model: str
    stage: str
    recipe: str = "internvl"
    precision: str = "bf16"
    implementation: str = OURS
    recompute: str = "none"
    recompute_parts: tuple[str, ...] = ("vision", "language")
    moments: str = "float32"
    kernels: str = "auto"
    is_profiled: bool = False
    fp8_parts: tuple[str, ...] = ("vision", "language")
    head_tokens: str = "supervised"
    packs_per_step: int = 1
    layers: int = 0
    limit_s: int = 75

    @property
    def name(self) -> str:
        """Unlike every other case's, such as ``2b-stage2-bf16-megavlm-recompute_full``."""
        extras = []
        if self.recompute != "none":
            of = self.recompute_parts if len(self.recompute_parts) == 1 else ()
            extras.append("_".join(["recompute", self.recompute, *of]))
        if self.moments == "bfloat16":
            extras.append("bf16_moments")
        if self.kernels == "local":
            extras.append("local")
        extras += [f"{self.fp8_parts[0]}_only"] if len(self.fp8_parts) == 1 else []
        extras += ["all_tokens"] if self.head_tokens == "all" else []
        extras += [f"{self.packs_per_step}_packs"] if self.packs_per_step > 1 else []
        extras += [f"{self.layers}_layers"] if self.layers else []
        size = self.model.rpartition("-")[2]
        return "-".join(
            [
                size if self.recipe == "internvl" else self.model,
                f"stage{self.stage}",
                self.precision,
                self.implementation,
                *extras,
            ]
        )

    @property
    def architecture(self) -> Architecture:
        """The model's shapes."""
        found = SMOKE_MODELS.get(self.model) or architecture(self.model)
        if not self.layers:
            return found
        return replace(found, language=replace(found.language, num_layers=self.layers))

    @property
    def stage_row(self) -> Stage:
        """What the recipe says of the stage."""
        return RECIPES[self.recipe].stage(self.stage)

    @property
    def packs(self) -> str:
        """Which packs it trains on: those of its tiles."""
        vision = self.architecture.vision
        return f"{'native' if vision.spans_tiles else 'dynamic'}-{vision.image_size}"

    @property
    def typical_pack(self) -> dict[str, float]:
        """What a pack of real data holds on average."""
        spans_tiles = self.architecture.vision.spans_tiles
        return TYPICAL_NATIVE_PACK if spans_tiles else TYPICAL_PACK

    def config(self, train: str) -> Config:
        """megavlm's configuration: the stage's recipe, on one rank and one pack a step.

        Args:
            train: folder of the packs.
        """
        row = self.stage_row
        recipe = self.precision.removeprefix("fp8_")
        is_fp8 = recipe != self.precision
        number = "bfloat16" if is_fp8 else PRECISIONS[self.precision]
        return Config(
            recipe=self.recipe,
            stage=self.stage,
            model=self.model,
            architecture=self.architecture,
            data=Data(train=train, loss_reduction=row.loss_reduction),
            parallel=Parallel(recompute=self.recompute, recompute_parts=self.recompute_parts),
            optimizer=replace(row.optimizer, moments=self.moments),
            training=replace(
                row.training,
                precision=number,
                kernels=self.kernels,
                head_tokens=self.head_tokens,
                global_batch_size=self.packs_per_step,
            ),
            fp8=Fp8(**dict.fromkeys(self.fp8_parts, recipe)) if is_fp8 else Fp8(),
            checkpoint=Checkpoint(save_interval=0),
        )

    @property
    def trainable(self) -> tuple[str, ...]:
        """The stage's freeze mask."""
        return self.stage_row.training.trainable


def stage_of(*trainable: str) -> str:
    """Name of the stage that trains these parts."""
    return next(name for name, stage in STAGES.items() if stage.training.trainable == trainable)


CONNECTOR = stage_of("connector")
VISION = stage_of("vision", "connector")
ALL = stage_of("vision", "connector", "language")


def _case(
    size: str, stage: str, precision: str = "bf16", implementation: str = OURS, **settings
) -> Case:
    return Case(
        model=f"internvl2_5-{size}",
        stage=stage,
        precision=precision,
        implementation=implementation,
        **settings,
    )


# What 4B takes on an H200 without computing the language model again.
_BARELY_FITS = dict(
    recompute="full", recompute_parts=("vision",), moments="bfloat16", packs_per_step=4
)


def all_cases() -> list[Case]:
    """Every case, in order."""
    return [*_telling_cases(), *_rest_of_the_grid()]


def _telling_cases() -> list[Case]:
    return [
        # Is it fast, does FP8 help, is it faster than what people use?
        _case("2b", ALL, is_profiled=True),
        _case("2b", ALL, "fp8_tensorwise", is_profiled=True),
        # The same in the memory of an H100, which cannot run the first.
        _case("2b", ALL, recompute="selective", moments="bfloat16", is_profiled=True),
        _case("2b", ALL, recompute="full", is_profiled=True),
        _case("4b", ALL, recompute="full", moments="bfloat16"),
        _case("2b", ALL, "fp8_tensorwise", recompute="full"),
        # Real runs have several packs for each update of the optimizer.
        _case("2b", ALL, recompute="full", packs_per_step=4),
        _case("2b", ALL, packs_per_step=4, is_profiled=True),
        _case("2b", ALL, "fp8_tensorwise", packs_per_step=4),
        _case("2b", ALL, "fp8_tensorwise", packs_per_step=4, fp8_parts=("language",)),
        _case("2b", ALL, "fp8_delayed", packs_per_step=4, is_profiled=True),
        _case("2b", ALL, recompute="selective"),
        _case("2b", ALL, implementation="transformers", is_profiled=True),
        _case("4b", ALL, recompute="selective", is_profiled=True),
        _case("2b", CONNECTOR, is_profiled=True),
        _case("2b", ALL, "fp8_blockwise", is_profiled=True),
        _case("2b", VISION),
        _case("2b", ALL, implementation="transformers_packed"),
        _case("4b", ALL, "fp8_tensorwise", recompute="selective", packs_per_step=4),
        _case("4b", ALL, recompute="selective", packs_per_step=4),
        _case("4b", ALL, **_BARELY_FITS, is_profiled=True),
        _case("4b", ALL, "fp8_delayed", **_BARELY_FITS, is_profiled=True),
        # What if Transformer Engine cannot be had?
        _case("2b", ALL, recompute="selective", kernels="local", is_profiled=True),
        _case("2b", ALL, recompute="selective", head_tokens="all"),
        _case("1b", ALL),
        _case("2b", ALL, implementation="transformers_packed", recompute="full"),
        _case("8b", CONNECTOR, recompute="full"),
        _case("8b", ALL, recompute="full", moments="bfloat16", packs_per_step=4),
        _case("8b", ALL, "fp8_delayed", recompute="full", moments="bfloat16", packs_per_step=4),
        # Experts, as many layers as one GPU holds.
        Case(
            model="internvl3_5-30b-a3b",
            stage=ALL,
            recompute="selective",
            moments="bfloat16",
            layers=6,
            is_profiled=True,
        ),
        # Images of any size.
        _native("qwen2_5_vl", "qwen2_5-vl-3b", is_profiled=True),
        _native("qwen3_vl", "qwen3-vl-2b", is_profiled=True),
        _native("qwen3_vl", "qwen3-vl-4b", moments="bfloat16"),
        _case("2b", ALL, implementation="transformers_compiled", limit_s=110),
    ]


def _native(recipe: str, model: str, **settings) -> Case:
    """Return a case of a model that reads images of any size, all of which is trained."""
    return Case(model=model, stage="2", recipe=recipe, recompute="selective", **settings)


def _rest_of_the_grid() -> list[Case]:
    return [
        _case("2b", ALL, implementation="transformers_padded"),
        _case(
            "2b", ALL, implementation="transformers_packed_compiled", recompute="full", limit_s=110
        ),
        _case("2b", CONNECTOR, "fp8_tensorwise"),
        _case("2b", VISION, "fp8_tensorwise"),
        _case("2b", CONNECTOR, implementation="transformers"),
        _case("1b", ALL, "fp8_tensorwise"),
        _case("1b", ALL, implementation="transformers"),
        _case("4b", ALL, "fp8_blockwise", recompute="selective"),
        _case("4b", ALL, implementation="transformers", recompute="full"),
        _case("8b", VISION, recompute="full"),
        _case("8b", CONNECTOR, "fp8_tensorwise", recompute="full"),
        _case("2b", ALL, implementation="transformers_packed_flex", recompute="full", limit_s=110),
    ]


def smoke_cases() -> list[Case]:
    """Return cases of the same kinds with a model of a few weights, to try the benchmark itself on
    any machine.
    """
    kinds: dict[tuple[str, ...], Case] = {}
    for case in all_cases():
        if case.moments == "float32" and case.packs_per_step == 1:
            is_native = case.architecture.vision.spans_tiles
            model = "tiny_native" if is_native else "tiny"
            recipe = "qwen2_5_vl" if is_native else case.recipe
            alike = replace(case, model=model, recipe=recipe, limit_s=2 * case.limit_s)
            kinds.setdefault(
                (
                    model,
                    case.stage,
                    case.precision,
                    case.implementation,
                    case.recompute,
                    case.kernels,
                ),
                alike,
            )
    return list(kinds.values())


def chosen(cases: list[Case], patterns: str) -> list[Case]:
    """Select the cases whose name equals, contains or matches one of the comma-separated patterns;
    all cases without a pattern.

    Raises:
        ValueError: there are none.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    names = {case.name for case in cases}

    def fits(name: str, pattern: str) -> bool:
        return (
            name == pattern if pattern in names else pattern in name or fnmatchcase(name, pattern)
        )

    found = [
        case for case in cases if not wanted or any(fits(case.name, pattern) for pattern in wanted)
    ]
    if not found:
        raise ValueError(f"--cases {patterns}: no case is called so; --dry_run lists them")
    return found


def predicted_tflop(case: Case) -> float:
    """Model FLOPs of one step, in 10^12, on a typical pack."""
    one = training_cost(case.architecture, case.trainable).total(**case.typical_pack)
    return case.packs_per_step * one / 1e12


def predicted_gib(case: Case) -> float:
    """Memory of a step of megavlm on a typical pack, estimated, not measured."""
    config = case.config("")
    pack = case.typical_pack
    return (
        memory(
            config,
            make_layout(config),
            1,
            capacity=CAPACITY,
            tiles=pack["tiles"],
            supervised=pack["supervised"],
        ).total
        / 2**30
    )


def shortage(case: Case, memory_gib: float | None) -> str:
    """Say why a case of megavlm would not fit; empty if it does, or if nothing is known.

    Args:
        case: what is to be measured; what an implementation of others needs is not estimated.
        memory_gib: of the device; none: not known.
    """
    if memory_gib is None or case.implementation != OURS:
        return ""
    needed = predicted_gib(case)
    if needed <= USABLE * memory_gib:
        return ""
    usable = f"{USABLE:.0%} of {memory_gib:.0f} GiB"
    return f"not run: needs about {needed:.0f} GiB, {usable} can be used"
