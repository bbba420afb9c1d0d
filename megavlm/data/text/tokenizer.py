"""The tokenizer of the language model, with the special tokens of a recipe. The only module of
``data`` that imports transformers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavlm.data.records.record import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_START = "<img>"
IMAGE_END = "</img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"
IMAGE_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT)
QWEN_VIDEO = "<|video_pad|>"
VIDEO_TOKENS = ("<video>", QWEN_VIDEO)
AROUND_IMAGE = "<fake_token_around_image>"
CHUNK_END = "<|endofchunk|>"
# A placeholder with the line breaks that set it apart.
_LINES = re.compile(rf"\n?{IMAGE_PLACEHOLDER}\n?")
SPECIAL_TOKENS = (*IMAGE_TOKENS, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """Special tokens that stand for images in texts.

    Args:
        start: stands before the features of an image; empty: nothing does.
        context: placeholder token, one for each image feature.
        end: stands after the features of an image; empty: nothing does.
        newline: stands after each row of tiles of an image; empty: nothing does.
        added: special tokens that a tokenizer must have, in the order in which it gets them.
        is_single: whether an image has one placeholder token, whatever its features.
        is_inline: whether an image stands in the line of its text: a line break before or behind
            its placeholder, which records have to set images apart, is left out.
        keeps_pieces: whether those that a tokenizer has as ordinary pieces stay such. Fuyu's does,
            and puts its sign of a space in front of a text that begins with one, which the
            processor of transformers takes off again.
        words: ordinary tokens that it gets before them; a decoded answer shows them.
    """

    start: str = ""
    context: str
    end: str = ""
    newline: str = ""
    added: tuple[str, ...]
    words: tuple[str, ...] = ()
    is_single: bool = False
    is_inline: bool = False
    keeps_pieces: bool = False

    @property
    def shown(self) -> tuple[str, ...]:
        """The tokens that an image becomes, each once, the context token last."""
        found = (token for token in (self.start, self.end, self.newline, self.context) if token)
        return tuple(dict.fromkeys(found))

    @property
    def text(self) -> str:
        """What an image becomes in a text."""
        return self.start + self.context + self.end

    def shown_in(self, text: str) -> str:
        """Return a text with the tokens of an image in the place of each placeholder. Images that
        stand side by side share the token between them, if the same one stands before and after an
        image.
        """
        if self.is_inline:
            text = _LINES.sub(IMAGE_PLACEHOLDER, text)
        text = text.replace(IMAGE_PLACEHOLDER, self.text)
        is_shared = self.start and self.start == self.end
        return text.replace(self.end + self.start, self.start) if is_shared else text


# By the value of ``--architecture.image_tokens``.
IMAGE_TOKEN_SETS: dict[str, ImageTokens] = {
    "internvl": ImageTokens(
        start=IMAGE_START, context=IMAGE_CONTEXT, end=IMAGE_END, added=SPECIAL_TOKENS
    ),
    "none": ImageTokens(context="", added=()),
    "llava": ImageTokens(context="<image>", added=("<image>",)),
    "idefics": ImageTokens(
        start=AROUND_IMAGE,
        context="<image>",
        end=AROUND_IMAGE,
        added=(AROUND_IMAGE, "<image>"),
        is_single=True,
    ),
    "openflamingo": ImageTokens(
        start=AROUND_IMAGE,
        context="<image>",
        end=AROUND_IMAGE,
        added=(AROUND_IMAGE, "<image>", CHUNK_END),
        is_single=True,
    ),
    "fuyu": ImageTokens(
        context="|SPEAKER|",
        newline="|NEWLINE|",
        added=("|SPEAKER|", "|NEWLINE|", "<0x04>", "|ENDOFTEXT|"),
        keeps_pieces=True,
    ),
    "qwen2_vl": ImageTokens(
        start="<|vision_start|>",
        context="<|image_pad|>",
        end="<|vision_end|>",
        added=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", QWEN_VIDEO),
        is_inline=True,
    ),
    "paligemma": ImageTokens(
        context="<image>",
        added=("<image>",),
        words=(
            *(f"<loc{place:04}>" for place in range(1024)),
            *(f"<seg{code:03}>" for code in range(128)),
        ),
    ),
}
# Folder of a Q-Former's tokenizer inside that of a language model's tokenizer, as in the folders of
# transformers.
QFORMER_TOKENIZER = "qformer_tokenizer"
# Tokenizer classes that come as Python files beside the model, and read a sentencepiece model as
# LlamaTokenizer does.
LIKE_LLAMA = ("InternLM2Tokenizer", "InternLM2TokenizerFast", "InternLM3Tokenizer")
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")

# Scripts, digits, white space, code and special tokens: two tokenizers that cut this alike and
# share a vocabulary are one.
PROBE = (
    "The 3 quick brown foxes didn't jump: 12,345.67 + 89 = ?\n\n\tdef f(x):  return x ** 2\r\n"
    "InternVL 你好，世界 naïve Straße Ελλάδα Привет العربية 한국어 🙂👍🏽 e\u0301 \u00e9 \ufb01 "
    f"<|im_start|> text {IMAGE_START}{IMAGE_CONTEXT}{IMAGE_END}"
    "<box>[[12, 34, 560, 780]]</box><|im_end|>\n"
)


def load_tokenizer(folder: str | Path, flag: str = "--tokenizer") -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder, without downloading anything or running code from it;
    ``flag`` names the folder in errors.

    InternLM's tokenizers bring such code; their ``tokenizer.model`` is read instead.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no tokenizer that transformers can read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{flag} {folder}: there is no such folder")
    # Only now, since it takes seconds: command lines know the tokens without any tokenizer.
    from transformers import AutoTokenizer

    try:
        if _is_read_as_llama(folder):
            return _load_sentencepiece(folder)
        with _unknown_model_is_fine():
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{flag} {folder}: holds no readable tokenizer: {text:.300}") from None


@contextmanager
def _unknown_model_is_fine() -> Iterator[None]:
    """Leave out transformers' warning that a config.json beside a tokenizer is of a model that it
    has no class for, as those of ``InternVLChatModel`` are: nothing but the tokenizer is loaded.
    """
    logger = logging.getLogger("transformers.configuration_utils")

    def is_another(record: logging.LogRecord) -> bool:
        return "You are using a model of type" not in record.getMessage()

    logger.addFilter(is_another)
    try:
        yield
    finally:
        logger.removeFilter(is_another)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into a folder, which is made if it is missing.

    Raises:
        OSError: the disk is full, or fails. The package tokenizers raises Exception itself.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"{folder}: the tokenizer could not be written: {error}") from error


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, image_tokens: str = "internvl") -> int:
    """Add those tokens of ``image_tokens``, a row of ``IMAGE_TOKEN_SETS``, that are
    missing, and return how many were.
    """
    row = IMAGE_TOKEN_SETS[image_tokens]
    missing = tokenizer.add_tokens(list(row.words)) if row.words else 0
    known = tokenizer.get_vocab() if row.keeps_pieces else {}
    wanted = [token for token in row.added if token not in known]
    return missing + tokenizer.add_tokens(wanted, special_tokens=True)


def extend(tokenizer: PreTrainedTokenizerBase, image_tokens: str = "internvl") -> tuple[int, ...]:
    """Add the special tokens of ``image_tokens``, and return the ids of those that were missing."""
    before = set(tokenizer.get_vocab().values())
    add_special_tokens(tokenizer, image_tokens)
    return tuple(sorted(set(tokenizer.get_vocab().values()) - before))


def video_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token of videos: LLaVA-OneVision's, or Qwen2.5's; empty: there is none."""
    known = tokenizer.get_vocab()
    return next((token for token in VIDEO_TOKENS if token in known), "")


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what a tokenizer does: its vocabulary, and its tokens for a text with many kinds of
    characters.

    It does not depend on how the files are written, so it outlives saving, loading and new versions
    of transformers.
    """
    facts = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer(PROBE, add_special_tokens=False)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()[:32]


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that a tokenizer puts before a text: none (Qwen2.5), or its BOS token
    (Llama, InternLM2.5).

    Raises:
        ValueError: it puts something else there.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(
        (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare), None
    )
    if start is None or whole[:start] not in ([], [tokenizer.bos_token_id]):
        raise ValueError(
            f"the tokenizer turns 'a' into {whole}; in front of a text, it may add its bos_token"
            " and nothing else"
        )
    return whole[:start]


def _settings(folder: Path) -> dict[str, Any]:
    """Read ``tokenizer_config.json``; an empty mapping if the folder has none."""
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _is_read_as_llama(folder: Path) -> bool:
    """Return whether a folder's sentencepiece model is read by LlamaTokenizer, and not by what
    AutoTokenizer chooses.
    """
    if not (folder / "tokenizer.model").is_file():
        return False
    name = _settings(folder).get("tokenizer_class")
    # Without a tokenizer.json, AutoTokenizer makes of a Mistral's one that puts no space in front
    # of a text.
    return name in LIKE_LLAMA or (name in LLAMA and not (folder / "tokenizer.json").is_file())


def _load_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """Load a sentencepiece model, which itself says whether a text starts with a space."""
    from sentencepiece import sentencepiece_model_pb2
    from transformers import LlamaTokenizer

    model = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    tokenizer = LlamaTokenizer.from_pretrained(
        str(folder),
        local_files_only=True,
        add_prefix_space=model.normalizer_spec.add_dummy_prefix,
        add_bos_token=_settings(folder).get("add_bos_token", True),
        trust_remote_code=False,
    )
    # Saved again, it is LlamaTokenizer's, which needs no code.
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer
