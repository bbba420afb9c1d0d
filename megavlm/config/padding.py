"""What is filled up so that it divides over ranks: the vocabulary, and the heads of the vision
encoder.
"""

from __future__ import annotations

_VOCABULARY_MULTIPLE = 128


def padded_vocabulary(vocab_size: int) -> int:
    """Rows of embedding and head: the next multiple of 128, whatever the layout, so that
    checkpoints fit every one.
    """
    return -(-vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def padded_heads(heads: int, tensor_size: int) -> int:
    """Heads with those that only pad: the next multiple of the ranks that share them. InternViT-6B
    has 25.
    """
    return -(-heads // tensor_size) * tensor_size
