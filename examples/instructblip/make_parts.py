"""Make what InstructBLIP starts from, small: images of coloured shapes with a question about
each, a ViT that has learned to see them, a Llama that has learned to answer behind keywords, and a
tokenizer for the Q-Former.

python examples/instructblip/make_parts.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contrastive"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "blip2"))
from make_data import FACTS, TRAINING_IMAGES, write_pairs, write_tokenizer
from make_parts import QUERIES, fit, make_tokenizer, train_vit
from try_out import parse_parts

Facts = tuple[str, str, str, str]
QUESTIONS = tuple(f"which {kind} is this" for kind in ("size", "colour", "shape", "place"))


def answer_of(facts: Facts, kind: int) -> str:
    """Return the answer to a question about an image."""
    return facts[kind]


def write_questions(out: Path, shown: dict[str, list[Facts]]) -> None:
    """Write a question about each training image, and all questions about each held-out one."""
    kinds = np.random.default_rng(6).integers(len(QUESTIONS), size=len(shown["train"]))
    asked = {"train": [[int(kind)] for kind in kinds]}
    asked["valid"] = [list(range(len(QUESTIONS)))] * len(shown["valid"])
    for name, file in (("train", "questions"), ("valid", "exam")):
        with (out / f"{file}.jsonl").open("w") as lines:
            for number, (facts, kinds_of_one) in enumerate(
                zip(shown[name], asked[name], strict=True)
            ):
                for kind in kinds_of_one:
                    turns = [
                        {"from": "human", "value": f"<image>{QUESTIONS[kind]}"},
                        {"from": "gpt", "value": answer_of(facts, kind)},
                    ]
                    record = {"image": f"{name}_{number}.png", "conversations": turns}
                    lines.write(json.dumps(record) + "\n")


def train_language(rng: np.random.Generator, steps: int, folder: Path) -> float:
    """Train a Llama to answer a question behind as many tokens as there will be queries: among them
    are the words of the answer, and by chance those of other facts, in any order. Return its last
    loss.
    """
    words = " ".join((*QUESTIONS, *(text for facts in FACTS for text in facts))).split()
    ids = make_tokenizer(folder, words).get_vocab()
    torch.manual_seed(1)
    sizes = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
    settings = LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        vocab_size=len(ids),
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(settings)

    def text(facts: Facts) -> list[int]:
        kind = int(rng.integers(len(QUESTIONS)))
        told = [fact for at, fact in enumerate(facts) if at == kind or rng.random() < 0.5]
        keys = " ".join(told).split()
        keys += ["."] * (QUERIES - len(keys))
        answer = answer_of(facts, kind).split()
        answer += ["</s>"] * (3 - len(answer))  # of one word or two
        words = [*rng.permutation(keys), "</s>", *QUESTIONS[kind].split(), *answer]
        return [ids[word] for word in words]

    def rows() -> list[list[int]]:
        return [text(FACTS[number]) for number in rng.integers(len(FACTS), size=64)]

    loss = fit(model, rows, QUERIES + 1 + len(QUESTIONS[0].split()), steps)
    model.save_pretrained(folder)
    return loss


def main() -> None:
    options = parse_parts(__doc__, vision_steps=600, language_steps=300)
    out = options.out
    write_questions(out, write_pairs(out))
    write_tokenizer(out / "words", ("which", "is", "this", "size", "colour", "shape", "place"))
    loss = train_language(np.random.default_rng(4), options.language_steps, out / "language")
    share = train_vit(out, options.vision_steps)
    print(
        f"{TRAINING_IMAGES} images; Llama's loss {loss:.3f}; the ViT names {share:.0%} of the facts"
    )


if __name__ == "__main__":
    main()
