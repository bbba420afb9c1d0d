"""The parameters of a run, by what is done with them: trained at which rate, or frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megavlm.config.optimizer import Kind
from megavlm.config.parameter_groups import decays, is_orthogonalised, multiplier
from megavlm.config.schema import Config
from megavlm.config.unfreezing import frozen_steps
from megavlm.planner.flops import pieces
from megavlm.planner.parameters import is_trained


@dataclass(frozen=True, kw_only=True)
class Row:
    """Parameters of one part that are treated alike.

    Args:
        part: vision, connector or language.
        frozen: whether they are not trained.
        multiplier: of the learning rate; 0 if they are frozen.
        weight_decay: whether they have weight decay.
        optimizer: what updates them; empty if they are frozen.
        frozen_steps: steps of the run in which they are frozen, if they are trained after these.
        names: checkpoint keys, in the order of the forward pass.
        parameters: elements of all of them, without padding.
    """

    part: str
    frozen: bool
    multiplier: float
    weight_decay: bool
    optimizer: str
    frozen_steps: int
    names: tuple[str, ...]
    parameters: int


def parameter_keys(config: Config) -> list[str]:
    """Return the checkpoint keys of all parameters, in the order of the forward pass."""
    return [piece.key for piece in pieces(config.architecture) if piece.elements]


def parameter_table(config: Config) -> list[Row]:
    """Group the parameters of the whole model, in the order of their first parameter."""
    found: dict[tuple, list] = {}
    for piece in pieces(config.architecture):
        if not piece.elements:
            continue
        trained = is_trained(piece, config.training.trainable)
        factor = multiplier(piece.key, config.optimizer, config.architecture)
        decayed = decays(piece.key, config.optimizer, is_matrix=piece.is_matrix)
        part = piece.key.split(".")[0]
        waiting = frozen_steps(piece.key, config.training) if trained else 0
        kind = updater(piece.key, config.optimizer.kind) if trained else ""
        group = (part, not trained, factor if trained else 0.0, decayed and trained, kind, waiting)
        found.setdefault(group, []).append(piece)
    return [
        Row(
            part=part,
            frozen=frozen,
            multiplier=factor,
            weight_decay=decayed,
            optimizer=kind,
            frozen_steps=waiting,
            names=tuple(piece.key for piece in members),
            parameters=sum(piece.elements for piece in members),
        )
        for (part, frozen, factor, decayed, kind, waiting), members in found.items()
    ]


def updater(key: str, kind: Kind) -> Kind:
    """Return what updates a trained parameter: Muon leaves some to AdamW."""
    return "adamw" if kind == "muon" and not is_orthogonalised(key, kind) else kind


def table_lines(config: Config, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table, with peak learning rates and the first weight decay."""
    yield (
        f"{'part':<10} {'tensors':>7} {'parameters':>15} {'learning rate':>13} {'x':>9}"
        f" {'weight decay':>12} {'by':>5}  first"
    )
    for row in rows:
        rate = f"{config.optimizer.lr * row.multiplier:.4g}"
        decay = config.optimizer.weight_decay if row.weight_decay else 0.0
        treated = (
            f"{'frozen':>13} {'':>9} {'':>12} {'':>5}"
            if row.frozen
            else f"{rate:>13} {row.multiplier:>9.4g} {decay:>12g} {row.optimizer:>5}"
        )
        late = f" (frozen for {row.frozen_steps:,} steps)" if row.frozen_steps else ""
        yield (
            f"{row.part:<10} {len(row.names):>7} {row.parameters:>15,} {treated}  {row.names[0]}"
            f"{late}"
        )
