"""Options that a run would accept and not read: a table of them, and of what reads each.

Other checks of this folder name such options too, where what reads them is more than one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megavlm.config.differences import values
from megavlm.config.freeze_mask import trains
from megavlm.config.options import shown_value
from megavlm.config.recipes import RECIPES
from megavlm.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Row:
    """Options that are read under a condition.

    Args:
        keys: of the options, such as ``data.prefetch``, or sections that end with a dot.
        is_read: whether a run reads them.
        why: completes "has no effect"; fields of the configuration stand in braces.
    """

    keys: tuple[str, ...]
    is_read: Callable[[Config], bool]
    why: str


def _connector(*kinds: str) -> Callable[[Config], bool]:
    return lambda run: run.architecture.connector.kind in kinds


def _has_vocabulary_head(run: Config) -> bool:
    return run.architecture.needs.has_vocabulary_head


def _rotates(run: Config) -> bool:
    language = run.architecture.language
    return not (language.exists and language.has_learned_positions)


def _recomputes(run: Config) -> bool:
    """Tell whether a part that is recomputed is there, and in the backward pass."""
    arch = run.architecture
    parts = {
        "vision": arch.vision.exists and trains("vision", run.training.trainable),
        "language": arch.language.exists,
    }
    return any(parts.get(part, True) for part in run.parallel.recompute_parts)


_KIND = ": --architecture.connector.kind is {0.architecture.connector.kind}"
_OBJECTIVE = ": --architecture.objective is {0.architecture.objective}"
_FAMILY = ": --architecture.language.family {0.architecture.language.family} has"

OF_MODEL = (
    Row(
        keys=("architecture.vision.layer_scale",),
        is_read=lambda run: run.architecture.vision.has_layer_scale,
        why=": --architecture.vision.family {0.architecture.vision.family} has no layer scales",
    ),
    Row(
        keys=(
            "architecture.language.rotary_base",
            "architecture.language.rotary_percent",
            "architecture.language.rotary_sections",
            "architecture.language.rotary_dynamic_factor",
        ),
        is_read=_rotates,
        why=f"{_FAMILY} learned positions, and none are rotary",
    ),
    Row(
        keys=("architecture.language.zero_centered_norm",),
        is_read=lambda run: not run.architecture.language.has_layer_norm,
        why=f"{_FAMILY} LayerNorm, which multiplies by its weight alone",
    ),
    Row(
        keys=("architecture.language.norm_topk_prob",),
        is_read=lambda run: run.architecture.language.num_experts > 0,
        why=" without --architecture.language.num_experts, such as 128",
    ),
    Row(
        keys=("architecture.cross_attention.",),
        is_read=lambda run: run.architecture.cross_attention.every != 0,
        why=": --architecture.cross_attention.every is 0",
    ),
    Row(
        keys=("architecture.preference.",),
        is_read=lambda run: run.architecture.needs.is_of_preferences,
        why=_OBJECTIVE,
    ),
    Row(
        keys=("data.reference",),
        is_read=lambda run: run.architecture.needs.is_of_preferences,
        why=_OBJECTIVE,
    ),
    Row(
        keys=("architecture.contrastive.",),
        is_read=lambda run: run.architecture.objective == "contrastive",
        why=_OBJECTIVE,
    ),
    Row(keys=("architecture.connector.qformer.",), is_read=_connector("qformer"), why=_KIND),
    Row(keys=("architecture.connector.resampler.",), is_read=_connector("resampler"), why=_KIND),
    Row(keys=("architecture.connector.heads",), is_read=_connector("mean_query"), why=_KIND),
    Row(keys=("architecture.connector.bias",), is_read=_connector("mlp", "linear"), why=_KIND),
    # A linear connector neither normalises nor shuffles, and may say so.
    Row(keys=("architecture.connector.norm",), is_read=_connector("mlp", "linear"), why=_KIND),
    Row(
        keys=("architecture.connector.pixel_shuffle",),
        is_read=lambda run: (
            run.architecture.connector.kind == "mlp"
            or (
                run.architecture.connector.kind == "linear"
                and run.architecture.connector.pixel_shuffle == 1
            )
        ),
        why=_KIND,
    ),
    Row(
        keys=("architecture.image_text.label_smoothing",),
        is_read=lambda run: (
            run.architecture.image_text.contrast > 0 or run.architecture.image_text.generation > 0
        ),
        why=" with --architecture.image_text.contrast 0 and .generation 0",
    ),
    Row(
        keys=("architecture.image_text.gradient",),
        is_read=lambda run: run.architecture.image_text.contrast > 0,
        why=" with --architecture.image_text.contrast 0",
    ),
    Row(
        keys=("optimizer.counted_from",),
        is_read=lambda run: run.optimizer.warmup(run.training.steps) > 0,
        why=" without a warm-up, such as of --optimizer.warmup_steps, from whose end it counts",
    ),
    Row(
        keys=("optimizer.weight_decay_schedule",),
        is_read=lambda run: run.optimizer.decays,
        why=" with --optimizer.weight_decay 0 and no --optimizer.end_weight_decay",
    ),
    Row(
        keys=("training.drop_path_schedule",),
        is_read=lambda run: run.training.highest_drop_path > 0,
        why=" without --training.drop_path or --training.end_drop_path",
    ),
    Row(
        keys=("training.end_drop_path",),
        is_read=lambda run: run.training.drop_path_schedule != "constant",
        why=" with --training.drop_path_schedule constant, as it has with linear and cosine",
    ),
    Row(
        keys=("training.head_tokens",),
        is_read=_has_vocabulary_head,
        why=": --architecture.objective {0.architecture.objective} has no head over the vocabulary",
    ),
    Row(
        keys=("ema.warmup", "ema.evaluate", "ema.export"),
        is_read=lambda run: run.ema.decay > 0,
        why=" without --ema.decay, such as 0.999",
    ),
    Row(
        keys=("fp8.format",),
        is_read=lambda run: bool(run.fp8.recipes),
        why=" without --fp8.vision or --fp8.language",
    ),
)
"""What a model, and how it is trained, leaves unread, whatever the data and the layout."""

OF_RUN = (
    Row(
        keys=("training.eval_packs",),
        is_read=lambda run: bool(run.data.valid),
        why=" without --data.valid, the validation set",
    ),
    Row(
        keys=("eval.max_new_tokens", "eval.cache_gib"),
        is_read=lambda run: bool(run.eval.tasks) and _has_vocabulary_head(run),
        why=" without --eval.tasks, whose questions are answered; a model of pairs answers none",
    ),
    Row(
        keys=("parallel.bucket_size",),
        is_read=lambda run: run.parallel.overlap_grad_reduce,
        why=" with --parallel.overlap_grad_reduce false, which sums all gradients in one go",
    ),
    Row(
        keys=("bad_steps.spike_action", "bad_steps.window"),
        is_read=lambda run: run.bad_steps.spike_factor > 0,
        why=" without --bad_steps.spike_factor, such as 3",
    ),
    Row(
        keys=("bad_steps.most_in_a_row", "bad_steps.most"),
        is_read=lambda run: run.bad_steps.skips,
        why=" without --bad_steps.skip true",
    ),
    Row(
        keys=("profile.first_step", "profile.step_count", "profile.ranks", "profile.memory"),
        is_read=lambda run: bool(run.profile.folder),
        why=" without --profile.folder",
    ),
)
"""What a run leaves unread that has no such data, tasks or folders."""

TOLERATED = (
    Row(
        keys=("architecture.image_text.",),
        is_read=lambda run: run.architecture.objective == "qformer",
        why=": --architecture.objective is {0.architecture.objective}, and qformer reads it",
    ),
    Row(
        keys=("data.prefetch", "data.timeout"),
        is_read=lambda run: run.data.workers > 0,
        why=" with --data.workers 0, which decodes in the training process",
    ),
    Row(
        keys=("data.weights", "data.sampling"),
        is_read=lambda run: len(run.data.train_folders) > 1,
        why=": --data.train names one folder",
    ),
    Row(
        keys=("parallel.vision",),
        is_read=lambda run: run.parallel.tensor_model_parallel_size > 1,
        why=" with --parallel.tensor_model_parallel_size 1, where no ranks share an image",
    ),
    Row(
        keys=("parallel.layout",),
        is_read=lambda run: run.parallel.layout != "even" or run.parallel.chunks > 1,
        why=" with --parallel.pipeline_model_parallel_size 1: all layers are one chunk",
    ),
    Row(
        keys=("parallel.recompute",),
        is_read=_recomputes,
        why=": of --parallel.recompute_parts, no part is there and trained",
    ),
    Row(
        keys=("checkpoint.asynchronous", "checkpoint.keep"),
        is_read=lambda run: bool(run.checkpoint.save),
        why=" without --checkpoint.save, the folder for checkpoints",
    ),
    Row(
        keys=("checkpoint.verify",),
        is_read=lambda run: bool(run.checkpoint.save or run.checkpoint.load),
        why=" without --checkpoint.save or --checkpoint.load: no checkpoint is loaded",
    ),
    Row(
        keys=("logging.run_name",),
        is_read=lambda run: bool(run.logging.wandb_project or run.logging.mlflow),
        why=" without --logging.wandb_project or --logging.mlflow, whose runs it names",
    ),
    Row(
        keys=("logging.wandb_mode",),
        is_read=lambda run: bool(run.logging.wandb_project),
        why=" without --logging.wandb_project",
    ),
    Row(
        keys=(
            "training.steps",
            "training.max_hours",
            "training.eval_interval",
            "training.frozen_until",
            "training.drop_path",
            "eval.control_interval",
            "checkpoint.save_epochs",
            "data.max_unreadable_packs",
            "bad_steps.skip",
            "bad_steps.spike_factor",
            "profile.folder",
            "health.lost_machine_seconds",
        ),
        is_read=lambda run: not run.eval.only,
        why=" with --eval.only true, which does not train",
    ),
    Row(
        keys=("health.slow_factor", "health.least_gb_per_s"),
        is_read=lambda run: run.health.speed_check,
        why=" with --health.speed_check false",
    ),
    Row(
        keys=("health.hang_seconds",),
        is_read=lambda run: run.health.hang_factor > 0,
        why=" with --health.hang_factor 0, which reports nothing",
    ),
)
"""What is worth a warning alone: a file of settings may be for several stages, or for a cluster and
a laptop.
"""

OF_ONE_REPLICA = (
    Row(
        keys=("architecture.contrastive.exchange",),
        is_read=lambda run: False,
        why=" with one data-parallel replica, which gets no embeddings of others",
    ),
)
"""What is worth a warning too if the ranks are one data-parallel replica."""


def unread(config: Config, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the options of a table that are neither as usual nor read.

    Args:
        config: the run.
        rows: the table.
    """
    preset = dict(values(preset_of(config)))
    plain = dict(values(Config(stage="", model="")))
    given = {key: value for key, value in values(config) if value not in (preset[key], plain[key])}
    for row in rows:
        for key, value in given.items():
            if _names(row, key) and not row.is_read(config):
                instead = f", or use {usual}" if (usual := shown_value(plain[key])) else ""
                yield (
                    f"--{key} {shown_value(value)} has no effect{row.why.format(config)}; leave it"
                    f" out{instead}"
                )


def _names(row: Row, key: str) -> bool:
    return any(key == name or (name[-1] == "." and key.startswith(name)) for name in row.keys)


def preset_of(config: Config) -> Config:
    """Return the settings that the run's stage of its recipe has."""
    row = RECIPES.get(config.recipe)
    stage = row.stages.get(config.stage) if row else None
    settings: dict[str, Any] = {}
    if row and stage:
        settings = dict(
            data=row.data(config.stage), optimizer=stage.optimizer, training=stage.training
        )
    return Config(stage=config.stage, model=config.model, **settings)
