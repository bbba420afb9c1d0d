"""The classes of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, a row for each."""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.data.images.native import QWEN2_VL_PIXELS, QWEN3_VL_PIXELS


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of the classes.

    Args:
        model_type: what config.json calls it.
        class_name: of the model.
        form: class of its settings.
        processor: class of its processor.
        family: of its vision encoder.
        language: family of its language model.
        width: what the settings of the vision encoder call its hidden size.
        output: what they call the width of its features.
        template: conversation template.
        pixels: row of ``PIXELS`` that it has if the folder has no image processor.
        bounds: fewest and most pixels of an image, if the image processor does not say.
        sections: of rotary positions, if config.json does not say.
    """

    model_type: str
    class_name: str
    form: str
    processor: str
    family: str
    language: str = "qwen2"
    width: str = "hidden_size"
    output: str = "out_hidden_size"
    template: str = "qwen2_vl"
    pixels: str = "clip"
    bounds: tuple[int, int] = QWEN2_VL_PIXELS
    sections: tuple[int, int, int] = (16, 24, 24)

    @property
    def is_third(self) -> bool:
        """Whether it is Qwen3-VL: learned positions, features of several layers, rotations that
        take turns.
        """
        return self.family == "qwen3_vl"


QWEN2_VL = Kind(
    model_type="qwen2_vl",
    class_name="Qwen2VLForConditionalGeneration",
    form="Qwen2VLConfig",
    processor="Qwen2VLProcessor",
    family="qwen2_vl",
    width="embed_dim",
    output="hidden_size",
)
QWEN2_5_VL = Kind(
    model_type="qwen2_5_vl",
    class_name="Qwen2_5_VLForConditionalGeneration",
    form="Qwen2_5_VLConfig",
    processor="Qwen2_5_VLProcessor",
    family="qwen2_5_vl",
)
_THIRD = dict(
    processor="Qwen3VLProcessor",
    family="qwen3_vl",
    template="qwen3_vl",
    pixels="siglip",
    bounds=QWEN3_VL_PIXELS,
    sections=(24, 20, 20),
)
QWEN3_VL = Kind(
    model_type="qwen3_vl",
    class_name="Qwen3VLForConditionalGeneration",
    form="Qwen3VLConfig",
    language="qwen3",
    **_THIRD,
)
QWEN3_VL_MOE = Kind(
    model_type="qwen3_vl_moe",
    class_name="Qwen3VLMoeForConditionalGeneration",
    form="Qwen3VLMoeConfig",
    language="qwen3_moe",
    **_THIRD,
)
KINDS = {kind.model_type: kind for kind in (QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE)}
