"""Folders of parts, as their makers publish them: vision encoders and language models, small and
random.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    GemmaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megavlm.config.schema import Architecture
from tests.convert.chat import make_chat
from tests.convert.models import load_all, make_hf

WORDS = 256 + 3
_SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)


def _shake(model: nn.Module) -> nn.Module:
    """Change every weight, norms and biases included, so that one that is lost shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_vision(folder: Path, kind: str, image_size: int = 21) -> Path:
    """Make a ``siglip``, a ``clip``, an ``eva``, or a whole ``clip`` with its text half, of three
    layers; patches of 5 pixels, so that SigLIP drops a strip of the image.
    """
    torch.manual_seed(11)
    size = image_size - 1 if kind != "siglip" else image_size
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**_SIZES, image_size=size, patch_size=5))
    elif kind == "eva":
        model = Blip2VisionModel(Blip2VisionConfig(**_SIZES, image_size=size, patch_size=5))
    elif kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**_SIZES, image_size=size, patch_size=5))
    else:
        text = dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            vocab_size=30,
        )
        model = CLIPModel(
            CLIPConfig(
                vision_config=_SIZES | dict(image_size=size, patch_size=5),
                text_config=text,
                projection_dim=8,
            )
        )
    _shake(model).save_pretrained(folder)
    mean_and_std = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(mean_and_std))
    return folder


def make_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> None:
    """Make a tokenizer of single bytes, chat tokens and ``extra`` ones, without InternVL's special
    tokens.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra]
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    words = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=words, additional_special_tokens=special
    ).save_pretrained(folder)


def make_gemma_tokenizer(folder: Path) -> None:
    """Make a tokenizer of single bytes that begins and ends texts as Gemma's does, without tokens
    of images: 259 ids.
    """
    special = ["<pad>", "<eos>", "<bos>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(folder)


def make_fuyu_tokenizer(folder: Path) -> None:
    """Make a tokenizer as Fuyu's: sentencepiece's Unigram of single letters and bytes, with Fuyu's
    tokens as ordinary pieces, so that a text that begins with one has a space before it.
    """
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789?.,+-:"
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [(token, 0.0) for token in ("|SPEAKER|", "|NEWLINE|", "|ENDOFTEXT|")]
    pieces += [("\u2581", -5.0), *((f"\u2581{letter}", -6.0) for letter in letters)]
    pieces += [(letter, -5.0) for letter in letters]
    words = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    space = normalizers.Replace(" ", "\u2581")
    words.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space])
    words.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def make_gemma(folder: Path) -> Path:
    """Make a small Gemma, with a tokenizer of 259 ids and a tied head."""
    torch.manual_seed(13)
    config = GemmaConfig(
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=259,
        max_position_embeddings=512,
    )
    _shake(GemmaForCausalLM(config)).save_pretrained(folder)
    make_gemma_tokenizer(folder)
    return folder


def make_language(
    folder: Path,
    *,
    rows: int = 300,
    tied: bool = False,
    spread: float = 0.5,
    kind: str = "qwen2",
) -> Path:
    """Make a language model of a kind, whose tokenizer has ``WORDS`` tokens and whose embedding has
    ``rows`` rows; ``spread`` is the standard deviation of its fresh weights.
    """
    torch.manual_seed(12)
    sizes = dict(
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=rows,
    )
    config = AutoConfig.for_model(
        kind,
        **sizes,
        **({"head_dim": 8} if kind == "qwen3" else {}),
        tie_word_embeddings=tied,
        max_position_embeddings=256,
        initializer_range=spread,
    )
    _shake(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_parts(folder: Path, architecture: Architecture) -> tuple[Path, Path, Path]:
    """Write a model in the chat dialect, its InternViT alone, and its language model alone: three
    folders.
    """
    whole = make_chat(make_hf(folder / "native", architecture), folder / "chat", architecture)
    settings = json.loads((whole / "config.json").read_text())
    weights = load_all(whole)
    for part, prefix, section in (
        ("vision", "vision_model.", "vision_config"),
        ("language", "language_model.", "llm_config"),
    ):
        (folder / part).mkdir()
        inside = {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        save_file(inside, folder / part / "model.safetensors", metadata={"format": "pt"})
        (folder / part / "config.json").write_text(json.dumps(settings[section]))
    make_tokenizer(folder / "language")
    return whole, folder / "vision", folder / "language"
