"""A model of two encoders in this process, for embeddings of images and texts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# First that which keeps megatron-core from warning of packages that it could use.
import megavlm.train  # noqa: F401
from megavlm.checkpoint import step_folder
from megavlm.checkpoint.step_folder import TOKENIZER, Checkpoint
from megavlm.config.recipes import recipe_of
from megavlm.config.schema import Architecture, Config, Data, Training
from megavlm.convert.hf import preprocessing
from megavlm.convert.hf.hub_formats import dialect_of, hub_format_of
from megavlm.convert.hf.model_config import architecture_from_hf
from megavlm.convert.hf.preprocessing import Usage
from megavlm.data.images.tiling import Tiling
from megavlm.data.loading.batch import Batch
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import fingerprint, load_tokenizer
from megavlm.io.storage import file_states
from megavlm.model.vlm import VisionLanguageModel
from megavlm.parallel import backend, process_groups
from megavlm.planner.layout import make_layout
from megavlm.train import initial_weights
from megavlm.train.resume import Start

_TIMEOUT_MINUTES = 60


@dataclass(frozen=True, kw_only=True)
class TwoTowers:
    """Where the weights of two encoders are, and how they are used.

    Args:
        config: of the model, on one rank.
        start: a checkpoint, or a folder of ``CLIPModel`` or ``SiglipModel``.
        tokenizer: folder of its tokenizer.
        usage: its template and tiling.
    """

    config: Config
    start: Start
    tokenizer: str
    usage: Usage

    @property
    def architecture(self) -> Architecture:
        """The architecture of the model."""
        return self.config.architecture

    def template(self) -> ChatTemplate:
        """Return the tokens of a text, as many as the encoder has positions for."""
        length = chat_format(self.usage.template).pair_length
        bound = self.architecture.needs.longest_sample(self.architecture)
        if bound is not None:
            length = min(length, bound[1])
        return ChatTemplate(
            load_tokenizer(self.tokenizer), 0, name=self.usage.template, pair_length=length
        )

    def tiling(self) -> Tiling:
        """Return how an image becomes the model's one tile."""
        return Tiling(
            tile_size=self.architecture.vision.image_size,
            max_tiles=1,
            mode=self.usage.tiling,
            pixel_mean=self.architecture.vision.pixel_mean,
            resample=self.architecture.vision.resample,
        )


def find_towers(model: str, tokenizer: str, precision: str) -> TwoTowers:
    """Read what is in the folder of a model, without its weights.

    Args:
        model: folder of a checkpoint or of a run, or of a ``CLIPModel`` or ``SiglipModel``.
        tokenizer: folder of the tokenizer; empty: the model's own.
        precision: dtype of the computation.

    Raises:
        FileNotFoundError: there is no such model, or it has no tokenizer.
        ValueError: a model that gives no embeddings of pairs.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise FileNotFoundError(f"--model {model}: there is no such folder")
    start: Start
    if (folder / "config.json").is_file():
        architecture = architecture_from_hf(folder)
        start = folder
        usage = hub_format_of(folder).read_usage(folder)
        words = folder
        recipe = recipe_of(dialect_of(folder)).name
    else:
        found = step_folder.find(folder)
        if found is None:
            raise FileNotFoundError(
                f"--model {model}: holds neither a checkpoint nor a config.json of Hugging Face"
            )
        architecture = found.config.architecture
        start = found
        usage = preprocessing.of_checkpoint(found.folder)
        words = found.folder / TOKENIZER
        recipe = found.config.recipe
    _check(model, architecture, usage)
    words = Path(tokenizer) if tokenizer else words
    if not (words / "tokenizer_config.json").is_file():
        raise FileNotFoundError(
            f"--model {model}: {words} has no tokenizer; name the folder of one with --tokenizer"
        )
    config = Config(
        recipe=recipe,
        stage="",
        model="custom",
        architecture=architecture,
        data=Data(loss_reduction="sample"),
        training=Training(precision=precision),
    )
    return TwoTowers(config=config, start=start, tokenizer=str(words), usage=usage)


def _check(model: str, architecture: Architecture, usage: Usage) -> None:
    """Raise ValueError for a model that gives no embeddings of pairs."""
    if architecture.objective != "contrastive":
        raise ValueError(
            f"--model {model}: a model of the objective {architecture.objective} gives no"
            " embeddings of images and texts; name a CLIPModel, a SiglipModel, or a checkpoint that"
            " was trained with --recipe clip or siglip"
        )
    if not chat_format(usage.template).is_of_pairs:
        raise ValueError(
            f"--model {model}: its packs have the template {usage.template}, which is not of pairs"
        )


class Towers:
    """The two encoders, with their weights, in this process.

    Args:
        model: what they are.
    """

    def __init__(self, model: TwoTowers) -> None:
        torch.set_num_threads(1)  # the processes are the parallelism; and sums stay the same
        _choose_device()
        config = model.config
        self.backend = backend.start(_TIMEOUT_MINUTES, store=dist.HashStore())
        layout = make_layout(config)
        groups = process_groups.create(config.parallel, 0, layout.embedding_chunk)
        self.chunk = VisionLanguageModel(config, layout, groups, 0)
        self.chunk.to(self.backend.device)
        initial_weights.fill(config, model.start, (), [self.chunk])
        self.chunk.eval()

    @torch.no_grad()
    def embed(self, batch: Batch) -> Tensor:
        """Return the embeddings of the images and texts of a pack, of length one, on the host:
        float32 [2, n, E].
        """
        return self.chunk(batch.to(self.backend.device)).cpu()

    def close(self) -> None:
        """End the process group of this process."""
        process_groups.destroy()
        backend.stop()


def _choose_device() -> None:
    """Give each worker process of a machine one of its devices, in turn, and no part in a job of
    several ranks that the environment may tell of; ``backend.start`` reads the variables.
    """
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    number = re.search(r"\d+$", current_process().name)
    if number and torch.cuda.is_available():
        device = (int(number[0]) - 1) % torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(device)


def facts(model: TwoTowers) -> dict[str, Any]:
    """Return what embeddings depend on, as JSON: the files of weights with their sizes and times,
    the tokenizer, settings.
    """
    start = model.start
    return {
        "model": file_states(start.folder if isinstance(start, Checkpoint) else Path(start)),
        "tokenizer": fingerprint(load_tokenizer(model.tokenizer)),
        "template": model.usage.template,
        "tiling": model.usage.tiling,
        "precision": model.config.training.precision,
    }
