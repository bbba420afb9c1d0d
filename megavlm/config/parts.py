"""The section of the configuration that names parts to start from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Init:
    """Start from parts that were trained separately; any part that is not named gets fresh
    weights.

    Args:
        vision: Hugging Face folder of a vision encoder: InternViT, CLIP, SigLIP, or the
            EVA of a BLIP-2.
        connector: Hugging Face folder that has a Q-Former (BLIP-2, InstructBLIP), or of the BERT
            that a Q-Former starts as.
        text: Hugging Face folder whose Q-Former reads texts (BLIP-2's first stage, InstructBLIP),
            or of a BERT: embeddings and MLPs of texts for one that --init.connector has without
            them (BLIP-2's second stage).
        language: Hugging Face folder of a language model with its tokenizer; InternVL's special
            tokens are added.
        tokenizer: folder of the language model's tokenizer, if its own is Python code that cannot
            be replaced (InternLM2's and InternLM3's can).
    """

    vision: str = ""
    connector: str = ""
    text: str = ""
    language: str = ""
    tokenizer: str = ""

    @property
    def parts(self) -> dict[str, str]:
        """Folders of the parts that are named."""
        names = ("vision", "connector", "text", "language")
        return {name: folder for name in names if (folder := vars(self)[name])}

    @property
    def is_whole(self) -> bool:
        """Whether both parts are named, so that they make a model."""
        return bool(self.vision and self.language)
