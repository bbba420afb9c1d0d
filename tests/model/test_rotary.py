"""Angles of patches and of tokens against those of transformers."""

from __future__ import annotations

import torch

from megavlm.model.rotary import patch_angles, section_angles


def test_patches_turn_by_row_and_column_as_in_transformers() -> None:
    from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionRotaryEmbedding

    config = Qwen2_5_VLConfig().vision_config
    config.hidden_size = 80 * config.num_heads  # heads of 80, as in the published models
    places = torch.stack([torch.arange(300) // 20, torch.arange(300) % 20])
    expected, _ = Qwen2_5_VLVisionRotaryEmbedding(config)(places, places.T)
    angles = patch_angles(places, 80)
    assert angles.shape == (300, 1, 1, 80)
    torch.testing.assert_close(angles[:, 0, 0].cos(), expected, rtol=0, atol=1e-5)


def test_tokens_turn_by_frame_row_and_column_as_in_transformers() -> None:
    from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

    config = Qwen2_5_VLConfig().text_config
    config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    }
    places = torch.randint(0, 4000, (3, 50))
    rotary = Qwen2_5_VLRotaryEmbedding(config)
    cosine, sine = rotary(torch.zeros(1), places[:, None])
    angles = section_angles(places, rotary.inv_freq, (16, 24, 24))[:, 0, 0]
    torch.testing.assert_close(angles.cos(), cosine[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(angles.sin(), sine[0], rtol=0, atol=1e-5)


def test_frames_rows_and_columns_take_turns_as_in_qwen3_vl() -> None:
    from transformers.models.qwen3_vl import Qwen3VLConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    config = Qwen3VLConfig().text_config
    sections = [24, 20, 20]
    config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": sections,
        "mrope_interleaved": True,
    }
    places = torch.randint(0, 4000, (3, 50))
    rotary = Qwen3VLTextRotaryEmbedding(config)
    cosine, sine = rotary(torch.zeros(1), places[:, None])
    angles = section_angles(places, rotary.inv_freq, sections, interleaved=True)[:, 0, 0]
    torch.testing.assert_close(angles.cos(), cosine[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(angles.sin(), sine[0], rtol=0, atol=1e-5)
