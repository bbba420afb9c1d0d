"""Make what Flamingo starts from, small: documents in which images of coloured shapes and words
about them follow each other, a CLIP that has learned to see shapes, and a Llama that has learned to
write such words. All words of a document are of one kind: sizes, colours, shapes or places. So the
words before an image say what is to be said of it.

python examples/flamingo/make_parts.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contrastive"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "blip2"))
from make_data import FACTS, TRAINING_IMAGES, write_pairs
from make_parts import KINDS, VISION, train_vision
from try_out import parse_parts

IMAGES = 5  # of a document
DOCUMENTS = {"train": 4000, "valid": 200}


def word(facts: tuple[str, ...], kind: int) -> str:
    """Return one of an image's facts as one word."""
    return facts[kind].replace(" ", "-")


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a tokenizer with a token for each word, and those that begin and end a text."""
    words = sorted({word(facts, kind) for facts in FACTS for kind in range(len(KINDS))})
    names = ("<unk>", "<s>", "</s>", ".", *words)
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" +"), "removed")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    ends = dict(bos_token="<s>", eos_token="</s>", pad_token="<unk>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **ends)
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_language(rng: np.random.Generator, steps: int, folder: Path) -> float:
    """Train a Llama to write words of one kind; return its last loss."""
    ids = make_tokenizer(folder).get_vocab()
    torch.manual_seed(1)
    sizes = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
    config = LlamaConfig(**sizes, vocab_size=len(ids), max_position_embeddings=256)
    model = LlamaForCausalLM(config)

    def text() -> list[int]:
        kind = int(rng.integers(len(KINDS)))
        chosen = rng.integers(len(FACTS), size=IMAGES)
        said = [name for number in chosen for name in (word(FACTS[number], kind), ".")]
        return [ids[name] for name in ("<s>", *said, "</s>")]

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        rows = torch.tensor([text() for _ in range(64)])
        logits = model(input_ids=rows).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    return float(loss.detach())


def write_documents(
    out: Path, name: str, shown: list[tuple[str, ...]], rng: np.random.Generator
) -> None:
    """Write documents of images that ``write_pairs`` has written, which show ``shown``."""
    with (out / f"{name}_documents.jsonl").open("w") as lines:
        for _ in range(DOCUMENTS[name]):
            kind = int(rng.integers(len(KINDS)))
            chosen = rng.integers(len(shown), size=IMAGES)
            said = " ".join(f"<image> {word(shown[number], kind)} ." for number in chosen)
            record = {
                "image": [f"{name}_{number}.png" for number in chosen],
                "kind": kind,
                "words": [word(shown[number], kind) for number in chosen],
                "conversations": [{"from": "pretrain", "value": said}],
            }
            lines.write(json.dumps(record) + "\n")


def main() -> None:
    options = parse_parts(__doc__, vision_steps=600, language_steps=200)
    out = options.out
    for seed, (name, facts) in enumerate(write_pairs(out).items(), start=12):
        write_documents(out, name, facts, np.random.default_rng(seed))
    loss = train_language(np.random.default_rng(4), options.language_steps, out / "language")
    torch.manual_seed(2)
    model = CLIPVisionModel(CLIPVisionConfig(**VISION))
    share = train_vision(model, np.random.default_rng(5), out, options.vision_steps, out / "vision")
    print(
        f"{TRAINING_IMAGES} images; the Llama's loss {loss:.3f}; CLIP names {share:.0%} of the"
        " facts"
    )


if __name__ == "__main__":
    main()
