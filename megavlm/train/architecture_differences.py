"""In what the model of a checkpoint and that of a run differ."""

from __future__ import annotations

from dataclasses import replace

from megavlm.config.differences import differing
from megavlm.config.schema import Architecture


def architecture_differences(
    old: Architecture, new: Architecture, *, takes_weights: bool = False
) -> list[str]:
    """Describe the fields in which two models differ, such as
    ``--architecture.vision.num_layers: 24 in the checkpoint, 45 asked for``.

    The family only says how Hugging Face's files name the same weights, and the longest sample of
    rotary positions what exports state; unused layers and heads are not built; dropout, and which
    pairs are positives of each other, may change. Checkpoints of Qwen2.5-VL from before there were
    videos do not say how far apart these are a second apart, ``tokens_per_second``.

    Args:
        old: of the checkpoint.
        new: of the run.
        takes_weights: whether the run only takes weights: it may then have LoRA adapters that the
            checkpoint lacks, another tile size, other shares of dropped patches, other positions of
            videos, another objective of the same parts, and other losses of preferences.
    """
    if takes_weights and new.needs.trains_model_of(old.needs):
        old = replace(old, objective=new.objective, preference=new.preference)
    if takes_weights and not old.lora.rank:
        old = replace(old, lora=new.lora)
    if takes_weights:
        free = ("image_size", "patch_drop", "tokens_per_second")
        of_new = {name: vars(new.vision)[name] for name in free}
        old = replace(old, vision=replace(old.vision, **of_new))
    if old.vision.family == "qwen2_5_vl" and not old.vision.tokens_per_second:
        of_new = {"tokens_per_second": new.vision.tokens_per_second}
        old = replace(old, vision=replace(old.vision, **of_new))
    of_language = dict(family=new.language.family)
    if not new.language.has_learned_positions:
        of_language["max_position_embeddings"] = new.language.max_position_embeddings
    old = replace(
        old,
        lora=replace(old.lora, dropout=new.lora.dropout),
        language=replace(old.language, **of_language),
        contrastive=replace(
            old.contrastive,
            positives=new.contrastive.positives,
            exchange=new.contrastive.exchange,
        ),
        vision=replace(
            old.vision,
            unused_layers=new.vision.unused_layers,
            unused_head=new.vision.unused_head,
        ),
    )
    return [
        f"--{name}: {before} in the checkpoint, {now} asked for"
        for name, before, now in differing(old, new, "architecture")
    ]
