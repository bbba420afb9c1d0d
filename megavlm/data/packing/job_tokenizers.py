"""The tokenizers of a packing: the language model's and, if there are instructions, the Q-Former's;
loaded as the dataset's copies of them are to be, and written there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavlm.data.packing.settings import Job
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import (
    QFORMER_TOKENIZER,
    add_special_tokens,
    first_tokens,
    load_tokenizer,
    save_tokenizer,
    video_token,
)

TOKENIZER_NAME = "tokenizer"


def load_own(job: Job) -> Any:
    """Load the tokenizer, with all that the dataset's copy of it needs."""
    tokenizer = load_tokenizer(job.tokenizer)
    add_special_tokens(tokenizer, chat_format(job.template).image_tokens)
    form = chat_format(job.template)
    if form.is_of_pairs:
        if form.fills_pair and tokenizer.pad_token_id is None:
            raise ValueError(
                f"--template {job.template}: fills up texts, and the tokenizer of --tokenizer"
                f" {job.tokenizer} has no pad_token"
            )
        if form.ends_pair and tokenizer.eos_token_id is None:
            raise ValueError(
                f"--template {job.template}: ends texts, and the tokenizer of --tokenizer"
                f" {job.tokenizer} has no eos_token"
            )
        return tokenizer
    tokenizer.chat_template = form.hf_template(
        system_message=job.system_message,
        bos=bool(form.first_token or first_tokens(tokenizer)),
        video=video_token(tokenizer) if job.tiling.joins_frames else None,
    )
    return tokenizer


def load_qformer(job: Job) -> Any:
    """Load the tokenizer of the instructions that a Q-Former reads; none if it reads none."""
    folder = job.qformer_tokenizer_folder
    return load_tokenizer(folder, "--qformer_tokenizer") if folder else None


def save_both(tokenizer: Any, words: Any, folder: Path) -> None:
    """Write both tokenizers into a dataset, that of the Q-Former inside the other one's folder, as
    in the folders of transformers.
    """
    save_tokenizer(tokenizer, folder / TOKENIZER_NAME)
    if words:
        save_tokenizer(words, folder / TOKENIZER_NAME / QFORMER_TOKENIZER)


def context_token_id(job: Job, tokenizer: Any) -> int:
    """Return the id of the token that stands for an image feature; -1 if texts have none."""
    form = chat_format(job.template)
    return -1 if form.is_of_pairs else tokenizer.convert_tokens_to_ids(form.images.context)


def end_token_id(job: Job, tokenizer: Any) -> int:
    """Return the id of the token that ends a text; -1 if the template has none."""
    end = chat_format(job.template).text_end
    return tokenizer.convert_tokens_to_ids(end) if end else -1
