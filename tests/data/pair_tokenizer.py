"""A tokenizer as CLIP has one: a token for each word, and one before and one after a text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def make_pair_tokenizer(folder: Path, words: tuple[str, ...]) -> Path:
    """Write the tokenizer; the ids are those of the words, from 0, then unk, begin and end."""
    names = (*words, "<unk>", "<|startoftext|>", "<|endoftext|>")
    backend = Tokenizer(
        models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[
            ("<|startoftext|>", len(words) + 1),
            ("<|endoftext|>", len(words) + 2),
        ],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    ).save_pretrained(folder)
    return folder
