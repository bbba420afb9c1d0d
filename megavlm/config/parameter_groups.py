"""What sets a parameter's learning rate and weight decay apart, as pure functions of its name."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence

from megavlm.config.differences import changed
from megavlm.config.freeze_mask import matches, matches_any
from megavlm.config.optimizer import Kind
from megavlm.config.options import shown_value
from megavlm.config.schema import Architecture, Optimizer

_LAYER = re.compile(r"(?:vision\.encoder|language\.decoder)\.layers\.(\d+)\.")
_MATRIX = re.compile(
    r"((vision\.encoder|language\.decoder)\.layers\.\d+\.(.+\.)?|connector\.mlp\.)linear_\w+\.weight"
)
_BEFORE_LAYERS = (
    "vision.patch_embedding.",
    "vision.class_token",
    "vision.position_embedding",
    "vision.embedding_norm.",
    "language.embedding.",
)
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "linear_qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "linear_fc1"),
}
"""Names of Hugging Face for rows of one tensor here."""

NOT_DECAYED = (
    "class_token",
    "position_embedding",
    "position_embedding.weight",
    "position_embeddings.weight",
    "connector.query",
    "connector.queries",
    "latents",
    "logit_scale",
    "logit_bias",
)
"""Ends of the names of learned inputs and temperatures, which timm and CLIP do not decay."""


def multiplier(key: str, optimizer: Optimizer, architecture: Architecture) -> float:
    """Return the learning rate of a parameter, as a multiple of the run's.

    Args:
        key: checkpoint key, which is the same at every layout.
        optimizer: the settings.
        architecture: the model, for its numbers of layers.
    """
    chosen = [factor for pattern, factor in _multipliers(optimizer) if matches(key, pattern)]
    return (chosen[-1] if chosen else 1.0) * _layer_decay(key, optimizer, architecture)


def _layer_decay(key: str, optimizer: Optimizer, architecture: Architecture) -> float:
    """Return rho^(L - i) for layer i of L, rho^(L + 1) for what stands before the layers, and 1 for
    the rest (Bao et al., BEiT, arXiv 2106.08254; InternVL's classification code).
    """
    part = key.split(".")[0]
    factor = {"vision": optimizer.vision_layer_decay, "language": optimizer.language_layer_decay}
    if factor.get(part, 1.0) == 1.0:
        return 1.0
    layers = getattr(architecture, part).num_layers
    if found := _LAYER.match(key):
        return factor[part] ** (layers - int(found[1]))
    return factor[part] ** (layers + 1) if key.startswith(_BEFORE_LAYERS) else 1.0


def decays(key: str, optimizer: Optimizer, *, is_matrix: bool) -> bool:
    """Return whether a parameter has weight decay.

    Args:
        key: checkpoint key.
        optimizer: the settings.
        is_matrix: whether it has two dimensions or more that are longer than 1.
    """
    is_listed = optimizer.decay == "model" and key.endswith(NOT_DECAYED)
    is_chosen = optimizer.decay == "all" or (is_matrix and not is_listed)
    return is_chosen and not matches_any(key, optimizer.no_decay)


def is_orthogonalised(key: str, kind: Kind) -> bool:
    """Return whether Muon updates a parameter: the weights of linear layers inside the vision
    encoder's and the language model's layers, and of an MLP connector.

    Args:
        key: checkpoint key.
        kind: of the optimizer.
    """
    return kind == "muon" and _MATRIX.fullmatch(key) is not None


def _multipliers(optimizer: Optimizer) -> Iterator[tuple[str, float]]:
    for entry in optimizer.lr_multipliers:
        pattern, _, factor = entry.partition("=")
        yield pattern.strip(), float(factor)


def setting_problems(optimizer: Optimizer) -> Iterator[str]:
    """Name settings of the groups that cannot be used with any model."""
    for name in ("vision_layer_decay", "language_layer_decay"):
        if not 0 < vars(optimizer)[name] <= 1:
            yield (
                f"--optimizer.{name} {vars(optimizer)[name]}: must be above 0 and at most 1 (1: the"
                " same rate for all layers)"
            )
    for entry in optimizer.lr_multipliers:
        flag = f"--optimizer.lr_multipliers {entry}"
        pattern, equals, factor = entry.partition("=")
        try:
            value = float(factor)
        except ValueError:
            value = math.nan
        if not pattern.strip() or not equals or math.isnan(value):
            yield f"{flag}: must be a part or a pattern of names, =, and a number: vision=0.1"
        elif value == 0:
            yield (
                f"{flag}: 0 would still keep moments of these parameters; freeze them instead:"
                " leave them out of --training.trainable"
            )
        elif not 0 < value < math.inf:
            yield f"{flag}: must be above 0"


def name_problems(
    optimizer: Optimizer,
    trainable: Sequence[str],
    keys: Collection[str],
    usual: Optimizer | None = None,
) -> Iterator[str]:
    """Name patterns that mean no parameter, or no trained one, of a model.

    Args:
        optimizer: the settings.
        trainable: the freeze mask.
        keys: checkpoint keys of all parameters.
        usual: settings that the stage of the recipe has, none: the defaults. They may be of frozen
            parameters: who narrows the freeze mask gave no such flag.
    """
    trained = {key for key in keys if matches_any(key, trainable)}
    usual = usual or Optimizer()
    yield from _without_effect(optimizer, trained, usual)
    asked = [("training.trainable", pattern, pattern) for pattern in trainable]
    asked += [("optimizer.no_decay", pattern, pattern) for pattern in optimizer.no_decay]
    for entry in optimizer.lr_multipliers:
        asked.append(("optimizer.lr_multipliers", entry, entry.partition("=")[0].strip()))
    for option, text, pattern in asked:
        if any(matches(key, pattern) for key in trained):
            continue
        flag = f"--{option} {text}"
        fused = next((tensor for name, tensor in _FUSED.items() if name in pattern), "")
        is_known = any(matches(key, pattern) for key in keys)
        if is_known and text in (*usual.no_decay, *usual.lr_multipliers):
            continue
        if is_known:
            yield f"{flag}: names frozen parameters only; --training.trainable says what is trained"
        elif fused:
            yield (
                f"{flag}: nothing is called so; here it is part of {fused}, one tensor, which has"
                f" one learning rate and weight decay: write {fused}"
            )
        else:
            yield (
                f"{flag}: no parameter of the model is called so; tools/show_parameters.py lists"
                " the names"
            )


def _without_effect(optimizer: Optimizer, trained: set[str], usual: Optimizer) -> Iterator[str]:
    """Name settings that nothing follows which is trained.

    Args:
        optimizer: the settings.
        trained: checkpoint keys of what is trained.
        usual: see ``name_problems``.
    """
    if optimizer.kind == "muon" and not any(is_orthogonalised(key, "muon") for key in trained):
        yield (
            "--optimizer.kind muon: nothing that --training.trainable trains is a weight of a"
            " linear layer, so AdamW would update everything; use --optimizer.kind adamw"
        )
    for name in changed(optimizer, "vision_layer_decay", "language_layer_decay", usual=usual):
        part = name.partition("_")[0]
        asks = vars(optimizer)[name] != 1
        if asks and not any(key.startswith(f"{part}.") for key in trained):
            yield (
                f"--optimizer.{name} {vars(optimizer)[name]} has no effect: nothing of {part} is in"
                " --training.trainable; leave it out"
            )
    if optimizer.decays:
        return
    for name, value in changed(optimizer, "no_decay", "decay").items():
        if value != vars(usual)[name]:
            yield (
                f"--optimizer.{name} {shown_value(value)} has no effect with"
                " --optimizer.weight_decay 0; leave it out"
            )
