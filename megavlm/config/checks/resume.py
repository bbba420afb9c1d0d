"""What a run that resumes does with an option whose value is not that of its checkpoint.

Each option of the configuration is taken from now on, or refused, or has nothing to do with
results. None is accepted and then ignored: the configuration that is saved with the next
checkpoint is true.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from megavlm.config.options import shown_value
from megavlm.config.schema import Config

Kind = Literal["taken", "refused", "origin", "free"]
"""taken: the new value counts from the next step; it is printed when the run starts.
refused: must be as it was.
origin: says where a run began; a run that resumes its own checkpoint refuses another value.
free: results do not depend on it, or it is checked elsewhere; a new value counts."""

_BY_SECTION: dict[str, dict[Kind, str]] = {
    "": {
        "free": "recipe stage model"
    },  # another stage is another run; the architecture is compared
    "init.": {"origin": "vision connector text language tokenizer"},
    "data.": {
        # packs and tokenizer are compared
        "taken": "train valid reference loss_reduction loss_weights template tiling augment"
        " next_image",
        "refused": "weights sampling batch_shares curriculum shuffle group strata",
        "free": "packing cache workers prefetch timeout max_unreadable_packs",
    },
    "parallel.": {
        "taken": "tensor_model_parallel_size pipeline_model_parallel_size"
        " virtual_pipeline_model_parallel_size context_parallel_size"
        " expert_model_parallel_size expert_tensor_parallel_size sequence_parallel layout"
        " vision recompute recompute_parts",
        "free": "overlap_grad_reduce overlap_param_gather bucket_size timeout_minutes",
    },
    "optimizer.": {
        "taken": "lr min_lr min_lr_ratio warmup_steps warmup_ratio warmup_init_lr schedule"
        " decay_steps counted_from step_interval step_factor power timescale wsd_decay_steps"
        " wsd_decay weight_decay weight_decay_schedule end_weight_decay adam_beta1 adam_beta2"
        " adam_eps sgd_momentum sgd_nesterov muon_momentum muon_scale clip_grad decay no_decay"
        " lr_multipliers vision_layer_decay language_layer_decay",
        "refused": "kind moments",
    },
    "training.": {
        "taken": "steps global_batch_size precision drop_path drop_path_schedule end_drop_path"
        " eval_interval eval_packs kernels"
        " deterministic head_tokens",
        "refused": "seed trainable frozen_until",
        "free": "max_hours",
    },
    "ema.": {"taken": "warmup evaluate export", "refused": "decay"},
    "loss.": {"taken": "vocabulary_block label_smoothing z_loss"},
    "experts.": {"taken": "balance_loss balance_over bias_update_rate router_z_loss dispatcher"},
    "bad_steps.": {"taken": "skip spike_factor spike_action window most_in_a_row most"},
    "profile.": {"free": "folder first_step step_count ranks memory memory_snapshot"},
    "fp8.": {"taken": "vision language format first_bf16_layers last_bf16_layers"},
    "checkpoint.": {
        "refused": "trained_only",
        "origin": "load weights_only moments",
        "free": "save save_interval save_epochs asynchronous keep keep_best best_by verify"
        " export_hf",
    },
    "logging.": {
        "free": "interval tensorboard wandb_project wandb_mode mlflow run_name peak_tflops"
    },
    "eval.": {
        "taken": "tasks examples shots max_new_tokens without_images control_interval",
        "free": "only cache_gib",
    },
    "health.": {
        "free": "speed_check slow_factor least_gb_per_s hang_factor hang_seconds"
        " lost_machine_seconds"
    },
}
KINDS: dict[str, Kind] = {
    section + name: kind
    for section, kinds in _BY_SECTION.items()
    for kind, names in kinds.items()
    for name in names.split()
}
"""What becomes of each option but those of ``architecture``, which are all refused."""

_REASONS = {
    "data.": "the packs would come in another order, some twice and some never in this epoch",
    "optimizer.kind": "the moments are of that optimizer",
    "optimizer.moments": "the moments of a run are kept in one dtype",
    "training.seed": "the order of the packs follows from it",
    "checkpoint.trained_only": "a checkpoint notes what lies below it when the run begins",
    "ema.decay": "the checkpoint holds averages of that decay, or none",
    "training.trainable": "there are moments of what was trained, and of nothing else",
    "training.frozen_until": "moments begin at the step that unfreezes a parameter",
}


_FOLDERS = ("checkpoint.load", "init.vision", "init.connector", "init.text", "init.language")
"""Options that name the weights that a run begins with."""


def refusals(old: Config, new: Config, *, own: Path | None, by_content: bool = False) -> list[str]:
    """Name the options, but those of ``architecture``, that must be as they were.

    Args:
        old: the run that wrote the checkpoint.
        new: the run that resumes.
        own: the checkpoint that it resumes, if that is of its own save folder.
        by_content: whether folders of weights outside of that are compared by what is in them,
            which ``train/base_weights`` does, and not by name.
    """
    found = []
    for key, kind in KINDS.items():
        before = _value(old, key)
        now = _value(new, key)
        if kind == "refused" and before != now and (key, now) != ("checkpoint.trained_only", False):
            found.append(f"{_difference(key, before, now)}: {_reason(key)}{_remedy(key, old, new)}")
        elif kind == "origin" and own and _asks_for_another_start(key, old, new, own, by_content):
            found.append(
                f"{_difference(key, before, now)}: the run resumes its own checkpoint {own}, and"
                " this says where it began; leave it out, or name another --checkpoint.save"
                + _way_back(key, new)
            )
    if new.data.batch_shares and old.training.global_batch_size != new.training.global_batch_size:
        sizes = (old.training.global_batch_size, new.training.global_batch_size)
        key = "training.global_batch_size"
        found.append(f"{_difference(key, *sizes)}: {_REASONS['data.']}")
    before = old.training.precision
    if new.architecture.lora.nf4 and new.training.precision != before:
        key = "training.precision"
        found.append(
            f"{_difference(key, before, new.training.precision)}: the weights of"
            " --architecture.lora.nf4 are rounded from those of that dtype"
        )
    return found


def changes(old: Config, new: Config) -> list[str]:
    """Return the options that are taken with another value than the checkpoint's, as the lines of a
    table; none if there are none.
    """
    keys = [key for key, kind in KINDS.items() if kind == "taken"]
    keys += ["architecture.contrastive.positives", "architecture.contrastive.exchange"]
    keys += ["architecture.lora.dropout", "architecture.language.max_position_embeddings"]
    rows = [
        (f"--{key}", shown_value(_value(old, key)), shown_value(_value(new, key)))
        for key in keys
        if _value(old, key) != _value(new, key)
    ]
    if not rows:
        return []
    table = [("option", "checkpoint", "now"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(2)]
    return [f"  {name:<{widths[0]}}  {old:<{widths[1]}}  {now}" for name, old, now in table]


def with_origin(new: Config, before: Config) -> Config:
    """Return the configuration of a run that resumes its own checkpoint, with what it once started
    from if the command leaves that out: the checkpoints to come still tell it, and the first
    command is still the same run.
    """
    for key, kind in KINDS.items():
        if kind == "origin" and _value(new, key) in ("", False, "fresh"):
            section, name = key.split(".")
            part = replace(vars(new)[section], **{name: _value(before, key)})
            new = replace(new, **{section: part})
    return new


def _asks_for_another_start(
    key: str, old: Config, new: Config, own: Path, by_content: bool
) -> bool:
    """Return whether an option of another value than before would do something if it were not
    ignored; its default asks for nothing. Folders may have moved together with the save folder.
    Arguments as of ``refusals``.
    """
    before = _value(old, key)
    now = _value(new, key)
    if now == before or now in ("", False, "fresh"):
        return False
    save = Path(new.checkpoint.save).resolve()
    folder = Path(str(now)).resolve()
    if by_content and key in _FOLDERS and folder.parent != save:
        return False
    is_itself = key == "checkpoint.load" and folder in (save, own.resolve())
    is_path = isinstance(before, str) and before != ""
    is_same = is_path and folder == Path(before).resolve()
    has_moved = is_path and os.path.relpath(folder, save) == os.path.relpath(
        Path(before).resolve(), Path(old.checkpoint.save).resolve()
    )
    return not is_itself and not is_same and not has_moved


def _way_back(key: str, new: Config) -> str:
    """Return how to go back to an earlier checkpoint of the run, if the command names one."""
    save = Path(new.checkpoint.save).resolve()
    step = Path(new.checkpoint.load).resolve()
    if key != "checkpoint.load" or step.parent != save:
        return ""
    return f"; to go back to that checkpoint, write {step.name} into {new.checkpoint.save}/latest"


def _difference(key: str, before: Any, now: Any) -> str:
    return f"--{key}: {shown_value(before)} in the checkpoint, {shown_value(now)} asked for"


def _reason(key: str) -> str:
    return _REASONS.get(key) or _REASONS[key.partition(".")[0] + "."]


def _remedy(key: str, old: Config, new: Config) -> str:
    """Return what to add to a command whose new batch size alone has changed the buckets or the
    strata, or whose checkpoints are of a version without strata.
    """
    has_other_batch = old.training.global_batch_size != new.training.global_batch_size
    if key == "data.strata" and not new.data.strata:
        if old.strata == 1:
            return "; a run that an earlier version began had none: add --data.strata 1"
        if has_other_batch:
            return f"; to change the batch size alone, add --data.strata {old.strata}"
    if key != "data.group" or new.data.group or not has_other_batch:
        return ""
    return (
        "; it follows --training.global_batch_size unless it is given: to change the batch size"
        f" alone, add --data.group {old.group}"
    )


def _value(config: Config, key: str) -> Any:
    if key == "data.group":
        return config.group if config.data.shuffle else 0
    if key == "data.strata":
        return config.strata if config.data.shuffle else 0
    if key == "data.sampling" and config.data.weights:
        return "packs"  # weights go before it
    value: Any = config
    for name in key.split("."):
        value = vars(value)[name]
    return value
