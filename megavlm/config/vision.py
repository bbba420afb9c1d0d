"""The vision encoder: its sizes, and which of its variants it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Mean and standard deviation of red, green and blue, by what the vision encoder was pretrained
# with.
PIXELS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
# How images are resized to tiles, and Pillow's numbers of that, by which image processors name it.
Resample = Literal["bicubic", "bilinear"]
RESAMPLES: dict[Resample, int] = {"bilinear": 2, "bicubic": 3}
# Families that read images of any size as they are, cut into tiles of a few patches.
SPANNING_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True, kw_only=True)
class Vision:
    """The vision encoder: an InternViT, the vision part of a CLIP (arXiv 2103.00020) or SigLIP
    (arXiv 2303.15343), EVA's ViT-g (arXiv 2211.07636), BLIP-2's, or that of Qwen2-VL (arXiv
    2409.12191), Qwen2.5-VL (arXiv 2502.13923) or Qwen3-VL (arXiv 2511.21631), which see all tiles
    of an image at once.

    Args:
        family: weight naming and architecture variant (class token, patch bias, norm before the
            first layer, layer scale).
        image_size: side of a tile (InternVL's 448 x 448 image patch) in pixels.
        patch_size: side of a patch in pixels.
        num_layers: transformer layers that are built; features come out of the last of them. 0:
            there is no vision encoder, and the connector reads the pixels of patches, as in Fuyu.
        unused_layers: layers of the pretrained encoder behind these. They are not built: LLaVA
            takes CLIP's features from before its last layer (``vision_feature_layer`` -2), so 1.
            Checkpoints and exports carry them, unchanged, from where the encoder came from.
        unused_head: whether files of the pretrained encoder hold a head that makes one embedding of
            a tile (SigLIP's attention pool), which no feature needs. It is carried likewise.
        final_norm: whether a LayerNorm follows the last layer, as in SigLIP: PaliGemma takes its
            features from behind it.
        hidden_size: width of the encoder.
        ffn_hidden_size: width inside the MLP of a layer.
        num_attention_heads: attention heads.
        normalization: kind of norm before attention and before the MLP.
        layernorm_epsilon: added to the variance inside the norms.
        qkv_bias: whether the query, key and value projections have a bias.
        qk_norm: whether queries and keys are normalised, each over all heads at once
            (InternViT-6B).
        activation: of the MLP: GELU, its approximation with tanh, x * sigmoid(1.702 x), or a gate
            (swiglu).
        layer_scale: initial value of the layer scales on both residual branches; InternViT only.
        pixel_mean: mean of red, green and blue (of pixels from 0 to 1) that is subtracted: three
            numbers, or imagenet, clip or siglip.
        pixel_std: standard deviation of red, green and blue that is divided by; likewise.
        resample: how images are resized to tiles, as the encoder was pretrained: bicubic, or
            bilinear as for SigLIP 2. The patches of Fuyu's images are always bilinear.
        temporal_patch_size: frames of a video that a patch embedding reads at once; an image is
            shown to it so many times.
        tokens_per_second: how far apart the positions of frames of a video are that are a second
            apart, for a language model that rotates by frame, row and column; 0: each pair of
            frames is 1 behind the one before.
        window_size: side in pixels of the squares of an image inside which patches see each other,
            in the layers that ``full_attention_layers`` does not name; 0: they see the whole image.
        full_attention_layers: layers, counted from 0, in which patches see the whole image; with
            window_size.
        position_side: patches along a side of the table of learned positions, which is resized to
            every image (Qwen3-VL); 0: there is none, or it is as large as a tile.
        deepstack_layers: layers, counted from 0, whose outputs become features too, which are added
            to the placeholder tokens behind the first layers of the language model, one behind each
            (DeepStack, arXiv 2406.04334).
        patch_drop: share of a tile's patches that the layers do not see in training, other ones
            each time (FLIP, arXiv 2212.00794); none are left out in evaluation. The class token
            stays. For models that make one embedding of a tile.
    """

    family: Literal["internvit", "clip", "siglip", "eva", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"] = (
        "internvit"
    )
    image_size: int = 448
    patch_size: int = 14
    num_layers: int = 24
    unused_layers: int = 0
    unused_head: bool = False
    final_norm: bool = False
    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    num_attention_heads: int = 16
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    layernorm_epsilon: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu"
    layer_scale: float = 0.1
    pixel_mean: tuple[float, float, float] = PIXELS["imagenet"][0]
    pixel_std: tuple[float, float, float] = PIXELS["imagenet"][1]
    resample: Resample = "bicubic"
    temporal_patch_size: int = 1
    tokens_per_second: int = 0
    window_size: int = 0
    full_attention_layers: tuple[int, ...] = ()
    position_side: int = 0
    deepstack_layers: tuple[int, ...] = ()
    patch_drop: float = 0.0

    @property
    def exists(self) -> bool:
        """Whether there is a vision encoder."""
        return self.num_layers > 0

    @property
    def output_size(self) -> int:
        """Width of what the connector reads: hidden states, or the pixels of a patch."""
        return self.hidden_size if self.exists else 3 * self.patch_size**2

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.hidden_size // max(self.num_attention_heads, 1)

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // max(self.patch_size, 1)

    @property
    def fills_tile(self) -> bool:
        """Whether patches cover a tile. The largest SigLIPs leave some pixels out: 384 pixels make
        27 patches of 14.
        """
        return self.family == "siglip" or not self.image_size % self.patch_size

    @property
    def spans_tiles(self) -> bool:
        """Whether there is a vision encoder in which the patches of all tiles of an image see each
        other, and know their rows and columns by rotation (RoPE of two dimensions); else a tile is
        an image of its own.
        """
        return self.exists and self.family in SPANNING_FAMILIES

    @property
    def window_tiles(self) -> int:
        """Tiles along a side of a window; 0: there are none."""
        return self.window_size // max(self.image_size, 1)

    def has_window(self, layer: int) -> bool:
        """Whether patches see their window alone in a layer, counted from 0."""
        return self.window_size > 0 and layer not in self.full_attention_layers

    def outputs_before(self, layer: int) -> int:
        """Return how many layers before a layer, counted from 0, have outputs for DeepStack."""
        return sum(tapped < layer for tapped in self.deepstack_layers)

    def levels_from(self, layer: int) -> int:
        """Return how many levels of DeepStack are added behind layers of the language model, from a
        layer on, counted from 0.
        """
        return max(0, len(self.deepstack_layers) - layer)

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.activation == "swiglu"

    @property
    def has_class_token(self) -> bool:
        """Whether a class token comes before the patches."""
        return self.exists and self.family != "siglip" and not self.spans_tiles

    @property
    def has_learned_positions(self) -> bool:
        """Whether positions are a table that is added to the patches."""
        return not self.spans_tiles or self.position_side > 0

    @property
    def position_grid(self) -> int:
        """Patches along a side of the table of learned positions."""
        return self.position_side or self.grid

    @property
    def position_rows(self) -> int:
        """Rows of the table of learned positions."""
        return self.position_grid**2 + self.has_class_token

    @property
    def has_patch_bias(self) -> bool:
        """Whether the patch embedding has a bias."""
        return self.family not in ("clip", "qwen2_vl", "qwen2_5_vl")

    @property
    def has_embedding_norm(self) -> bool:
        """Whether there is a norm between the embedding and the first layer."""
        return self.family == "clip"

    @property
    def has_layer_scale(self) -> bool:
        """Whether the residual branches have learned factors."""
        return self.family == "internvit"

    @property
    def tokens(self) -> int:
        """Tokens of a tile inside the encoder: its patches and the class token, if there is one."""
        return self.grid**2 + self.has_class_token

    @property
    def kept_patches(self) -> int:
        """Patches of a tile that the layers see in training, one at least."""
        drop = self.patch_drop if 0 <= self.patch_drop < 1 else 0.0  # others are refused
        return max(1, int(self.grid**2 * (1 - drop)))

    @property
    def patch_choice(self) -> tuple[int, int] | None:
        """Patches of a tile, and those of them that are kept in training; none: all are."""
        return (self.grid**2, self.kept_patches) if self.patch_drop else None

    @property
    def layer_tokens(self) -> int:
        """Tokens of a tile that the layers see in training."""
        return self.kept_patches + self.has_class_token
