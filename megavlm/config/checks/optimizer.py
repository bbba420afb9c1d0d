"""Checks of the optimizer's settings and of the schedules."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.checks.limits import at_least
from megavlm.config.differences import changed
from megavlm.config.parameter_groups import setting_problems
from megavlm.config.schema import Optimizer, Training

_READ_BY = {
    "decay_steps": ("cosine", "linear", "polynomial", "WSD"),
    "counted_from": ("cosine", "linear", "polynomial", "step"),
    "step_interval": ("step",),
    "step_factor": ("step",),
    "power": ("polynomial",),
    "timescale": ("inverse-square-root",),
    "wsd_decay_steps": ("WSD",),
    "wsd_decay": ("WSD",),
}
"""The schedules that read each option."""
_READ_BY_KIND = {
    "adam_beta1": ("adamw", "adam", "muon"),
    "adam_beta2": ("adamw", "adam", "muon"),
    "adam_eps": ("adamw", "adam", "muon"),
    "sgd_momentum": ("sgd",),
    "sgd_nesterov": ("sgd",),
    "muon_momentum": ("muon",),
    "muon_scale": ("muon",),
}
"""The kinds of optimizers that read each option."""


def optimizer_problems(optimizer: Optimizer, training: Training) -> Iterator[str]:
    """Name the settings of the optimizer that cannot be used, each with its flag."""
    if not optimizer.lr > 0:
        yield f"--optimizer.lr {optimizer.lr}: must be above 0"
    yield from at_least(0, "optimizer", optimizer, "weight_decay", "clip_grad")
    if optimizer.moments == "bfloat16" and training.precision == "float32":
        yield "--optimizer.moments bfloat16 needs --training.precision bfloat16"
    yield from _kind(optimizer)
    for name in ("adam_beta1", "adam_beta2", "sgd_momentum", "muon_momentum"):
        if not 0 <= vars(optimizer)[name] < 1:
            yield f"--optimizer.{name} {vars(optimizer)[name]}: must be 0 or more, and less than 1"
    if not optimizer.adam_eps > 0:
        yield f"--optimizer.adam_eps {optimizer.adam_eps}: must be above 0"
    yield from _lowest(optimizer)
    yield from _warmup(optimizer, training)
    yield from _schedule(optimizer, training)
    yield from _weight_decay(optimizer)
    yield from setting_problems(optimizer)


def _kind(optimizer: Optimizer) -> Iterator[str]:
    for name, value in changed(optimizer, *_READ_BY_KIND).items():
        if optimizer.kind not in _READ_BY_KIND[name]:
            yield (
                f"--optimizer.{name} {value} has no effect with --optimizer.kind {optimizer.kind};"
                f" use {vars(Optimizer())[name]}, or --optimizer.kind"
                f" {' or '.join(_READ_BY_KIND[name])}"
            )
    if not optimizer.is_adam and optimizer.moments == "bfloat16":
        yield (
            f"--optimizer.moments bfloat16: the moments of --optimizer.kind {optimizer.kind} are"
            " float32; use float32"
        )
    if optimizer.sgd_nesterov and not optimizer.sgd_momentum:
        yield "--optimizer.sgd_nesterov true needs --optimizer.sgd_momentum, such as 0.9"
    if not 0 < optimizer.muon_scale < float("inf"):
        yield f"--optimizer.muon_scale {optimizer.muon_scale}: must be above 0"


def _lowest(optimizer: Optimizer) -> Iterator[str]:
    yield from at_least(0, "optimizer", optimizer, "min_lr", "min_lr_ratio")
    if optimizer.min_lr > optimizer.lr > 0:
        yield f"--optimizer.min_lr {optimizer.min_lr} is above --optimizer.lr {optimizer.lr}"
    if optimizer.min_lr_ratio > 1:
        yield f"--optimizer.min_lr_ratio {optimizer.min_lr_ratio}: must be from 0 to 1"
    if optimizer.min_lr and optimizer.min_lr_ratio:
        yield (
            f"--optimizer.min_lr {optimizer.min_lr} and --optimizer.min_lr_ratio"
            f" {optimizer.min_lr_ratio}: say the lowest rate once; set the other to 0"
        )
    elif optimizer.schedule == "constant":
        for name in ("min_lr", "min_lr_ratio"):
            if vars(optimizer)[name]:
                yield (
                    f"--optimizer.{name} {vars(optimizer)[name]} has no effect with"
                    " --optimizer.schedule constant; use 0"
                )


def _warmup(optimizer: Optimizer, training: Training) -> Iterator[str]:
    yield from at_least(0, "optimizer", optimizer, "warmup_steps", "warmup_init_lr")
    if optimizer.warmup_steps > training.steps:
        yield (
            f"--optimizer.warmup_steps {optimizer.warmup_steps} is more than --training.steps"
            f" {training.steps}: lr would never be reached"
        )
    if not 0 <= optimizer.warmup_ratio <= 1:
        yield f"--optimizer.warmup_ratio {optimizer.warmup_ratio}: must be from 0 to 1"
    elif optimizer.warmup_steps and optimizer.warmup_ratio not in (0, Optimizer().warmup_ratio):
        yield (
            f"--optimizer.warmup_ratio {optimizer.warmup_ratio} has no effect beside"
            f" --optimizer.warmup_steps {optimizer.warmup_steps}; set one of them to 0"
        )
    if optimizer.warmup_init_lr > optimizer.lr > 0:
        yield (
            f"--optimizer.warmup_init_lr {optimizer.warmup_init_lr} is above --optimizer.lr"
            f" {optimizer.lr}"
        )
    elif optimizer.warmup_init_lr and not (optimizer.warmup_steps or optimizer.warmup_ratio):
        yield (
            f"--optimizer.warmup_init_lr {optimizer.warmup_init_lr} has no effect without a"
            " warm-up; set --optimizer.warmup_steps"
        )


def _schedule(optimizer: Optimizer, training: Training) -> Iterator[str]:
    schedule = optimizer.schedule
    for name, value in changed(optimizer, *_READ_BY).items():
        if schedule not in _READ_BY[name]:
            yield (
                f"--optimizer.{name} {value} has no effect with --optimizer.schedule {schedule};"
                f" leave it out, or use {' or '.join(_READ_BY[name])}"
            )
    yield from at_least(0, "optimizer", optimizer, "decay_steps", "timescale")
    end = optimizer.decay_steps or training.steps
    warmup = optimizer.warmup(training.steps)
    if 0 < optimizer.decay_steps <= warmup:
        yield (
            f"--optimizer.decay_steps {optimizer.decay_steps} must be more than the {warmup} steps"
            " of the warm-up, which it counts too"
        )
    if schedule == "step":
        yield from at_least(1, "optimizer", optimizer, "step_interval")
        if not 0 < optimizer.step_factor < 1:
            yield f"--optimizer.step_factor {optimizer.step_factor}: must be between 0 and 1"
    if schedule == "polynomial" and not 0 < optimizer.power < float("inf"):
        yield f"--optimizer.power {optimizer.power}: must be above 0"
    room = end - warmup  # none is reported by itself
    if schedule == "WSD" and room > 0 and not 1 <= optimizer.wsd_decay_steps <= room:
        yield (
            f"--optimizer.wsd_decay_steps {optimizer.wsd_decay_steps}: must be from 1 to"
            f" {room}, the steps behind the warm-up; a tenth to a fifth of them is usual"
        )
    if schedule == "inverse-square-root" and not (optimizer.timescale or warmup):
        yield (
            "--optimizer.schedule inverse-square-root without a warm-up needs"
            " --optimizer.timescale, such as 10000"
        )


def _weight_decay(optimizer: Optimizer) -> Iterator[str]:
    yield from at_least(0, "optimizer", optimizer, "end_weight_decay")
    if optimizer.weight_decay_schedule == "constant" and optimizer.end_weight_decay:
        yield (
            f"--optimizer.end_weight_decay {optimizer.end_weight_decay} has no effect with"
            " --optimizer.weight_decay_schedule constant; use linear or cosine"
        )
