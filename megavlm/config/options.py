"""Command line options made from the dataclasses of the schema: one option, and one YAML key, for
each field.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from megavlm.config import former_names
from megavlm.config.former_names import current_name
from megavlm.config.schema import Config
from megavlm.config.vision import PIXELS

# Names that Megatron-LM's users know, for fields that mean the same, and those of older versions.
ALIASES = {
    **{f"--{former}": current for former, current in former_names.OPTIONS.items()},
    "--tensor-model-parallel-size": "parallel.tensor_model_parallel_size",
    "--pipeline-model-parallel-size": "parallel.pipeline_model_parallel_size",
    "--num-virtual-stages-per-pipeline-rank": "parallel.virtual_pipeline_model_parallel_size",
    "--context-parallel-size": "parallel.context_parallel_size",
    "--expert-model-parallel-size": "parallel.expert_model_parallel_size",
    "--expert-tensor-parallel-size": "parallel.expert_tensor_parallel_size",
    "--sequence-parallel": "parallel.sequence_parallel",
    "--recompute-granularity": "parallel.recompute",
    "--overlap-grad-reduce": "parallel.overlap_grad_reduce",
    "--overlap-param-gather": "parallel.overlap_param_gather",
    "--ddp-bucket-size": "parallel.bucket_size",
    "--distributed-timeout-minutes": "parallel.timeout_minutes",
    "--sgd-momentum": "optimizer.sgd_momentum",
    "--muon-momentum": "optimizer.muon_momentum",
    "--muon-extra-scale-factor": "optimizer.muon_scale",
    "--lr": "optimizer.lr",
    "--min-lr": "optimizer.min_lr",
    "--lr-warmup-iters": "optimizer.warmup_steps",
    "--lr-warmup-fraction": "optimizer.warmup_ratio",
    "--lr-warmup-init": "optimizer.warmup_init_lr",
    "--lr-decay-style": "optimizer.schedule",
    "--lr-decay-iters": "optimizer.decay_steps",
    "--lr-wsd-decay-iters": "optimizer.wsd_decay_steps",
    "--lr-wsd-decay-style": "optimizer.wsd_decay",
    "--weight-decay": "optimizer.weight_decay",
    "--start-weight-decay": "optimizer.weight_decay",
    "--end-weight-decay": "optimizer.end_weight_decay",
    "--weight-decay-incr-style": "optimizer.weight_decay_schedule",
    "--adam-beta1": "optimizer.adam_beta1",
    "--adam-beta2": "optimizer.adam_beta2",
    "--adam-eps": "optimizer.adam_eps",
    "--clip-grad": "optimizer.clip_grad",
    "--train-iters": "training.steps",
    "--global-batch-size": "training.global_batch_size",
    "--seed": "training.seed",
    "--eval-interval": "training.eval_interval",
    "--deterministic-mode": "training.deterministic",
    "--moe-aux-loss-coeff": "experts.balance_loss",
    "--moe-router-bias-update-rate": "experts.bias_update_rate",
    "--moe-z-loss-coeff": "experts.router_z_loss",
    "--moe-token-dispatcher-type": "experts.dispatcher",
    "--fp8-format": "fp8.format",
    "--fp8-recipe": "fp8.language",
    "--save": "checkpoint.save",
    "--load": "checkpoint.load",
    "--save-interval": "checkpoint.save_interval",
    "--async-save": "checkpoint.asynchronous",
    "--log-interval": "logging.interval",
    "--num-workers": "data.workers",
    "--wandb-project": "logging.wandb_project",
    "--wandb-exp-name": "logging.run_name",
}


# Values that have a name.
NAMED = {
    "architecture.vision.pixel_mean": {name: mean for name, (mean, _) in PIXELS.items()},
    "architecture.vision.pixel_std": {name: std for name, (_, std) in PIXELS.items()},
}


# What reads an item of a list, if not the type of the items.
READ_ITEM = {"training.trainable": lambda value: current_name(str(value))}


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field of the configuration as an option.

    Args:
        key: dotted path, such as ``training.steps``; the option is this with two dashes before it.
        kind: type of the field.
        help: what the field's docstring says.
    """

    key: str
    kind: Any
    help: str

    @cached_property
    def flags(self) -> tuple[str, ...]:
        """All names on the command line, the full one first."""
        return f"--{self.key}", *(alias for alias, key in ALIASES.items() if key == self.key)

    @property
    def expects(self) -> str:
        """What a value must be, in words."""
        if get_origin(self.kind) is Literal:
            return "one of " + ", ".join(get_args(self.kind))
        if get_origin(self.kind) is tuple:
            item, *more = get_args(self.kind)
            count = "" if more == [...] else f"{len(more) + 1} "
            return (
                f"{count}{ {int: 'integers', float: 'numbers', str: 'names'}[item] } with commas"
                " between them"
            )
        return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[self.kind]


@cache
def sections() -> tuple[tuple[str, str, tuple[Option, ...]], ...]:
    """Return the sections of the configuration: path, docstring, and own fields; a section comes
    before those inside it.
    """
    return tuple(_sections(Config, ""))


def _sections(kind: type, path: str) -> Iterator[tuple[str, str, tuple[Option, ...]]]:
    hints = _field_types(kind)
    documented = docstring_parser.parse(inspect.getdoc(kind) or "")
    texts = {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for parameter in documented.params
    }
    own = [name for name in hints if not dataclasses.is_dataclass(hints[name])]
    yield (
        path,
        " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split()),
        tuple(Option(key=f"{path}{name}", kind=hints[name], help=texts[name]) for name in own),
    )
    for name in hints:
        if name not in own:
            yield from _sections(hints[name], f"{path}{name}.")


@cache
def _field_types(kind: type) -> Mapping[str, Any]:
    return MappingProxyType(get_type_hints(kind))


@cache
def options() -> Mapping[str, Option]:
    """Every option of the configuration, by key."""
    return MappingProxyType(
        {option.key: option for _, _, listed in sections() for option in listed}
    )


class Parser(jsonargparse.ArgumentParser):
    """Raises ``ArgumentError`` with a short message, where its base prints the usage and ends the
    process.
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as an ArgumentError; jsonargparse calls this for every error it
        finds.
        """
        raise argparse.ArgumentError(None, explain(message)) from ex


def make_parser(
    defaults: Config, prog: str, description: str = "", only: Collection[str] | None = None
) -> Parser:
    """Make a parser of options.

    Args:
        defaults: values where none are given.
        prog: name of the program.
        description: text above the options, shown as it stands.
        only: keys of the options that it knows; none: all.
    """
    parser = Parser(
        prog=prog,
        usage=(
            "torchrun [torchrun options] %(prog)s [--recipe NAME] --stage NAME --model NAME"
            " [--config FILE] [--section.field VALUE] ..."
        ),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=only is None,
    )
    for path, text, every in sections():
        listed = [option for option in every if only is None or option.key in only]
        if not listed:
            continue
        group = parser.add_argument_group(path.removesuffix(".") or "run", text.replace("``", ""))
        for option in listed:
            value = _value(defaults, option.key)
            shown = option.help.replace("%", "%%").replace("``", "").removesuffix(".")
            if value != "":
                shown += f" (default: {shown_value(value)})"
            group.add_argument(
                *option.flags,
                type=reader(option),
                default=value,
                help=shown,
                metavar=_metavar(option),
            )
    return parser


def reader(option: Option) -> Any:
    """Return a function that turns text or a YAML value into the field's value."""
    if get_origin(option.kind) is not tuple:
        return option.kind
    item, *more = get_args(option.kind)

    names = NAMED.get(option.key, {})
    read_item = READ_ITEM.get(option.key, item)

    def read(value: Any) -> tuple:
        if isinstance(value, str) and value.strip() in names:
            return names[value.strip()]
        try:
            values = (
                [part.strip() for part in value.strip("[]() ").split(",") if part.strip()]
                if isinstance(value, str)
                else list(value)
            )
            if more != [...] and len(values) != len(more) + 1:
                raise ValueError("another number of values")
            return tuple(read_item(entry) for entry in values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{error}; got: {value}") from None

    return read


def is_ready(option: Option, value: Any) -> bool:
    """Return whether a value of a YAML file has its field's type already, a list for a tuple."""
    if get_origin(option.kind) is Literal:
        return type(value) is str and value in get_args(option.kind)
    if get_origin(option.kind) is tuple:
        item, *more = get_args(option.kind)
        has_length = more == [...] or (type(value) is list and len(value) == len(more) + 1)
        return type(value) is list and has_length and all(type(entry) is item for entry in value)
    return type(value) is option.kind


def to_config(namespace: Any, kind: type = Config) -> Any:
    """Build the dataclass ``kind`` from a parser's namespace."""
    hints = _field_types(kind)
    values = vars(namespace)
    return kind(
        **{
            name: (
                to_config(values[name], hints[name])
                if dataclasses.is_dataclass(hints[name])
                else values[name]
            )
            for name in hints
        }
    )


def to_namespace(config: Config) -> Any:
    """Return a configuration as a parser's namespace; ``to_config`` gives it back."""
    namespace = jsonargparse.Namespace()
    for key in options():
        namespace[key] = _value(config, key)
    return namespace


def shown_value(value: Any) -> str:
    """Write a value as a user types it on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) or "empty" if isinstance(value, tuple) else str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` where a known name is near, else nothing: of the same section and
    with all words of the other, of the same last part, or spelled alike.
    """
    known = list(known)
    section, words = _section_and_words(name)
    in_section: list[str] = []
    by_ending: list[str] = []
    for entry in known:
        of_entry, entry_words = _section_and_words(entry)
        if entry_words == words:
            by_ending.append(entry)
        elif section and of_entry == section and (words < entry_words or entry_words < words):
            in_section.append(entry)
    near = [*in_section, *by_ending][:3] or difflib.get_close_matches(name, known, 2, 0.7)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _section_and_words(name: str) -> tuple[str, set[str]]:
    """Return what stands before the last dot of an option's name, and the words behind it."""
    section, _, ending = name.strip("-").replace("-", "_").rpartition(".")
    return section, set(ending.split("_"))


def explain(message: str) -> str:
    """Rewrite the parser's message about a value of the wrong kind in the words of the command
    line; leave any other message as it is.
    """
    found = re.search(
        r"(?:Parser key \"|argument --)([\w.]+)\"?:.*(?:Got value|got|value): (.*)",
        message,
        re.DOTALL,
    )
    if not found or found[1] not in options():
        return message
    return f"--{found[1]}: expected {options()[found[1]].expects}; got {found[2]}"


def _metavar(option: Option) -> str:
    if get_origin(option.kind) is Literal:
        return "{" + ",".join(get_args(option.kind)) + "}"
    if get_origin(option.kind) is tuple:
        return "A,B,..."
    return {int: "N", float: "X", bool: "{true,false}", str: "TEXT"}[option.kind]


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = vars(config)[name]
    return config
