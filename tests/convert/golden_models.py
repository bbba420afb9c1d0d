"""Random models whose weights are the same everywhere, for answers of other programs to keep."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture
from safetensors.torch import load_file, save_file

from megavlm.convert.hf import blip2_config, convert
from megavlm.convert.weights.qformer import retrieval_rows
from megavlm.data.sample import Image
from tests.convert.blip2_models import STAGE1
from tests.convert.models import KINDS, make_hf, save_with_pixels
from tests.data.samples import make_image

# Those whose language model OpenGVLab's InternVLChatModel has under transformers 4.37.
KINDS_OF_ORIGINAL = ("qwen2", "qwen2 tied", "InternViT-6B", "llama", "internlm2")
TEXT = (
    "<|im_start|>user\n<img>" + "<IMG_CONTEXT>" * 8 + "</img>\nthe fox said 3?<|im_end|>"
    "<|im_start|>assistant\nthe quick brown fox"
)
QUESTIONS = (("What is it?", 1), ("the quick brown fox", 0), ("<image> or <image>, the fox?", 2))
"""Questions, and how many of the images they are about."""
NEW_TOKENS = 12
SIDE = 28
# Of BLIP-2's first stage: pairs in each pack of a pool, and the temperature.
PAIRS_OF_PACKS = (3, 4)
TEMPERATURE = 0.13
HEADS = "heads"


def make_golden(folder: Path, kind: str) -> Path:
    """Write the model as transformers saves it; values of a weight follow from its name alone."""
    source = make_hf(folder, KINDS[kind], torch.float32)
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        save_file(
            {name: _values(name, tensor) for name, tensor in tensors.items()},
            path,
            metadata={"format": "pt"},
        )
    return source


def _values(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a weight's values: norms near 1, everything else near 0; images count for much."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tensor.shape)
    centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
    spread = 0.6 if "projector" in name else 0.15
    return torch.from_numpy((centre + noise * spread).astype(np.float32))


def make_stage1(folder: Path) -> Path:
    """Write a model of BLIP-2's first stage as transformers saves it, and beside it the temperature
    and the head that generates, by our keys. The ViT's keys have no bias, as in LAVIS.
    """
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    settings = blip2_config.write_parts(STAGE1)
    settings["image_text_hidden_size"] = STAGE1.image_text.size
    model = Blip2ForImageTextRetrieval(Blip2Config.from_dict(json.loads(json.dumps(settings))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_values(name, parameter))
            if name.endswith("qkv.bias"):
                parameter.unflatten(0, (3, -1))[1] = 0
    save_with_pixels(model, folder, STAGE1)
    shapes = {row.key: row.shape for row in retrieval_rows(STAGE1) if not row.names}
    heads = {key: _values(key, torch.empty(shape)) for key, shape in shapes.items()}
    heads["objective.temperature"] = torch.tensor([TEMPERATURE])
    (folder / HEADS).mkdir()
    save_file(heads, folder / HEADS / "model.safetensors")
    return folder


def stage1_questions() -> dict[str, Any]:
    """Return the pairs to ask a model of ``make_stage1`` about, and its sizes, as JSON has them.

    ``draws`` choose the wrong image of each text, then the wrong text of each image.
    """
    rng = np.random.default_rng(11)
    vision = STAGE1.vision
    count = sum(PAIRS_OF_PACKS)
    last = STAGE1.connector.qformer.vocab_size - 1
    lengths = rng.integers(4, STAGE1.image_text.text_tokens + 1, count)
    return {
        "vision": vars(vision),
        "qformer": vars(STAGE1.connector.qformer),
        "size": STAGE1.image_text.size,
        "text_tokens": STAGE1.image_text.text_tokens,
        "texts": [rng.integers(1, last, length).tolist() for length in lengths],
        "tiles": rng.integers(0, 256, (count, 3, *2 * (vision.image_size,))).tolist(),
        "draws": rng.random((2, count)).tolist(),
    }


def export_golden(folder: Path, kind: str) -> Path:
    """Write the model's chat export, by way of a checkpoint beside it, and return its folder."""
    start = convert.import_(make_golden(folder / "hf", kind), folder / "start")
    return convert.export(start, folder / "chat", dialect="chat")


def digest(folder: Path) -> str:
    """Return the SHA-256 of the names and values of all weights in a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def images() -> list[Image]:
    """Return two images of one tile each."""
    rng = np.random.default_rng(8)
    return [make_image(rng, SIDE, 1, 1) for _ in range(2)]


def pixels(image: Image) -> np.ndarray:
    """Return the pixels of an image's tile, uint8 [3, SIDE, SIDE]."""
    return np.asarray(Picture.open(io.BytesIO(image.encoded))).transpose(2, 0, 1)
