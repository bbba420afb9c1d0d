"""Check a configuration before anything is built; report all problems together, correct none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megavlm.config import unfreezing
from megavlm.config.averages import ema_problems
from megavlm.config.checks import start, whole_images
from megavlm.config.checks.architecture import architecture_problems
from megavlm.config.checks.data import data_problems
from megavlm.config.checks.datasets import DatasetFacts, facts_problems
from megavlm.config.checks.device import DeviceCapabilities, device_problems
from megavlm.config.checks.evaluation import evaluation_problems
from megavlm.config.checks.experts import expert_layout_problems, expert_problems
from megavlm.config.checks.fp8 import fp8_problems
from megavlm.config.checks.limits import at_least
from megavlm.config.checks.long_runs import bad_steps_problems, profile_problems
from megavlm.config.checks.no_vision import run_problems
from megavlm.config.checks.numbers import finite_problems, number_problems
from megavlm.config.checks.objective import objective_layout_problems, objective_problems
from megavlm.config.checks.observers import observer_problems
from megavlm.config.checks.optimizer import optimizer_problems
from megavlm.config.checks.saving import checkpoint_problems
from megavlm.config.checks.unread import OF_MODEL, OF_RUN, unread
from megavlm.config.differences import changed
from megavlm.config.freeze_mask import PARTS, parts_named
from megavlm.config.layout_text import parse_layout
from megavlm.config.lora import dropout_problems
from megavlm.config.loss import loss_problems
from megavlm.config.schema import (
    LAYER_PARTS,
    Architecture,
    Config,
    Health,
    Parallel,
    Training,
)


class ConfigError(ValueError):
    """A configuration that cannot run; the message names every flag to change."""


def check(
    config: Config,
    world_size: int,
    facts: Sequence[DatasetFacts] = (),
    device: DeviceCapabilities | None = None,
) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: the run.
        world_size: ranks it is started on.
        facts: of the datasets that could be opened.
        device: what the ranks run on; none: a CPU.

    Raises:
        ConfigError: with everything that is wrong.
    """
    found = [
        *problems(config, world_size),
        *facts_problems(config, facts, world_size),
        *device_problems(config, device or DeviceCapabilities()),
    ]
    if found:
        listed = "\n  ".join(found)
        noun = "problem" if len(found) == 1 else "problems"
        raise ConfigError(f"{len(found)} {noun} with the configuration:\n  {listed}")


def problems(config: Config, world_size: int) -> list[str]:
    """Everything in a configuration that cannot run on ``world_size`` ranks, each naming the flag
    to change.

    Raises:
        ValueError: there is no such objective.
    """
    if not_finite := list(finite_problems(config)):
        return not_finite  # which other checks would compute with
    return [
        *layout_problems(config, world_size),
        *data_problems(config.data),
        *settings_problems(config),
        *expert_problems(config),
        *bad_steps_problems(config.bad_steps),
        *profile_problems(config.profile, config.training.steps, world_size),
        *at_least(0, "parallel", config.parallel, "bucket_size"),
        *checkpoint_problems(
            config.checkpoint,
            config.training.eval_interval,
            config.training.steps,
            averages=config.ema.export,
        ),
        *start.problems(config),
        *evaluation_problems(config),
        *at_least(1, "logging", config.logging, "interval"),
        *at_least(0, "logging", config.logging, "peak_tflops"),
        *observer_problems(config.logging, config.checkpoint),
        *_health(config.health),
        *unread(config, OF_RUN),
    ]


def settings_problems(config: Config) -> list[str]:
    """Everything that cannot be, whatever the data and the layout of the run."""
    return [
        *model_problems(config),
        *_training(config.training),
        *objective_problems(config),
        *run_problems(config),
        *whole_images.run_problems(config),
        *optimizer_problems(config.optimizer, config.training),
        *unfreezing.setting_problems(config),
        *ema_problems(config),
        *_kernels(config.training),
        *_loss(config),
        *unread(config, OF_MODEL),
    ]


def model_problems(config: Config) -> list[str]:
    """Everything that keeps a model from having parameters that can be named."""
    return [*number_problems(config), *architecture_problems(config.architecture)]


def _loss(config: Config) -> Iterator[str]:
    arch = config.architecture
    has_vocabulary = arch.needs.has_vocabulary_head
    yield from loss_problems(config.loss, arch.objective, has_vocabulary=has_vocabulary)
    if config.loss.is_by_block and arch.added_tokens:
        yield (
            f"--loss.{next(iter(changed(config.loss)))}: computes the head by block, and the rows"
            f" of --architecture.added_tokens {arch.added_tokens} stand beside it; leave it out"
        )


def layout_problems(config: Config, world_size: int) -> list[str]:
    """Everything that keeps the model from being laid out over ``world_size`` ranks."""
    return [
        *_tensor_parallel(config.parallel, config.architecture),
        *_prefixes(config.parallel, config.architecture),
        *whole_images.layout_problems(config),
        *_pipeline(config.parallel, config.architecture),
        *objective_layout_problems(config.parallel, config.architecture),
        *expert_layout_problems(config, world_size),
        *fp8_problems(config.fp8, config),
        *dropout_problems(config.architecture.lora, config.parallel),
        *_world(config, world_size),
    ]


def _divisors(*numbers: int) -> str:
    """Write the common divisors of some numbers as text: ``1, 2 or 7``."""
    *others, last = [
        str(size)
        for size in range(1, min(numbers) + 1)
        if all(number % size == 0 for number in numbers)
    ]
    return f"{', '.join(others)} or {last}" if others else last


def _tensor_parallel(parallel: Parallel, arch: Architecture) -> Iterator[str]:
    size = parallel.tensor_model_parallel_size
    flag = "--parallel.tensor_model_parallel_size"
    if size < 1:
        yield f"{flag} {size}: must be 1 or more"
        return
    vision = arch.vision
    language = arch.language
    in_vision = (
        {"vision.ffn_hidden_size": vision.ffn_hidden_size}
        if parallel.vision == "tensor" and vision.exists
        else {}
    )
    in_language = {
        "language.num_attention_heads": language.num_attention_heads,
        "language.hidden_size": language.hidden_size,
    }
    if not language.num_experts:  # experts are split by sizes of their own
        in_language["language.ffn_hidden_size"] = language.ffn_hidden_size
    elif language.shared_expert_ffn_hidden_size:
        name = "language.shared_expert_ffn_hidden_size"
        in_language[name] = language.shared_expert_ffn_hidden_size
    shared = in_vision | (in_language if language.exists else {})
    if min(shared.values(), default=1) < 1 or language.num_query_groups < 1:
        return
    for name, number in shared.items():
        if number % size:
            also = ", or --parallel.vision data for it" if name in in_vision else ""
            yield (
                f"{flag} {size} does not divide --architecture.{name} {number}; use"
                f" {_divisors(*shared.values())}{also}"
            )
    groups = language.num_query_groups
    if (
        groups % size and size % groups
    ):  # where there are fewer groups than ranks, several ranks share one
        yield (
            f"{flag} {size} is neither a divisor nor a multiple of"
            f" --architecture.language.num_query_groups {groups}"
        )
    elif not language.num_attention_heads % size and 2 * groups * language.head_size % size:
        yield (
            f"{flag} {size} does not divide the rows of queries, keys and values; use a divisor of"
            f" {2 * groups * language.head_size}"
        )
    recomputed = ",".join(parallel.recompute_parts)
    if not parallel.recompute_parts or not set(parallel.recompute_parts) <= set(LAYER_PARTS):
        yield (
            f"--parallel.recompute_parts {recomputed}: name one or both of {', '.join(LAYER_PARTS)}"
        )
    elif parallel.recompute == "none" and set(parallel.recompute_parts) != set(LAYER_PARTS):
        yield (
            f"--parallel.recompute_parts {recomputed} has no effect with --parallel.recompute none;"
            " use selective or full"
        )
    if parallel.sequence_parallel and size == 1:
        yield f"--parallel.sequence_parallel true needs {flag} 2 or more; it is 1"


def _prefixes(parallel: Parallel, arch: Architecture) -> Iterator[str]:
    size = parallel.context_parallel_size
    if arch.prefix_lm and size > 1:
        yield (
            f"--parallel.context_parallel_size {size}: --architecture.prefix_lm true lets the"
            " tokens of a prefix see each other, and attention over ranks is causal; use 1"
        )


def _pipeline(parallel: Parallel, arch: Architecture) -> Iterator[str]:
    size = parallel.pipeline_model_parallel_size
    layout = parallel.layout
    vision = arch.vision.num_layers
    language = arch.language.num_layers
    flag = "--parallel.pipeline_model_parallel_size"
    given = f"--parallel.layout {layout}"
    virtual = parallel.virtual_pipeline_model_parallel_size
    chunks = parallel.chunks
    sizes = f"{flag} {size}"
    if virtual != 1:
        sizes += f" x --parallel.virtual_pipeline_model_parallel_size {virtual}"
    yield from at_least(
        1,
        "parallel",
        parallel,
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
    )
    if min(size, virtual) > 0 and chunks > vision + language:
        layers = (
            f"{vision + language} layers ({vision} of the vision encoder, {language} of the"
            " language model)"
        )
        yield f"{sizes}: more chunks than the model's {layers}"
    if virtual > 1 and size == 1:
        yield (
            f"{sizes}: interleaved 1F1B needs at least 2 pipeline ranks; use them, or 1 model chunk"
            " per rank"
        )
    if layout in ("auto", "even"):
        return
    try:
        counts = parse_layout(layout, vision, language)
    except ValueError as error:
        yield f"{given}: {error}; or use auto or even"
        return
    if len(counts) != chunks:
        wanted = f"{sizes} is {chunks}" if virtual != 1 else f"{flag} is {size}"
        noun = "chunk" if len(counts) == 1 else "chunks"
        yield f"{given}: {len(counts)} {noun}, but {wanted}"


def _world(config: Config, world_size: int) -> Iterator[str]:
    model = config.parallel.model_parallel_size
    batch = config.training.global_batch_size
    sizes = {
        name: vars(config.parallel)[f"{name}_parallel_size"]
        for name in ("tensor_model", "pipeline_model", "context")
    }
    if batch < 1:
        yield f"--training.global_batch_size {batch}: must be 1 or more"
    yield from at_least(1, "parallel", config.parallel, "timeout_minutes", "context_parallel_size")
    if min(sizes.values()) < 1:
        return
    if world_size % model:
        product = " x ".join(
            f"--parallel.{name}_parallel_size {size}"
            for name, size in sizes.items()
            if size > 1 or name != "context"
        )
        yield f"{product} = {model} does not divide the number of ranks, {world_size}"
        return
    copies = world_size // model
    pipeline = sizes["pipeline_model"]
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    if batch % copies:
        yield (
            f"--training.global_batch_size {batch} is not a multiple of the {copies} data-parallel"
            f" ranks ({world_size} ranks / {model} per replica); use"
            f" {_nearest_multiples(batch, copies)}"
        )
    elif virtual > 1 and batch // copies % pipeline:
        yield (
            f"--training.global_batch_size {batch} gives each of the {copies} data-parallel ranks"
            f" {batch // copies} packs a step, which"
            f" --parallel.virtual_pipeline_model_parallel_size {virtual} asks to be a multiple of"
            f" --parallel.pipeline_model_parallel_size {pipeline}; use"
            f" {_nearest_multiples(batch, copies * pipeline)}"
        )


def _nearest_multiples(number: int, of: int) -> str:
    """Write the multiples just below and above a number as text."""
    below = number // of * of
    return f"{below} or {below + of}" if below > 0 else f"{below + of}"


def _training(training: Training) -> Iterator[str]:
    yield from at_least(1, "training", training, "steps")
    yield from at_least(0, "training", training, "seed", "eval_interval", "eval_packs", "max_hours")
    if not training.trainable:
        yield (
            "--training.trainable: empty, so nothing would be trained; name some of"
            f" {', '.join(PARTS)}"
        )
    for pattern in training.trainable:
        if not parts_named(pattern):
            yield (
                f"--training.trainable {pattern}: nothing is called so; parts are"
                f" {', '.join(PARTS)}"
            )
    for name in ("drop_path", "end_drop_path"):
        if not 0 <= vars(training)[name] < 1:
            yield f"--training.{name} {vars(training)[name]}: must be 0 or more, and less than 1"


def _kernels(training: Training) -> Iterator[str]:
    if training.kernels == "transformer_engine" and training.precision == "float32":
        yield (
            "--training.kernels transformer_engine: its attention has no fused kernel for"
            " --training.precision float32; use local or auto"
        )


def _health(health: Health) -> Iterator[str]:
    yield from at_least(0, "health", health, "least_gb_per_s")
    yield from at_least(1, "health", health, "hang_seconds")
    yield from at_least(0, "health", health, "lost_machine_seconds")
    if not health.slow_factor > 1:
        yield f"--health.slow_factor {health.slow_factor}: must be above 1"
    if health.hang_factor and not health.hang_factor >= 1:
        yield (
            f"--health.hang_factor {health.hang_factor}: must be 1 or more, or 0 to report nothing"
        )
