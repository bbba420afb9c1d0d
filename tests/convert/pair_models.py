"""Small random CLIP and SigLIP models of transformers."""

from __future__ import annotations

import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

SIDE = 16
_VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=4,
)
_TEXT = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)


def make_pair_model(
    kind: str, *, vocab_size: int, positions: int, begin: int, end: int, noise: float
) -> CLIPModel | SiglipModel:
    """Make a random ``clip`` or ``siglip``.

    Args:
        kind: of the two.
        vocab_size: ids of texts.
        positions: most tokens of a text.
        begin, end: ids that begin a text, and end and fill it up.
        noise: added to all parameters, so that scales, norms and biases are not ones and zeros.
    """
    torch.manual_seed(5)
    text = _TEXT | dict(
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=end,
    )
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=20))
    else:
        text["projection_size"] = 32
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model.eval()
