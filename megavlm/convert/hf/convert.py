"""Whole models between checkpoints and Hugging Face folders, in any dialect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megavlm.checkpoint import step_folder, train_state
from megavlm.checkpoint.step_folder import CONFIG_NAME, SHARDS, TOKENIZER
from megavlm.checkpoint.train_state import State
from megavlm.config.cli import to_yaml
from megavlm.config.models import MODELS
from megavlm.config.recipes import recipe, recipe_of
from megavlm.config.schema import Architecture, Config
from megavlm.convert.dist_checkpoint import ShardsFolder, write_shards
from megavlm.convert.hf import (
    model_card,
    named_tokens,
    peft_folder,
    preprocessing,
    unused_weights,
)
from megavlm.convert.hf.copied_tokenizer import copy_qformer_tokenizer, copy_tokenizer
from megavlm.convert.hf.hub_formats import HUB_FORMATS, dialect_of, hub_format_of
from megavlm.convert.hf.lazy_tensors import FullTensor, head_source, vision_tensor
from megavlm.convert.hf.model_config import architecture_from_hf, differences
from megavlm.convert.hf.part_folders import open_parts, write_parts
from megavlm.convert.hf.safetensors_files import SHARD_BYTES, SafetensorsFolder
from megavlm.convert.hf.unused_weights import WithUnused
from megavlm.convert.weights.adapters import MergedAdapters
from megavlm.convert.weights.fused_experts import separate_experts
from megavlm.convert.weights.tables import Dialect
from megavlm.convert.weights.upcycle import Upcycled, Upcycling
from megavlm.convert.weights.views import HuggingFaceView, MegatronView, Tensors
from megavlm.io.atomic import new_folder
from megavlm.io.progress import Progress


def hf_tensors_as_megatron(folder: str | Path, architecture: Architecture) -> MegatronView:
    """Show the weights of a Hugging Face folder under our checkpoint keys; each is read on access.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: the weights are not those of ``architecture``; every tensor at fault is named.
    """
    return MegatronView(open_weights(Path(folder)), architecture, dialect_of(folder))


def full_tensors(folder: str | Path, architecture: Architecture) -> FullTensor:
    """Return a function that fills a model from a Hugging Face folder: it takes a checkpoint key
    (and a shape, which may be padded) and gives the whole tensor, of which a rank reads its shard.

    A head that is tied in the folder and not in the model starts as a copy of the token embedding;
    positions are resized to the model's tiles.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: the model in the folder is another one than ``architecture``; every difference
            is named.
    """
    found = refuse_other(folder, architecture)
    view = hf_tensors_as_megatron(folder, found)
    return lambda key, shape: vision_tensor(
        view, found, architecture, head_source(key, found, architecture)
    )


def refuse_other(folder: str | Path, architecture: Architecture) -> Architecture:
    """Read the architecture of a Hugging Face folder, without its weights.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: it is another model than ``architecture``; every difference is named.
    """
    found = architecture_from_hf(folder)
    different = differences(found, architecture)
    if different:
        listed = "\n  ".join(different)
        raise ValueError(
            f"{folder}: the model there is of another architecture than --model:\n  {listed}"
        )
    return found


def open_weights(folder: Path) -> Tensors:
    """Open the weights of a Hugging Face folder."""
    form = hub_format_of(folder)
    if form.folders:
        return separate_experts(open_parts(folder, form.folders))
    return separate_experts(SafetensorsFolder(folder, rename=form.name_on_disk))


def _merged(
    source: Tensors, architecture: Architecture, dialect: Dialect, dtype: torch.dtype | None
) -> Tensors:
    if not architecture.lora.rank:
        return source
    return MergedAdapters(source, architecture, dialect, dtype)


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dialect: Dialect | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path = "",
    vision: str | Path = "",
    licenses: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    averages: bool = False,
    flag: str = "--out",
    before_named: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint as a Hugging Face folder, LoRA adapters merged, with little memory, and
    return the folder.

    Args:
        checkpoint: folder of a step, or a run's save folder.
        out: folder to make; missing or empty.
        dialect: to write it in; none: that of the recipe the model was trained with.
        dtype: dtype of the weights; none: as they are.
        tokenizer: folder of the tokenizer, where the checkpoint has none.
        vision: folder of the vision encoder that the model started from, which has the weights
            that only files hold, if the checkpoint has none.
        licenses: name of the licence of each part, for the model card.
        shard_bytes: largest size of a file of weights; a larger tensor has a file of its own.
        averages: write the moving averages of the parameters.
        flag: names ``out`` in errors.
        before_named: called when everything is written, before ``out`` has its name.

    Raises:
        FileNotFoundError: the checkpoint, or its tokenizer, is missing.
        ValueError: the checkpoint is damaged or of another model than it says, or ``out`` is taken.
    """
    found = step_folder.find_given(checkpoint)
    folder = found.folder
    out = Path(out)
    architecture = found.config.architecture
    dialect = dialect or recipe(found.config.recipe).format_for(architecture)
    form = HUB_FORMATS[dialect]
    source = _merged(ShardsFolder(folder / SHARDS, averages=averages), architecture, dialect, dtype)
    used = HuggingFaceView(source, architecture, dtype, dialect=dialect)
    unused = unused_weights.read(folder)
    if vision:
        unused = unused_weights.of_export(Path(vision), architecture, dialect)
    view = form.gather_experts(WithUnused(used, architecture, dialect, unused, dtype))
    words = Path(tokenizer) if tokenizer else folder / TOKENIZER
    if not words.is_dir():
        raise FileNotFoundError(
            f"{words}: the checkpoint has no tokenizer; name the folder of one with --tokenizer"
        )
    with new_folder(out, flag) as growing, Progress("export", "B", _bytes(view)) as progress:
        usage = preprocessing.of_checkpoint(folder)
        form.write_files(growing, words, architecture, usage, _main_dtype(view))
        model_card.write(growing, out.name, found, usage, dialect, view.headers, licenses or {})
        write_parts(view, growing, form.folders, shard_bytes, done=progress.add)
        before_named()
    return out


def import_(
    folder: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path = "",
    adapters: str | Path = "",
    upcycling: Upcycling | None = None,
) -> Path:
    """Write a Hugging Face folder as a checkpoint that any layout can load; its weights can be
    started from, no run be resumed.

    Args:
        folder: the Hugging Face folder.
        out: folder of the checkpoint to make; missing or empty.
        tokenizer: folder of the tokenizer; empty: that of the model.
        adapters: folder of LoRA adapters in PEFT's format; empty: none.
        upcycling: make a mixture of experts of a dense language model; none: leave it as it is.

    Returns:
        The checkpoint's folder.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: the model cannot be trained here, its weights are not those that its settings
            say, or ``out`` is taken.
    """
    folder = Path(folder)
    out = Path(out)
    architecture = architecture_from_hf(folder)
    view: Tensors = hf_tensors_as_megatron(folder, architecture)
    if adapters:
        view = peft_folder.WithAdapters(view, architecture, Path(adapters), dialect_of(folder))
        architecture = view.architecture
    mixture = architecture
    if upcycling is not None:
        mixture = upcycling.architecture(architecture)
        view = Upcycled(view, mixture, upcycling.seed)
    name = next((name for name, known in MODELS.items() if known == mixture), "custom")
    source = recipe_of(dialect_of(folder)).name
    with new_folder(out, "--out") as growing, Progress("import", "B", _bytes(view)) as progress:
        words = copy_tokenizer(Path(tokenizer) if tokenizer else folder, growing / TOKENIZER)
        if words is not None and not tokenizer:
            named_tokens.check(folder, growing / TOKENIZER, architecture.image_tokens)
        write_shards(view, growing / SHARDS, done=progress.add)
        copy_qformer_tokenizer((tokenizer, folder), growing / TOKENIZER)
        config = Config(recipe=source, stage="", model=name, architecture=mixture)
        (growing / CONFIG_NAME).write_text(to_yaml(config), encoding="utf-8")
        unused_weights.write(
            unused_weights.of_model(folder, architecture, dialect_of(folder)), growing
        )
        preprocessing.write(hub_format_of(folder).read_usage(folder), growing)
        train_state.write(State(tokenizer=words), growing)
    return out


@dataclass(frozen=True, kw_only=True)
class PartCheck:
    """What became of one part's tensors on the way there and back.

    Args:
        part: first word of its names, such as ``vision_tower`` or ``mlp1``.
        tensors: in the part.
        nbytes: of them.
        changed: names of those that came back different.
        widened: names of those that came back with the same values in a wider dtype, since the
            tensor that they are part of has several dtypes in the folder.
    """

    part: str
    tensors: int
    nbytes: int
    changed: tuple[str, ...]
    widened: tuple[str, ...]


def check(folder: str | Path) -> list[PartCheck]:
    """Convert a Hugging Face folder to our layout and back, tensor by tensor, in memory, and
    compare bit for bit; a tensor that came back in a wider dtype, after rounding to its own.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: the model cannot be trained here, or its weights are not those that its settings
            say.
    """
    folder = Path(folder)
    architecture = architecture_from_hf(folder)
    source = open_weights(folder)
    dialect = dialect_of(folder)
    view = MegatronView(source, architecture, dialect)
    unused = unused_weights.of_model(folder, architecture, dialect)
    used = HuggingFaceView(view, architecture, dialect=dialect)
    back = WithUnused(used, architecture, dialect, unused)
    widened = view.widened
    names: dict[str, list[str]] = {}
    changed: dict[str, list[str]] = {}
    with Progress("check", "B", _bytes(back)) as progress:
        for name, header in back.headers.items():
            if name not in source.headers:  # the copy of a tied head
                continue
            part = name.split(".")[0]
            names.setdefault(part, []).append(name)
            original = source[name]
            returned = back[name].to(original.dtype) if name in widened else back[name]
            if not _same_bits(original, returned):
                changed.setdefault(part, []).append(name)
            progress.add(header.nbytes)
    return [
        PartCheck(
            part=part,
            tensors=len(found),
            nbytes=sum(back.headers[name].nbytes for name in found),
            changed=tuple(changed.get(part, ())),
            widened=tuple(name for name in found if name in widened),
        )
        for part, found in names.items()
    ]


def _main_dtype(view: WithUnused) -> torch.dtype:
    """Return the dtype that most elements have; config.json names one for the whole model."""
    elements: Counter[torch.dtype] = Counter()
    for header in view.headers.values():
        elements[header.dtype] += header.nbytes // header.dtype.itemsize
    return elements.most_common(1)[0][0]


def _bytes(view: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(header.nbytes for header in view.headers.values())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits; NaN is equal to itself here."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)
