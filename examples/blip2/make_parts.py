"""Make what BLIP-2 starts from, small: images of coloured shapes with captions, a ViT that has
learned to see them, an OPT that has learned to write a caption after keywords, and a tokenizer for
the first stage.

python examples/blip2/make_parts.py OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contrastive"))
from make_data import (
    COLOURS,
    FACTS,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    TRAINING_IMAGES,
    caption,
    write_pairs,
    write_tokenizer,
)
from try_out import parse_parts

from megavlm.config.vision import PIXELS

QUERIES = 8
KINDS = (tuple(SIZES), COLOURS, SHAPES, tuple(PLACES))
MEAN, STD = PIXELS["clip"]
END = "\n"
VISION = dict(
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=8,
    initializer_range=0.02,  # of transformers: 1e-10, with which it learns no places
)


def make_tokenizer(folder: Path, words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Write a tokenizer with a token for each word, one for a line break, and one that begins a
    text.
    """
    names = ("</s>", "<unk>", ".", END, *sorted(set(words)))
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    cuts = [
        pre_tokenizers.Split(Regex(" +"), "removed"),
        pre_tokenizers.Split(Regex(END), "isolated"),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 0)]
    )
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "</s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **ends)
    tokenizer.save_pretrained(folder)
    return tokenizer


def fit(
    model: PreTrainedModel, rows: Callable[[], list[list[int]]], start: int, steps: int
) -> float:
    """Train a language model to go on behind the first ``start`` tokens of rows; return its last
    loss.

    Args:
        model: the model.
        rows: draws token ids for a step, of equal lengths.
        start: first token that is learned.
        steps: of training.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        tokens = torch.tensor(rows())
        logits = model(input_ids=tokens).logits[:, start - 1 : -1]
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, start:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


def train_language(rng: np.random.Generator, steps: int, folder: Path) -> float:
    """Train an OPT to write a caption behind as many tokens as there will be queries, among them
    the caption's keywords in any order; return its last loss.
    """
    words = (word for facts in FACTS for word in caption(facts).split())
    ids = make_tokenizer(folder, words).get_vocab()
    torch.manual_seed(1)
    sizes = dict(hidden_size=96, word_embed_proj_dim=96, ffn_dim=256, num_hidden_layers=3)
    config = OPTConfig(
        **sizes, num_attention_heads=4, vocab_size=len(ids), max_position_embeddings=64, dropout=0.0
    )
    model = OPTForCausalLM(config)

    def text(facts: tuple[str, ...]) -> list[int]:
        keys = " ".join(facts).split()
        keys += ["."] * (QUERIES - len(keys))
        words = [*rng.permutation(keys), "</s>", *caption(facts).split(), END]
        return [ids[word] for word in words]

    def rows() -> list[list[int]]:
        return [text(FACTS[number]) for number in rng.integers(len(FACTS), size=64)]

    loss = fit(model, rows, QUERIES + 1, steps)
    model.save_pretrained(folder)
    return loss


def train_vision(
    model: PreTrainedModel, rng: np.random.Generator, data: Path, steps: int, folder: Path
) -> float:
    """Train a ViT to name size, colour, shape and place, and save it; return its share of right
    answers in the last steps.
    """
    records = [json.loads(line) for line in (data / "train.jsonl").open()]
    pixels = np.stack([np.asarray(Image.open(data / "images" / one["image"])) for one in records])
    words = [one["conversations"][1]["value"] for one in records]
    labels = torch.tensor([[_index(kind, text) for kind in KINDS] for text in words])
    heads = nn.ModuleList(nn.Linear(VISION["hidden_size"], len(kind)) for kind in KINDS)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    right = []
    for _ in range(steps):
        chosen = rng.integers(len(records), size=64)
        tiles = torch.from_numpy(pixels[chosen]).permute(0, 3, 1, 2)
        seen = model((tiles / 255 - mean) / std).last_hidden_state.mean(dim=1)
        told = [head(seen) for head in heads]
        wanted = labels[torch.from_numpy(chosen)].T
        loss = sum(cross_entropy(one, label) for one, label in zip(told, wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right.append(torch.stack([one.argmax(-1) for one in told]).eq(wanted).float().mean())
    model.save_pretrained(folder)
    settings = {"image_mean": list(MEAN), "image_std": list(STD)}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return float(torch.stack(right[-50:]).mean())


def _index(kind: tuple[str, ...], text: str) -> int:
    return next(number for number, name in enumerate(kind) if f" {name}" in text)


def train_vit(out: Path, steps: int) -> float:
    """Write the ViT that is trained on the images in ``out``, and return the share of the facts
    that it names.
    """
    torch.manual_seed(2)
    model = Blip2VisionModel(Blip2VisionConfig(**VISION))
    return train_vision(model, np.random.default_rng(5), out, steps, out / "vision")


def main() -> None:
    options = parse_parts(__doc__, vision_steps=600, language_steps=300)
    out = options.out
    write_pairs(out)
    write_tokenizer(out / "words")
    loss = train_language(np.random.default_rng(4), options.language_steps, out / "language")
    share = train_vit(out, options.vision_steps)
    print(
        f"{TRAINING_IMAGES} images; OPT's loss {loss:.3f}; the ViT names {share:.0%} of the facts"
    )


if __name__ == "__main__":
    main()
