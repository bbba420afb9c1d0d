"""Cross checks of a configuration with the manifests of the packed datasets that it names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megavlm.config.checks import whole_images
from megavlm.config.checks.rank_slices import rows_of_a_rank, sharing_problems
from megavlm.config.connectors import CONNECTORS
from megavlm.config.differences import is_same
from megavlm.config.fp8 import fp8_multiple
from megavlm.config.freeze_mask import parts_named
from megavlm.config.sampling import BLOCK, exact_shares, shares_of, whole_shares
from megavlm.config.schema import ANY, Architecture, Config
from megavlm.config.tiling import WITH_GRIDS


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What the manifest of a packed dataset says that must fit the model.

    Args:
        flag: option that names the dataset, such as ``--data.train``.
        folder: where it is.
        image_size: side of a tile in pixels.
        features_per_tile: context tokens of a tile.
        vocab_size: ids of the tokenizer that made the tokens.
        capacity: tokens of a pack.
        alignment: each sample starts at a multiple of this many tokens in its pack.
        num_packs: packs in the dataset.
        num_samples: samples in it.
        has_images: whether any pack has an image.
        fingerprint: hash of the tokenizer.
        pixel_mean, pixel_std: how the pixels are to be normalised.
        resample: how images are resized to tiles.
        may_augment: whether a source was packed with data_augment.
        has_levels: whether it was packed by levels of difficulty.
        template: conversation template.
        tiling: how images became tiles.
        instruction_length: most tokens of an instruction that a Q-Former reads; 0: there are none.
        qformer_vocab_size: ids of the tokenizer of instructions.
        qformer_fingerprint: hash of that tokenizer.
        preferences: whether its samples are pairs of a chosen and a rejected answer.
    """

    flag: str
    folder: str
    image_size: int
    features_per_tile: int
    vocab_size: int
    capacity: int
    alignment: int
    num_packs: int
    has_images: bool
    fingerprint: str
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    resample: str
    may_augment: bool = False
    has_levels: bool = False
    template: str = ""
    tiling: str = ""
    num_samples: int = 0
    instruction_length: int = 0
    qformer_vocab_size: int = 0
    qformer_fingerprint: str = ""
    preferences: bool = False


def facts_problems(config: Config, facts: Sequence[DatasetFacts], world_size: int) -> list[str]:
    """Everything in which packed datasets do not fit the model, each other or the ranks."""
    return [
        *(problem for dataset in facts for problem in _dataset(config, dataset)),
        *_same_tokenizer(facts),
        *_together(config, facts),
        *_held_out(config, facts, world_size),
    ]


def _held_out(config: Config, facts: Sequence[DatasetFacts], world_size: int) -> Iterator[str]:
    """Yield that fewer validation packs are measured than a loss needs that depends on the whole
    step: each of the data-parallel ranks runs as many.
    """
    ranks = world_size // config.parallel.model_parallel_size
    for dataset in facts if config.architecture.needs.spans_step else ():
        packs = min(dataset.num_packs, config.training.eval_packs or dataset.num_packs)
        if dataset.flag == "--data.valid" and packs < ranks:
            option = "packs" if packs == dataset.num_packs else "--training.eval_packs"
            yield (
                f"--data.valid {dataset.folder}: {packs} packs are measured, and the loss of"
                f" --architecture.objective {config.architecture.objective} needs one for each of"
                f" the {ranks} data-parallel ranks; use more {option}"
            )


def _dataset(config: Config, facts: DatasetFacts) -> Iterator[str]:
    arch = config.architecture
    where = f"{facts.flag} {facts.folder}"
    if facts.num_packs < 1:
        yield f"{where}: has no packs"
    if facts.has_images and facts.image_size != arch.vision.image_size:
        yield (
            f"{where}: tiles of {facts.image_size} pixels, but --architecture.vision.image_size is"
            f" {arch.vision.image_size}"
        )
    yield from _features(config, facts, where)
    for name, packed, trained in (
        ("pixel_mean", facts.pixel_mean, arch.vision.pixel_mean),
        ("pixel_std", facts.pixel_std, arch.vision.pixel_std),
    ):
        if facts.has_images and not is_same(packed, trained):
            yield (
                f"{where}: packed for a {name} of {packed}, but --architecture.vision.{name} is"
                f" {trained}"
            )
    if facts.has_images and facts.resample != arch.vision.resample:
        yield (
            f"{where}: its images are resized {facts.resample}, but --architecture.vision.resample"
            f" is {arch.vision.resample}; pack with --resample {arch.vision.resample}, or for this"
            " model by --model"
        )
    option, rows = arch.needs.vocabulary(arch)
    if facts.vocab_size > rows:
        yield f"{where}: its tokenizer has {facts.vocab_size} tokens, but {option} is {rows}"
    yield from _form(config, facts, where)
    yield from _instructions(arch, facts, where)
    if not config.eval.only or facts.flag == "--data.valid":
        yield from _preferences(arch, facts, where)
    yield from sharing_problems(config.parallel, where, facts.capacity, facts.alignment)
    rows = rows_of_a_rank(config.parallel, facts.capacity)
    recipe = config.fp8.language
    if rows % (multiple := fp8_multiple(recipe, config.parallel.sequence_parallel)):
        yield (
            f"{where}: packs of {facts.capacity} tokens give a rank {rows} rows, and --fp8.language"
            f" {recipe} needs a multiple of {multiple}; pack with such a --capacity"
        )
    parts = {part for pattern in config.training.trainable for part in parts_named(pattern)}
    if parts and "language" not in parts and not facts.has_images:
        yield (
            f"{where}: has no images, and --training.trainable"
            f" {','.join(config.training.trainable)} learns from images only"
        )


def _features(config: Config, facts: DatasetFacts, where: str) -> Iterator[str]:
    """Yield that images have another number of placeholder tokens than the model has features."""
    arch = config.architecture
    wanted = _placeholders(arch)
    if _mixes_pairs(arch, facts):
        pairs = "pairs of an image and a text"
        texts = "conversations"
        has, reads = (texts, pairs) if arch.needs.is_of_pairs else (pairs, texts)
        form = config.data.template[0]
        yield (
            f"{where}: packed with --template {facts.template}, which makes {has}, and"
            f" --architecture.objective {arch.objective} reads {reads}; pack with"
            f" {'another --template' if form == ANY else f'--template {form}'}"
        )
    elif facts.has_images and wanted not in (None, facts.features_per_tile):
        yield (
            f"{where}: packed for {facts.features_per_tile} features a tile, but the model makes"
            f" {wanted}; train the model that these packs were made for (--model, --init.vision),"
            " or pack for this one with --model"
        )


def _form(config: Config, facts: DatasetFacts, where: str) -> Iterator[str]:
    """Yield in what the form of conversations and images is not the one that the stage wants."""
    wanted = config.data.template
    stage = f"stage {config.stage} of recipe {config.recipe}"
    is_blend = len(config.data.train_folders) > 1  # whose datasets may differ
    is_other = ANY not in wanted and facts.template not in wanted
    if is_other and not _mixes_pairs(config.architecture, facts):  # which no option would mend
        listed = ",".join(wanted)
        yield (
            f"{where}: packed with the conversation template {facts.template}, but {stage} is"
            f" trained on {listed}; pack with --template {wanted[0]}, or give --data.template"
            f" {ANY if is_blend else facts.template} to train on these packs as they are"
        )
    tiling = config.data.tiling
    if facts.has_images and tiling not in (ANY, facts.tiling):
        yield (
            f"{where}: packed with --tiling {facts.tiling}, but {stage} is trained on --data.tiling"
            f" {tiling}; pack with --tiling {tiling}, or give --data.tiling"
            f" {ANY if is_blend else facts.tiling} to train on these packs as they are"
        )
    if facts.has_images:
        yield from whole_images.packs_problems(config.architecture, facts.tiling, where)
    has_rows = facts.has_images and facts.tiling in WITH_GRIDS
    if has_rows and not config.architecture.connector.newline:
        yield (
            f"{where}: packed with --tiling {facts.tiling}, which needs"
            " --architecture.connector.newline true; this model has false"
        )


def _instructions(arch: Architecture, facts: DatasetFacts, where: str) -> Iterator[str]:
    """Yield in what instructions for a Q-Former are not those that the model reads."""
    flag = "--architecture.connector.qformer"
    reads = arch.connector.instruction_tokens
    length = facts.instruction_length
    if reads and not length:
        yield (
            f"{where}: has no instructions for a Q-Former, and {flag}.instruction_tokens is"
            f" {reads}; pack with --template instructblip and --qformer_tokenizer"
        )
    elif length > reads:
        fits = length <= arch.connector.qformer.max_position_embeddings
        yield (
            f"{where}: packed with --instruction_length {length}, but {flag}.instruction_tokens is"
            f" {reads}; pack with at most that --instruction_length"
        ) + (f", or give {flag}.instruction_tokens {length}" if reads and fits else "")
    rows = arch.connector.qformer.vocab_size
    if reads and facts.qformer_vocab_size > rows:
        yield (
            f"{where}: its --qformer_tokenizer has {facts.qformer_vocab_size} tokens, but"
            f" {flag}.vocab_size is {rows}"
        )


def _preferences(arch: Architecture, facts: DatasetFacts, where: str) -> Iterator[str]:
    """Yield that a model is given pairs of answers and reads answers alone, or the other way
    round.
    """
    if facts.preferences and not arch.needs.is_of_preferences:
        yield (
            f"{where}: packed with --preferences, each answer beside a rejected one, and"
            f" --architecture.objective {arch.objective} would learn both; pack records of one"
            " answer, or train an objective of preferences"
        )
    if arch.needs.is_of_preferences and not facts.preferences:
        yield (
            f"{where}: has no rejected answers, which --architecture.objective {arch.objective}"
            " compares; pack records of two answers with --preferences"
        )


def _mixes_pairs(arch: Architecture, facts: DatasetFacts) -> bool:
    """Tell whether a model is given pairs of an image and a text, which have no placeholder tokens,
    and reads conversations, or the other way round.
    """
    wanted = _placeholders(arch)
    return (
        facts.has_images and wanted is not None and (facts.features_per_tile == 0) != (not wanted)
    )


def _placeholders(arch: Architecture) -> int | None:
    """Return the placeholder tokens of a tile; none if the sizes of the model cannot be, which is
    reported by itself.
    """
    if arch.connector.kind not in CONNECTORS:
        return None
    if arch.needs.is_of_pairs:
        return 0
    sizes = arch.connector_sizes
    return None if any(sizes.problems()) else sizes.placeholders


def _together(config: Config, facts: Sequence[DatasetFacts]) -> Iterator[str]:
    """Yield problems of the training sets as a whole."""
    train = [dataset for dataset in facts if dataset.flag == "--data.train"]
    for other in train[1:]:
        if other.capacity != train[0].capacity:
            yield (
                f"--data.train {other.folder}: packs of {other.capacity} tokens, but those of"
                f" {train[0].folder} have {train[0].capacity}; pack them with the same --capacity"
            )
    if train and config.data.augment and not any(dataset.may_augment for dataset in train):
        yield (
            f"--data.augment {','.join(config.data.augment)} has no effect: no source of"
            " --data.train was packed with data_augment; pack with --data_augment or with"
            " data_augment in the meta file, or leave --data.augment out"
        )
    if train and config.data.curriculum and not any(dataset.has_levels for dataset in train):
        yield (
            f"--data.curriculum true: {config.data.train} has no levels of difficulty; pack with"
            " --difficulty or with difficulty in the meta file, or leave --data.curriculum out"
        )
    if len(train) == len(config.data.train_folders):
        yield from (_batch_shares if config.data.batch_shares else _shares)(config, train)


def batch_warnings(config: Config, facts: Sequence[DatasetFacts]) -> Iterator[str]:
    """Yield the training sets that have fewer packs than a step draws from them: that runs, but a
    step then holds packs twice. Yield a step of one pair, which has no other to be told from.
    """
    train = [dataset for dataset in facts if dataset.flag == "--data.train" and dataset.num_packs]
    if not train or len(train) != len(config.data.train_folders):
        return
    batch = config.training.global_batch_size
    is_single = batch == 1 and all(one.num_packs == one.num_samples for one in train)
    if config.architecture.needs.is_of_pairs and is_single:
        yield (
            "--training.global_batch_size 1: a step has one pair, and no other that it could be"
            " contrasted with; use a larger batch, or packs of several pairs"
            " (tools/pack_dataset.py --capacity)"
        )
    for dataset, drawn in _packs_of_step(config, train):
        if drawn > dataset.num_packs:
            counted = "1 pack" if dataset.num_packs == 1 else f"{dataset.num_packs} packs"
            yield (
                f"--data.train {dataset.folder}: has {counted}, and a step of"
                f" --training.global_batch_size {batch} draws {drawn:.4g} from it, so it trains on"
                " some more than once; use a smaller batch, more data, or more and smaller packs"
                " (tools/pack_dataset.py --capacity)"
            )


def _batch_shares(config: Config, train: Sequence[DatasetFacts]) -> Iterator[str]:
    """Training sets whose share of a global batch is less than a pack."""
    batch = config.training.global_batch_size
    for dataset, share in _packs_of_step(config, train):
        if share < 1:
            yield (
                f"--data.batch_shares true: {dataset.folder} has a share of {share:.2g} packs of"
                f" --training.global_batch_size {batch}, and must have 1; raise its share of"
                " --data.weights or the batch, or leave --data.batch_shares out"
            )


def _shares(config: Config, train: Sequence[DatasetFacts]) -> Iterator[str]:
    """Training sets whose share of all packs that are drawn is rounded to none."""
    weights = _weights(config, train)
    if not weights:
        return
    drawn = zip(train, exact_shares(weights), whole_shares(weights, BLOCK), strict=True)
    for dataset, share, count in drawn:
        if not count:
            yield (
                f"--data.train {dataset.folder}: has a share of {float(share):.2g} of the packs"
                f" that are drawn, which is less than one of {BLOCK:,}; give it a larger one by"
                " --data.weights, or pack it together with another folder's data"
            )


def _weights(config: Config, train: Sequence[DatasetFacts]) -> tuple[float, ...]:
    """Return what is drawn from each training set, compared with the others; empty if that is no
    number above 0, which is reported by itself.
    """
    packs = [dataset.num_packs for dataset in train]
    samples = [dataset.num_samples for dataset in train]
    weights = shares_of(config.data.weights, config.data.sampling, packs, samples)
    fits = len(weights) == len(train) and all(0 < weight < math.inf for weight in weights)
    return weights if fits else ()


def _packs_of_step(
    config: Config, train: Sequence[DatasetFacts]
) -> Iterator[tuple[DatasetFacts, float]]:
    """Yield each training set with the packs that a step draws from it on average."""
    weights = _weights(config, train)
    for dataset, share in zip(train if weights else (), exact_shares(weights), strict=True):
        yield dataset, float(share * config.training.global_batch_size)


def _same_tokenizer(facts: Sequence[DatasetFacts]) -> Iterator[str]:
    for other in facts[1:]:
        if other.fingerprint != facts[0].fingerprint:
            yield (
                f"{other.flag} {other.folder}: packed with another tokenizer than {facts[0].flag}"
                f" {facts[0].folder}"
            )
        if other.qformer_fingerprint != facts[0].qformer_fingerprint:
            yield (
                f"{other.flag} {other.folder}: packed with another --qformer_tokenizer than"
                f" {facts[0].flag} {facts[0].folder}"
            )
