"""Make what PaliGemma starts from, small: boards of one or two handwritten digits with a question
about each, a SigLIP that has learned to read such boards, and a Gemma that has learned nothing, or
a Gemma 2 for PaliGemma 2.

python examples/paligemma/make_parts.py OUT
python examples/paligemma/make_parts.py OUT --gemma 2
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "llava"))
from boards import Board, Scans, split_scans
from make_data import HELD_OUT_SCANS, write_lines
from make_parts import SIDE, one_question_each, train_encoder, write_records
from try_out import parse_parts

from megavlm.config.vision import PIXELS

MEAN, STD = PIXELS["siglip"]
SPECIAL = ["<pad>", "<eos>", "<bos>"]
SIGLIP = SiglipVisionConfig(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=8,
    vision_use_head=False,
)
SIZES = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=48,
    vocab_size=400,
    max_position_embeddings=2048,
)
# By generation. A window of the second is shorter than the tokens of an image.
GEMMA = {
    1: GemmaConfig(**SIZES, num_key_value_heads=1),
    2: Gemma2Config(**SIZES, num_key_value_heads=2, query_pre_attn_scalar=48, sliding_window=8),
}


def pixels_of(board: Board) -> np.ndarray:
    """Return a board's pixels as training sees them, uint8 [3, S, S]."""
    return np.asarray(board.picture.resize((SIDE, SIDE), 3)).transpose(2, 0, 1)


def train_siglip(rng: np.random.Generator, scans: Scans, steps: int, folder: Path) -> float:
    """Train a SigLIP, from the mean of what is behind its last norm; see ``train_encoder``."""
    return train_encoder(
        lambda: SiglipVisionModel(SIGLIP),
        lambda hidden: hidden.mean(1),
        pixels_of,
        (MEAN, STD),
        rng,
        scans,
        steps,
        folder,
    )


def make_language(texts: list[str], generation: int, folder: Path) -> None:
    """Write a fresh Gemma, and a tokenizer that begins and ends texts as Gemma's does."""
    words = Tokenizer(models.BPE())
    # A digit by itself is a token by itself.
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    cuts = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    words.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rows = SIZES["vocab_size"]
    trainer = trainers.BpeTrainer(
        vocab_size=rows, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(folder)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(GEMMA[generation]).save_pretrained(folder)


def main() -> None:
    options = parse_parts(__doc__, records=3000, exam=200, siglip_steps=500, gemma=1)
    if options.gemma not in GEMMA:
        raise SystemExit(f"--gemma {options.gemma}: must be one of {', '.join(map(str, GEMMA))}")
    images = options.out / "images"
    images.mkdir(parents=True)
    train, held_out = split_scans(HELD_OUT_SCANS, 0)
    records = write_records(np.random.default_rng(1), train, options.records, images, "train")
    exam = write_records(np.random.default_rng(2), held_out, options.exam, images, "exam")
    for name, found in (("train", records), ("exam", exam)):
        write_lines(options.out / f"{name}.jsonl", one_question_each(found))
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    make_language(texts, options.gemma, options.out / "gemma")
    steps = options.siglip_steps
    share = train_siglip(np.random.default_rng(3), train, steps, options.out / "siglip")
    print(
        f"{len(records)} records, {len(exam)} for the exam; SigLIP reads {share:.0%} of the cells"
    )


if __name__ == "__main__":
    main()
