"""Cross checks of a vision encoder whose patches see all tiles of an image, and of tokens that know
frames, rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.checks.limits import at_least
from megavlm.config.differences import changed
from megavlm.config.schema import Architecture, Config, Vision
from megavlm.config.vision import SPANNING_FAMILIES

_FLAG = "--architecture.vision"
_SECTIONS = "--architecture.language.rotary_sections"
_CONNECTOR = "merger"
_TILING = "native"
# Frame, row and column.
_AXES = 3


def model_problems(arch: Architecture) -> Iterator[str]:
    """Yield what such a model cannot be made of."""
    if arch.vision.exists:
        yield from (_spanning(arch) if arch.vision.spans_tiles else _others(arch))
    if arch.language.rotary_sections and arch.language.exists:
        yield from _sections(arch)
    elif arch.language.rotary_interleaved:
        yield (
            f"--architecture.language.rotary_interleaved true has no effect without {_SECTIONS},"
            " such as 24,20,20; use false"
        )


def _spanning(arch: Architecture) -> Iterator[str]:
    """Yield what does not go with patches that see all tiles of an image."""
    vision = arch.vision
    family = f"{_FLAG}.family {vision.family}"
    yield from at_least(0, "architecture.vision", vision, "tokens_per_second")
    if vision.temporal_patch_size != 2:
        yield (
            f"{_FLAG}.temporal_patch_size {vision.temporal_patch_size}: {vision.family} reads"
            " the frames of videos in pairs; use 2"
        )
    if arch.connector.kind != _CONNECTOR:
        yield (
            f"--architecture.connector.kind {arch.connector.kind}: a vision encoder of {family}"
            f" gives the patches of whole images, which only {_CONNECTOR} reads; use it"
        )
    yield from _deepstack(arch)
    if arch.cross_attention.every:
        yield (
            f"--architecture.cross_attention.every {arch.cross_attention.every}: a vision encoder"
            f" of {family} gives features to the tokens of the text; use 0"
        )
    if vision.unused_layers:
        yield (
            f"{_FLAG}.unused_layers {vision.unused_layers}: features of {family} come from its last"
            " layer; use 0"
        )
    if vision.qk_norm:
        yield f"{_FLAG}.qk_norm true: {family} has no norms of queries and keys; use false"
    if not vision.hidden_size % vision.num_attention_heads and vision.head_size % 4:
        yield (
            f"{_FLAG}.num_attention_heads {vision.num_attention_heads}: {vision.head_size} a head"
            f" of {_FLAG}.hidden_size {vision.hidden_size}, and rotations by row and by column need"
            " a multiple of 4"
        )
    usual = ("RMSNorm", True) if vision.family == "qwen2_5_vl" else ("LayerNorm", False)
    if vision.normalization != usual[0]:
        yield f"{_FLAG}.normalization {vision.normalization}: {family} has {usual[0]}; use it"
    if vision.is_gated != usual[1]:
        wanted = "swiglu" if usual[1] else "quick_gelu, gelu or gelu_tanh"
        yield f"{_FLAG}.activation {vision.activation}: {family} needs {wanted}"
    yield from _windows(vision)


def _deepstack(arch: Architecture) -> Iterator[str]:
    """Yield what learned positions and features of several layers do not go with."""
    vision = arch.vision
    family = f"{_FLAG}.family {vision.family}"
    is_third = vision.family == "qwen3_vl"
    if is_third != (vision.position_side > 0):
        wanted = "needs a number above 0, such as 48" if is_third else "has no table; use 0"
        yield f"{_FLAG}.position_side {vision.position_side}: {family} {wanted}"
    layers = ",".join(map(str, vision.deepstack_layers))
    flag = f"{_FLAG}.deepstack_layers {layers}"
    if layers and not is_third:
        yield f"{flag}: {family} has features of its last layer alone; leave it out"
    elif list(vision.deepstack_layers) != sorted(set(vision.deepstack_layers)):
        yield f"{flag}: name each layer once, in their order"
    for layer in vision.deepstack_layers:
        if not 0 <= layer < vision.num_layers:
            yield (
                f"{flag}: there is no layer {layer}; the {vision.num_layers} of"
                f" {_FLAG}.num_layers are counted from 0"
            )
    if len(vision.deepstack_layers) > arch.language.num_layers > 0:
        yield (
            f"{flag}: {len(vision.deepstack_layers)} levels are added behind as many layers of the"
            f" language model, and --architecture.language.num_layers is {arch.language.num_layers}"
        )


def _windows(vision: Vision) -> Iterator[str]:
    """Yield what windows cannot be."""
    flag = f"{_FLAG}.window_size {vision.window_size}"
    yield from at_least(0, "architecture.vision", vision, "window_size")
    if vision.window_size and vision.family != "qwen2_5_vl":
        yield f"{flag}: {_FLAG}.family {vision.family} has no windows, as qwen2_5_vl has; use 0"
    elif vision.window_size % vision.image_size:
        yield (
            f"{flag}: must be a multiple of {_FLAG}.image_size {vision.image_size}, the side of a"
            " tile"
        )
    layers = ",".join(map(str, vision.full_attention_layers))
    if layers and not vision.window_size:
        yield (
            f"{_FLAG}.full_attention_layers {layers} has no effect without {_FLAG}.window_size,"
            " such as 112: all layers see whole images; leave it out"
        )
    for layer in vision.full_attention_layers:
        if not 0 <= layer < vision.num_layers:
            yield (
                f"{_FLAG}.full_attention_layers {layers}: there is no layer {layer}; the"
                f" {vision.num_layers} of {_FLAG}.num_layers are counted from 0"
            )


def _others(arch: Architecture) -> Iterator[str]:
    """Yield what only vision encoders have whose patches see all tiles of an image."""
    vision = arch.vision
    spanning = " and ".join(SPANNING_FAMILIES)
    names = (
        "temporal_patch_size",
        "tokens_per_second",
        "window_size",
        "full_attention_layers",
        "position_side",
        "deepstack_layers",
    )
    for name, value in changed(vision, *names).items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        yield (
            f"{_FLAG}.{name} {shown}: a vision encoder of {_FLAG}.family {vision.family} reads"
            f" single tiles, and only {spanning} have it; leave it out"
        )
    if arch.connector.kind == _CONNECTOR:
        yield (
            f"--architecture.connector.kind {_CONNECTOR}: reads the patches of whole images, and"
            f" {_FLAG}.family {vision.family} gives those of single tiles; use mlp, or one of"
            f" {spanning}"
        )
    if vision.is_gated:
        yield (
            f"{_FLAG}.activation {vision.activation}: only {_FLAG}.family qwen2_5_vl has a gate;"
            " use gelu, gelu_tanh or quick_gelu"
        )


def _sections(arch: Architecture) -> Iterator[str]:
    """Yield what does not go with rotations by frame, row and column."""
    language = arch.language
    flag = f"{_SECTIONS} {','.join(map(str, language.rotary_sections))}"
    rotations = language.head_size // 2
    if len(language.rotary_sections) != _AXES or min(language.rotary_sections) < 1:
        yield f"{flag}: needs three numbers above 0, of frame, row and column"
    elif sum(language.rotary_sections) != rotations:
        yield (
            f"{flag}: together {sum(language.rotary_sections)}, and must be {rotations}, half of"
            f" the {language.head_size} of a head"
        )
    elif language.rotary_interleaved and 3 * max(language.rotary_sections[1:]) > rotations:
        yield (
            f"{flag}: rows and columns take turns with frames, so they can have {rotations // 3} of"
            f" {rotations} at most; give frames more, or use"
            " --architecture.language.rotary_interleaved false"
        )
    if not arch.vision.spans_tiles:
        yield (
            f"{flag}: places in an image are known of tiles of packs of --tiling {_TILING}, which"
            f" {_FLAG}.family {' and '.join(SPANNING_FAMILIES)} read; leave it out"
        )
    names = ("rotary_percent", "rotary_dynamic_factor", "rotary_yarn_factor")
    for name, value in changed(language, *names).items():
        yield f"--architecture.language.{name} {value}: {_SECTIONS} rotates otherwise; use 1"


def run_problems(config: Config) -> Iterator[str]:
    """Yield settings of a run that such a vision encoder cannot follow."""
    arch = config.architecture
    if not arch.vision.spans_tiles:
        return
    family = f"{_FLAG}.family {arch.vision.family}"
    for name in ("drop_path", "end_drop_path"):
        if rate := vars(config.training)[name]:
            yield (
                f"--training.{name} {rate}: the tiles of an image share the branches of {family},"
                " and drop path leaves them out tile by tile; use 0"
            )


def layout_problems(config: Config) -> Iterator[str]:
    """Yield layouts that such a vision encoder cannot have."""
    arch = config.architecture
    vision = arch.vision
    if not (vision.spans_tiles and config.parallel.vision == "data"):
        return
    family = f"{_FLAG}.family {vision.family}"
    if arch.lora.dropout and arch.lora.adapts(_FIRST_LINEAR):
        yield (
            f"--architecture.lora.dropout {arch.lora.dropout}: with --parallel.vision"
            f" data the adapters of {family} do not know which image a patch is"
            " of; use --parallel.vision tensor, or 0"
        )


def packs_problems(arch: Architecture, tiling: str, where: str) -> Iterator[str]:
    """Yield that images of packs are not cut as the vision encoder reads them.

    Args:
        arch: the model.
        tiling: of packs that have images.
        where: flag and folder of the packs, for the message.
    """
    spans = arch.vision.spans_tiles
    if spans == (tiling == _TILING):
        return
    family = f"{_FLAG}.family {arch.vision.family}"
    if spans:
        yield (
            f"{where}: packed with --tiling {tiling or 'dynamic'}, and a vision encoder of {family}"
            f" reads images of any size; pack with --tiling {_TILING}"
        )
    else:
        yield (
            f"{where}: packed with --tiling {_TILING}, whose tiles are parts of one image to a"
            f" vision encoder of {' or '.join(SPANNING_FAMILIES)}, and {family} reads each by"
            " itself; pack with another --tiling"
        )


_FIRST_LINEAR = "vision.encoder.layers.0.self_attention.linear_qkv.weight"
