"""Cross checks of what an objective does not support."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.schema import Architecture, Config, Parallel


def objective_problems(config: Config) -> Iterator[str]:
    """Yield what does not go with the run's objective; its layouts are checked apart."""
    arch = config.architecture
    wanted = f"--architecture.objective {arch.objective}"
    share = config.data.next_image
    if not 0 <= share <= 1:
        yield f"--data.next_image {share}: must be from 0 to 1"
    elif share and not arch.cross_attention.every:
        yield (
            f"--data.next_image {share} has no effect: --architecture.cross_attention.every is 0,"
            " so no token reads an image by cross-attention; leave it out"
        )
    if arch.needs.spans_step and config.data.loss_weights:
        yield f"--data.loss_weights: {wanted} has one loss for a whole batch; leave it out"
    if arch.needs.spans_step and (most := config.data.max_unreadable_packs):
        yield (
            f"--data.max_unreadable_packs {most}: {wanted} compares the pairs of all packs of a"
            " batch, and one of fewer pairs has another loss; use 0"
        )
    if arch.needs.is_of_preferences:
        yield from _preferences(config, wanted)
    if arch.needs.is_of_pairs:
        yield from _pairs(config, wanted)
    elif _reads_nothing(arch):
        flag = "--architecture.connector.qformer"
        yield (
            f"{flag}.text true: {wanted} shows the Q-Former no texts, and what reads them would"
            f" never be trained; use false, or {flag}.instruction_tokens above 0"
        )
    if arch.needs.has_language:
        return
    pool = arch.image_text.pool_packs
    batch = config.training.global_batch_size
    if arch.objective == "qformer" and pool > 0 and batch % pool:
        yield (
            f"--architecture.image_text.pool_packs {pool} does not divide"
            f" --training.global_batch_size {batch}"
        )
    if folder := config.init.language:
        yield f"--init.language {folder}: {wanted} has no language model; leave it out"
    if config.fp8.language != "none":
        yield f"--fp8.language {config.fp8.language}: {wanted} has no language model; use none"
    decay = config.optimizer.language_layer_decay
    if decay != 1:
        yield f"--optimizer.language_layer_decay {decay}: {wanted} has no language model; use 1"


def _reads_nothing(arch: Architecture) -> bool:
    """Tell whether a Q-Former has what reads texts, but no instructions to read."""
    connector = arch.connector
    return (
        connector.kind == "qformer" and connector.qformer.text and not connector.instruction_tokens
    )


def _pairs(config: Config, wanted: str) -> Iterator[str]:
    """Yield what a model that is trained on pairs of an image and its text does not support."""
    arch = config.architecture
    if arch.needs.takes_one_embedding and arch.language.is_encoder:
        for part, folder in config.init.parts.items():
            yield (
                f"--init.{part} {folder}: {wanted} starts from scratch, or from a whole CLIPModel"
                " or SiglipModel with --checkpoint.load; leave it out"
            )
    if config.data.loss_reduction != "sample":
        yield (
            f"--data.loss_reduction {config.data.loss_reduction}: {wanted} weighs each pair alike;"
            " use sample"
        )
    if arch.lora.rank:
        yield f"--architecture.lora.rank {arch.lora.rank}: {wanted} has no adapters; use 0"


def _preferences(config: Config, wanted: str) -> Iterator[str]:
    """Yield what does not go with preferences: an answer has the probability that the model gives
    it, whatever its length, and each pair of answers weighs the same.
    """
    if config.data.loss_reduction != "sample":
        yield (
            f"--data.loss_reduction {config.data.loss_reduction}: {wanted} weighs each pair of"
            " answers alike; use sample"
        )
    for name in ("label_smoothing", "z_loss"):
        if value := vars(config.loss)[name]:
            yield f"--loss.{name} {value}: {wanted} compares probabilities of answers; use 0"
    if config.data.loss_weights:
        yield f"--data.loss_weights: {wanted} weighs each pair of answers alike; leave it out"
    if most := config.data.max_unreadable_packs:
        yield (
            f"--data.max_unreadable_packs {most}: {wanted} needs the reference's probabilities of"
            " every pack; use 0"
        )
    if augment := config.data.augment:
        yield (
            f"--data.augment {','.join(augment)}: {wanted} compares with what the reference makes"
            " of images as they were packed; leave it out"
        )
    if "://" in config.data.reference:
        yield (
            f"--data.reference {config.data.reference}: must be a local folder, or one of a shared"
            " file system"
        )
    # Without data, a plan is made.
    has_loss = bool(config.data.valid if config.eval.only else config.data.train)
    if has_loss and not (config.data.reference or config.checkpoint.save):
        yield (
            f"--data.reference: {wanted} needs a folder for the reference's probabilities; name"
            " one, or --checkpoint.save"
        )


def objective_layout_problems(parallel: Parallel, arch: Architecture) -> Iterator[str]:
    """Yield kinds of parallelism that the run's objective does not support."""
    wanted = f"--architecture.objective {arch.objective}"
    if not arch.needs.is_of_pairs and arch.needs.has_language:
        return
    why = "has short texts" if arch.needs.is_of_pairs else "has no language model"
    if parallel.context_parallel_size > 1:
        yield (
            f"--parallel.context_parallel_size {parallel.context_parallel_size}: {wanted} {why},"
            " so ranks share no sample; use 1"
        )
    if parallel.sequence_parallel:
        yield f"--parallel.sequence_parallel true: {wanted} does not support it; use false"
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual > 1:
        yield (
            f"--parallel.virtual_pipeline_model_parallel_size {virtual}: {wanted} does not support"
            " interleaved 1F1B; use 1"
        )
