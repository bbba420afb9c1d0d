"""A picture of packs: their tiles, their text with the supervised part marked, and the supervised
mask as a bar.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megavlm.config.tiling import ANY_SIZE
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.tiles import TileDecoder
from megavlm.data.store.reader import Pack
from megavlm.data.text.tokenizer import load_tokenizer

WIDTH_INCHES = 14.0
TILES_SHOWN = 10
LINES_SHOWN = 24
LINE_CHARACTERS = 140
# Width of a character of a monospaced font, in units of its size.
CHARACTER_WIDTH = 0.602
LINE_HEIGHT_INCHES = 0.17
CHINESE_FONTS = (
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei Mono",
    "WenQuanYi Zen Hei Mono",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "SimHei",
    "Microsoft YaHei",
    "PingFang SC",
    "Arial Unicode MS",
)
SUPERVISED_COLOUR = "#0a7d33"
OTHER_COLOUR = "#777777"
SAMPLE_COLOUR = "#b03060"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Characters of one line that share a colour: where they start, what they say."""

    line: int
    column: int
    text: str
    colour: str


def draw(dataset: PackedDataset, pack_ids: Sequence[int], path: Path) -> None:
    """Draw packs into an image file.

    Raises:
        FileNotFoundError: the dataset has no tokenizer to read its tokens with.
    """
    from matplotlib.figure import Figure

    folder = dataset.folder / "tokenizer"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: missing; without the dataset's tokenizer its tokens cannot be shown as text"
        )
    tokenizer = load_tokenizer(folder)
    packs = [dataset.reader.read(pack_id) for pack_id in pack_ids]
    pages = [list(lay_out(spans(dataset, pack, tokenizer.decode))) for pack in packs]
    text_heights = [LINE_HEIGHT_INCHES * (page[-1].line + 2) for page in pages]
    heights = [height for text in text_heights for height in (1.45, 0.45, text)]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.4 * len(packs)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for index, (pack, page) in enumerate(zip(packs, pages, strict=True)):
        _draw_tiles(figure.add_subplot(grid[3 * index]), dataset, pack)
        _draw_mask(figure.add_subplot(grid[3 * index + 1]), dataset, pack)
        _draw_text(figure.add_subplot(grid[3 * index + 2]), page)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=110)
    # matplotlib tells of each letter that no font has, and draws a box for it; one line will do.
    boxes = [one for one in told if "missing from" in str(one.message)]
    for one in told:
        if one not in boxes:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if boxes:
        print(
            f"note: {path} shows a box for {len(boxes)} letters that no installed font has; install"
            f" one such as {CHINESE_FONTS[1]} (package fonts-noto-cjk) for Chinese text",
            file=sys.stderr,
        )


def spans(
    dataset: PackedDataset, pack: Pack, decode: Callable[[list[int]], str]
) -> Iterator[tuple[str, str]]:
    """Yield the pack's text in pieces, each with its colour; a run of placeholder tokens is shown
    as its length.
    """
    context = dataset.manifest.context_token_id
    start = 0
    for sample, length in enumerate(pack.lengths):
        name = f"sample {sample}"
        if dataset.manifest.preferences:
            name = f"pair {sample // 2}, {('chosen', 'rejected')[sample % 2]}"
        yield (
            f"\n[{name}: {dataset.reader.origin(pack, sample)}, {length} tokens]\n",
            SAMPLE_COLOUR,
        )
        tokens = pack.tokens[start : start + length]
        supervised = pack.supervised[start : start + length]
        kinds = np.where(tokens == context, 2, supervised)
        edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1), int(length)]
        for low, high in itertools.pairwise(edges):
            if kinds[low] >= 2:
                text = f"{decode([context])} x {high - low}"
            else:
                text = decode(tokens[low:high].tolist())
            yield text, SUPERVISED_COLOUR if supervised[low] else OTHER_COLOUR
        start += int(length)


def lay_out(pieces: Iterator[tuple[str, str]]) -> Iterator[Run]:
    """Text in lines of a fixed number of characters; what does not fit the picture is left out."""
    line = 0
    column = 0
    for text, colour in pieces:
        for number, paragraph in enumerate(text.split("\n")):
            # A paragraph's end ends the line, unless nothing stands on it yet.
            if number and column:
                line = line + 1
                column = 0
            while paragraph:
                if line >= LINES_SHOWN:
                    yield Run(line=line, column=0, text="...", colour=OTHER_COLOUR)
                    return
                part = paragraph[: LINE_CHARACTERS - column]
                paragraph = paragraph[LINE_CHARACTERS - column :]
                yield Run(line=line, column=column, text=part, colour=colour)
                column += len(part)
                if column >= LINE_CHARACTERS:
                    line = line + 1
                    column = 0


def pictures(dataset: PackedDataset, pack: Pack) -> list[np.ndarray]:
    """Return the first tiles of a pack, or the first images, where a tile shows but a few patches;
    each uint8 [height, width, 3].
    """
    decoder = TileDecoder(dataset.manifest, (), dataset.folder, dataset.reader.origin)
    shown = np.arange(min(TILES_SHOWN, pack.tiles))
    if dataset.manifest.tiling not in ANY_SIZE:
        return list(decoder.decode(pack, shown, 0, 0).transpose(0, 2, 3, 1))
    images = pack.images[:TILES_SHOWN]
    found = []
    for image, end in zip(images, np.cumsum(images["tiles"]), strict=True):
        columns, rows = (int(image[name]) for name in ("columns", "rows"))
        numbers = np.arange(end - columns * rows, end)
        tiles = decoder.decode(pack, numbers, 0, 0, second_frames=image["tiles"] == 0)
        grid = tiles.reshape(rows, columns, *tiles.shape[1:])
        side = tiles.shape[-1]
        whole = grid.transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
        found.append(whole)
    return found


def _draw_tiles(axes, dataset: PackedDataset, pack: Pack) -> None:
    """Draw the first tiles or images, side by side."""
    found = pictures(dataset, pack)
    has_whole = dataset.manifest.tiling in ANY_SIZE
    rest = (len(pack.images) if has_whole else pack.tiles) - len(found)
    counts = f"{len(pack.images)} images, {pack.tiles} tiles"
    kind = "images" if has_whole else "tiles"
    title = f"pack {pack.pack_id}: {counts}" + (f" ({rest} {kind} not shown)" if rest else "")
    axes.set_title(title, loc="left")
    axes.axis("off")
    for index, picture in enumerate(found):
        height, width = np.array(picture.shape[:2]) / max(picture.shape[:2])
        left = index * 1.05
        axes.imshow(picture, extent=(left, left + width, 1 - height, 1), interpolation="nearest")
    axes.set(xlim=(0, TILES_SHOWN * 1.05), ylim=(0, 1), aspect="equal", anchor="W")


def _draw_mask(axes, dataset: PackedDataset, pack: Pack) -> None:
    """Draw the pack from its first to its last token: placeholder tokens, supervised tokens and the
    starts of samples.
    """
    capacity = dataset.manifest.capacity
    bar = np.ones((1, capacity, 3))
    for chosen, colour in (
        (slice(None), 0x77),
        (pack.tokens == dataset.manifest.context_token_id, 0xCC),
    ):
        bar[0, : len(pack.tokens)][chosen] = colour / 255
    bar[0, : len(pack.tokens)][pack.supervised] = [
        int(SUPERVISED_COLOUR[index : index + 2], 16) / 255 for index in (1, 3, 5)
    ]
    axes.imshow(bar, aspect="auto", extent=(0, capacity, 0, 1), interpolation="nearest")
    for end in np.cumsum(pack.lengths):
        axes.axvline(end, color=SAMPLE_COLOUR, linewidth=1)
    axes.set(
        yticks=[],
        xlabel=(
            "tokens: dark grey text, light grey image, green supervised, red line a sample's end,"
            " white free"
        ),
    )


def _chinese_fonts() -> list[str]:
    """Return the installed fonts that have Chinese letters, the best choice first: matplotlib takes
    a letter from the first font of a list that has it.
    """
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return [name for name in CHINESE_FONTS if name in installed]


def _draw_text(axes, page: Sequence[Run]) -> None:
    """Draw the pack's text; green is supervised."""
    size = WIDTH_INCHES * 0.95 * 72 / LINE_CHARACTERS / CHARACTER_WIDTH
    axes.axis("off")
    axes.set(xlim=(0, LINE_CHARACTERS), ylim=(page[-1].line + 1.5, -0.5))
    families = ["monospace", *_chinese_fonts()]
    for run in page:
        # A dollar sign would start a formula, and control characters have no shape.
        text = "".join(letter if letter.isprintable() else "·" for letter in run.text).replace(
            "$", r"\$"
        )
        axes.text(
            run.column,
            run.line,
            text,
            color=run.colour,
            family=families,
            fontsize=size,
            va="center",
            clip_on=True,
        )
