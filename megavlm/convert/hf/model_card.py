"""README.md of an exported folder: the model card, as the hub shows it.

It states what the checkpoint knows and what the export was told, and nothing else. Of paths it
names the last part alone, since a card is read by others.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megavlm import __version__
from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.config.hub_cache import short_name
from megavlm.config.schema import Optimizer
from megavlm.config.tiling import BOUNDED, WITH_GRIDS
from megavlm.convert.hf.card_examples import ANSWER_END, EXAMPLES, Example
from megavlm.convert.hf.limits import limits
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.weights.tables import Dialect, rows, unused_rows
from megavlm.convert.weights.views import Header
from megavlm.data.images.anyres import grids_text
from megavlm.data.store.manifest import FILE_NAME as MANIFEST_NAME
from megavlm.data.store.manifest import Manifest, read_manifest
from megavlm.data.text.templates import FORMATS

FILE_NAME = "README.md"
_KINDS = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "muon": "Muon"}
PARTS = ("model", "vision", "language", "data")


def read_licenses(told: list[str]) -> dict[str, str]:
    """Read ``--license`` options: ``NAME`` (of the model) or ``PART=NAME``.

    Raises:
        ValueError: there is no such part, a name is empty, or a part is named twice.
    """
    found: dict[str, str] = {}
    for text in told:
        part, _, name = text.rpartition("=")
        part = part or "model"
        if part not in PARTS or not name.strip():
            raise ValueError(f"--license {text}: must be NAME or PART=NAME, of {', '.join(PARTS)}")
        if part in found:
            raise ValueError(f"--license {text}: {part} has {found[part]} already")
        found[part] = name.strip()
    return found


def write(
    folder: Path,
    name: str,
    checkpoint: Checkpoint,
    usage: Usage,
    dialect: Dialect,
    headers: Mapping[str, Header],
    licenses: Mapping[str, str],
) -> None:
    """Write the model card.

    Args:
        folder: of the model.
        name: its title.
        checkpoint: that is exported.
        usage: its template and its tile limits.
        dialect: of the folder.
        headers: of the tensors that are written.
        licenses: name of the licence of each part of ``PARTS`` that was told.
    """
    packs = checkpoint.folder / MANIFEST_NAME
    manifest = read_manifest(checkpoint.folder) if packs.is_file() else None
    end = FORMATS[usage.template].end if usage.template in FORMATS else ""
    example = EXAMPLES[dialect].text.replace(ANSWER_END, end)
    sections = [
        _front(licenses, EXAMPLES[dialect]),
        f"# {name}\n\nA vision-language model, exported by megavlm {__version__}"
        f" as `{dialect}`.\n\n{example}",
        "## Parts\n\n" + "\n".join(_parts(checkpoint, headers, dialect)),
        "## Training\n\n" + "\n".join(_training(checkpoint, manifest)),
    ]
    if manifest:
        sections.append("## Data\n\n" + "\n".join(_data(checkpoint, manifest)))
    sections.append("## Prompt and images\n\n" + "\n".join(_usage(usage, dialect)))
    sections.append("## Licences\n\n" + "\n".join(_licenses(licenses)))
    (folder / FILE_NAME).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _front(licenses: Mapping[str, str], example: Example) -> str:
    """Return the header that the hub reads."""
    lines = [f"license: {json.dumps(licenses['model'])}"] if "model" in licenses else []
    lines += ["library_name: transformers"]
    lines += [f"pipeline_tag: {example.task}"] if example.task else []
    return "\n".join(["---", *lines, "tags:", "- megavlm", "---"])


def _parts(
    checkpoint: Checkpoint, headers: Mapping[str, Header], dialect: Dialect
) -> Iterator[str]:
    """Yield the lines of the table of parts."""
    architecture = checkpoint.config.architecture
    part_of = {
        name: row.key.partition(".")[0] for row in rows(architecture, dialect) for name in row.names
    }
    part_of |= {name: "vision" for row in unused_rows(architecture, dialect) for name in row.names}
    vision = architecture.vision
    language = architecture.language
    needs = architecture.needs
    features = (
        "one embedding of an image"
        if needs.takes_one_embedding
        else f"{architecture.features_per_tile} features for each tile"
    )
    encoder = f"`{vision.family}`, {vision.num_layers} layers of width {vision.hidden_size}"
    told = {
        **({"vision": encoder} if vision.exists else {}),
        "connector": f"`{architecture.connector.kind}`, {features}",
    }
    if needs.has_language:
        told["language"] = (
            f"`{language.family}`, {language.num_layers} layers of width {language.hidden_size},"
            f" {language.vocab_size:,} tokens"
        )
    parameters: Counter[str] = Counter()
    dtypes: defaultdict[str, Counter[torch.dtype]] = defaultdict(Counter)
    for name, header in headers.items():
        part = part_of.get(name, "language")  # a tied head may be written as a tensor of its own
        told.setdefault(part, f"`{architecture.objective}`")
        elements = header.nbytes // header.dtype.itemsize
        parameters[part] += elements
        dtypes[part][header.dtype] += elements
    yield "| part | architecture | parameters | dtype |"
    yield "|---|---|---|---|"
    for part, text in told.items():
        names = ", ".join(
            str(kind).removeprefix("torch.") for kind, _ in dtypes[part].most_common()
        )
        yield f"| {part} | {text} | {parameters[part]:,} | {names} |"


def _training(checkpoint: Checkpoint, manifest: Manifest | None) -> Iterator[str]:
    """Yield what the last run did."""
    state = checkpoint.state
    if state.stage is None:
        yield "megavlm converted the weights; it did not train them."
        return
    config = checkpoint.config
    optimizer = config.optimizer
    training = config.training
    yield f"- stage: `{state.stage}`, model: `{short_name(config.model)}`"
    parts = {f"init.{part}": path for part, path in config.init.parts.items()}
    for option, path in (parts | {"checkpoint.load": config.checkpoint.load}).items():
        if path:
            yield f"- started from `{short_name(path)}` (`--{option}`)"
    yield f"- steps: {state.step:,}, of {training.global_batch_size:,} packs"
    yield f"- packs: {state.consumed:,}"
    if manifest:
        yield f"- tokens of a pack: at most {manifest.capacity:,}"
    yield f"- trainable: {', '.join(f'`{pattern}`' for pattern in training.trainable)}"
    yield (
        f"- {_KINDS[optimizer.kind]}: learning rate {optimizer.lr:g}{_lowest(optimizer)}"
        f" ({optimizer.schedule}), weight decay {_weight_decay(optimizer)}, {_decays(optimizer)},"
        f" gradients clipped at {optimizer.clip_grad:g} (0: not clipped)"
    )
    yield f"- precision: {training.precision}"
    for part, recipe in config.fp8.recipes.items():
        yield f"- FP8 in the {part} layers: {recipe}"
    if state.valid_loss is not None:
        yield f"- loss on validation packs after the last step: {state.valid_loss:.4f}"
    for name, value in state.figures:
        yield f"- {name} after the last step: {value:.4f}"


def _decays(optimizer: Optimizer) -> str:
    """Say how long the optimizer remembers gradients."""
    if optimizer.kind == "sgd":
        return f"momentum {optimizer.sgd_momentum:g}"
    betas = f"betas {optimizer.adam_beta1:g} and {optimizer.adam_beta2:g}"
    return f"momentum {optimizer.muon_momentum:g}, {betas}" if optimizer.kind == "muon" else betas


def _lowest(optimizer: Optimizer) -> str:
    """Say where the learning rate goes, if it goes anywhere."""
    return "" if optimizer.schedule == "constant" else f" to {optimizer.lowest_lr:g}"


def _weight_decay(optimizer: Optimizer) -> str:
    """Say what the weight decay is, or from where to where it goes."""
    if optimizer.weight_decay_schedule == "constant":
        return f"{optimizer.weight_decay:g}"
    return (
        f"{optimizer.weight_decay:g} to {optimizer.end_weight_decay:g}"
        f" ({optimizer.weight_decay_schedule})"
    )


def _data(checkpoint: Checkpoint, manifest: Manifest) -> Iterator[str]:
    """Yield what the training packs were made of: of several datasets the one whose manifest the
    checkpoint has.
    """
    totals = manifest.totals
    folders = checkpoint.config.data.train_folders
    if len(folders) > 1:
        yield f"Of packs of {', '.join(f'`{short_name(folder)}`' for folder in folders)}."
        yield "What follows is told of one of them, the first that has images, if any has:"
        yield ""
    pairs = " (pairs of a chosen and a rejected answer)" if manifest.preferences else ""
    yield (
        f"{totals.samples:,} samples{pairs} with {totals.tokens:,} tokens"
        f" ({totals.supervised:,} of them supervised) and {totals.images:,} images in"
        f" {totals.tiles:,} tiles, in {totals.packs:,} packs."
    )
    yield ""
    yield "| source | records | samples | repeat time |"
    yield "|---|---|---|---|"
    for source in manifest.sources:
        counts = f"{source.records:,} | {source.samples:,} | {source.repeat_time:g}"
        yield f"| {source.name} | {counts} |"
    if manifest.rejects:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejects.items())
        yield ""
        yield f"Rejected records: {listed}."


def _usage(usage: Usage, dialect: Dialect) -> Iterator[str]:
    """Yield how prompts and tiles are made."""
    yield f"- conversation template: `{usage.template}`"
    if usage.system_message:
        yield f"- system message: {usage.system_message}"
    if usage.crops:
        extra = ", and a thumbnail" if usage.thumbnail else ""
        yield f"- tiles of an image: {usage.min_tiles} to {usage.max_tiles}{extra}"
    elif usage.tiling == "patches":
        width, height = usage.image_limit
        yield f"- patches of an image: as many as cover it, up to {width} x {height} pixels"
    elif usage.tiling == "native":
        yield (
            "- tiles of an image: as many as are near its size, from"
            f" {usage.min_pixels:,} to {usage.max_pixels:,} pixels"
        )
    elif usage.tiling in WITH_GRIDS:
        grids = grids_text(usage.grids)
        yield f"- tiles of an image: the whole image, and one of the grids {grids}"
        if usage.tiling == BOUNDED:
            yield "- tiles of each of several images: 1, padded to a square"
    else:
        squares = {
            "pad": ", padded to a square",
            "crop": ", the square in the image's middle",
            "stretch": ", the image stretched to a square",
        }
        padded = squares.get(usage.tiling, "")
        yield f"- tiles of an image: 1{padded}"
    yield from (f"- limit of the image processor: {text}" for text in limits(usage, dialect))


def _licenses(licenses: Mapping[str, str]) -> Iterator[str]:
    """Yield the licences that were told."""
    if not licenses:
        yield "The export was told no licence. Name those of the parts before you publish it."
        return
    yield "| part | licence, as the export was told |"
    yield "|---|---|"
    for part in PARTS:
        yield f"| {part} | {licenses.get(part, 'not told')} |"
