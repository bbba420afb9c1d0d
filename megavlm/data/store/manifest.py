"""The manifest of a packed dataset: what is in the folder, for which tokenizer and which tiles it
was made.

It is written last, in one step, so its presence means that the folder is complete.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from megavlm.config.tiling import UNBOUNDED, VideoPixels
from megavlm.io import atomic
from megavlm.io.storage import LocalFiles, open_folder
from megavlm.io.typed_json import build

FILE_NAME = "manifest.json"
FORMAT_NAME = "megavlm-packs"
FORMAT_VERSION = 10
# Version 2 had no levels, version 3 no limit of the size of images, version 4 no instructions for a
# Q-Former, version 5 no grids, version 6 no videos whose frames are one image in the text, version
# 7 no preferences, version 8 no tiles of the image's own size, version 9 no frames with such tiles.
READ_VERSIONS = (2, 3, 4, 5, 6, 7, 8, 9, FORMAT_VERSION)
# More than a blend has; what is parsed is in memory anyway, as long as its dataset is open.
KEPT_MANIFESTS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One annotation file that samples come from.

    Args:
        name: name of the source in the meta file, or the annotation file's name.
        annotations: path of the JSONL file; with a sample's line number it says where the sample
            comes from.
        root: folder that image paths are relative to.
        records: records read.
        samples: samples packed (repeats counted, rejected records not); of a pair, both.
        repeat_time: how often the source was asked to be taken; below 1: a share of it.
        augment: whether its images may be changed at random while training.
    """

    name: str
    annotations: str
    root: str = ""
    records: int = 0
    samples: int = 0
    repeat_time: float = 1.0
    augment: bool = False


@dataclass(frozen=True, kw_only=True)
class Level:
    """Packs whose samples are alike in difficulty.

    Args:
        packs: packs of it; they follow those of the level before.
        easiest, hardest: lowest and highest difficulty of its samples.
    """

    packs: int
    easiest: float
    hardest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file ``NAME.bin``.

    Args:
        name: file name without its ending.
        packs: packs in it.
        bin_bytes: size of the file.
    """

    name: str
    packs: int
    bin_bytes: int


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over all packs; ``supervised`` counts tokens with a loss, ``bytes`` the packs'
    blocks, ``instructions`` the tokens that a Q-Former reads.
    """

    packs: int = 0
    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    images: int = 0
    tiles: int = 0
    bytes: int = 0
    instructions: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The facts of a packed dataset.

    Args:
        tokenizer_fingerprint: hash of the tokenizer that made the tokens.
        vocab_size: ids that the tokenizer knows, special tokens included.
        context_token_id: id of the token that holds the place of one image feature.
        pad_token_id: id that fills a pack up to its capacity.
        end_token_id: id that ends a text, behind which tokens read no image by cross-attention
            until the next one; -1: none does.
        qformer_fingerprint: hash of the tokenizer that made a Q-Former's tokens; empty: the packs
            have none.
        qformer_vocab_size: ids that it knows.
        instruction_length: most tokens of an instruction; 0: there are none.
        template: name of the conversation template.
        system_message: what the template says before the conversation.
        image_size: side of a tile in pixels.
        features_per_tile: context tokens of one tile.
        min_tiles: fewest tiles of an image, thumbnail not counted.
        max_tiles: most tiles of an image, thumbnail not counted.
        thumbnail: whether an image of several tiles gets its thumbnail as one more tile.
        tiling: how images become tiles: dynamic, pad, crop, stretch, patches, native, anyres or
            anyres_max_9; frames of videos are one tile but for native, where a pair of them has the
            tiles of an image, and there are none with patches and anyres.
        image_limit: for patches: width and height in pixels that larger images are made smaller to.
        min_pixels: for native: fewest pixels of all tiles of an image.
        max_pixels: for native: most pixels of all tiles of an image.
        video: for native: bounds of the frames of videos.
        grids: for anyres and anyres_max_9: columns and rows of the grids that images may have, the
            first of equals.
        exif_rotation: whether images are turned as their EXIF says.
        pixel_mean: mean that the model subtracts from each channel, of values in [0, 1].
        pixel_std: value that the model divides each channel by.
        resample: how images are resized to tiles: bicubic or bilinear.
        capacity: tokens of a pack.
        tile_cap: most tiles of a pack.
        alignment: each sample starts at a multiple of this many tokens in its pack.
        seed: seed of the packer.
        preferences: whether samples 2 i and 2 i + 1 of each pack are two answers to one prompt, of
            which the first is preferred, and which show the same images, stored once.
        sources: annotation files; a sample names its source by its index here.
        levels: the packs' levels of difficulty, the easiest first; none where the records'
            difficulty is not known.
        rejects: number of rejected records for each reason.
        shards: the files; filled by ``pack_format.complete``.
        idx_crc32: checksum of the whole index; filled by ``pack_format.complete``.
        totals: sums over all packs; filled by ``pack_format.complete``.
    """

    tokenizer_fingerprint: str
    vocab_size: int
    context_token_id: int
    pad_token_id: int = 0
    end_token_id: int = -1
    qformer_fingerprint: str = ""
    qformer_vocab_size: int = 0
    instruction_length: int = 0
    template: str
    system_message: str = ""
    image_size: int
    features_per_tile: int
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    tiling: str = "dynamic"
    image_limit: tuple[int, int] = (1920, 1080)
    min_pixels: int = 56 * 56
    max_pixels: int = 1280 * 28 * 28
    video: VideoPixels = UNBOUNDED
    grids: tuple[tuple[int, int], ...] = ()
    exif_rotation: bool = False
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resample: str = "bicubic"
    capacity: int
    tile_cap: int
    alignment: int = 1
    seed: int = 0
    preferences: bool = False
    sources: tuple[Source, ...] = ()
    levels: tuple[Level, ...] = ()
    rejects: dict[str, int] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    idx_crc32: int = 0
    totals: Totals = field(default_factory=Totals)

    def to_json(self) -> str:
        """Return the manifest as the text of ``manifest.json``."""
        return (
            json.dumps(
                {"format": FORMAT_NAME, "version": FORMAT_VERSION, **dataclasses.asdict(self)},
                indent=2,
                ensure_ascii=False,
            )
            + "\n"
        )

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder`` in one step: a reader sees all of it or
        nothing.
        """
        atomic.write_text(folder / FILE_NAME, self.to_json())


def first_with_images(folders: Sequence[str]) -> str:
    """Return the first of several folders of packs that has images, or the first of all: questions
    are asked, and images tiled, as its manifest says. Errors are those of ``read_manifest``.
    """
    found = (folder for folder in folders if read_manifest(folder).totals.tiles)
    return folders[0] if len(folders) == 1 else next(found, folders[0])


def read_manifest(folder: Path | str) -> Manifest:
    """Read the manifest of a packed dataset. That of a local folder is parsed once, as long as the
    file stays as it is: a run asks for it several times when it starts.

    Raises:
        FileNotFoundError: there is no folder, or no manifest in it.
        ValueError: not a manifest, one of a newer format version, or one that lacks a fact.
    """
    files = open_folder(folder)
    path = f"{files.folder}/{FILE_NAME}"
    if isinstance(files, LocalFiles) and not files.folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: there is no such folder of packs; make one with tools/pack_dataset.py --out"
            f" {folder}"
        )
    # A file system that lost its power may leave the name without the bytes.
    if not files.exists(FILE_NAME) or not files.size(FILE_NAME):
        raise FileNotFoundError(
            f"{path}: missing. It is written last, so {folder} is no packed dataset or its packing"
            " did not end; run tools/pack_dataset.py"
        )
    if isinstance(files, LocalFiles):
        state = Path(path).stat()
        return _parse_local(path, state.st_mtime_ns, state.st_size, state.st_ino)
    return parse_manifest(files.read(FILE_NAME, 0, files.size(FILE_NAME)).decode(), path)


@lru_cache(maxsize=KEPT_MANIFESTS)
def _parse_local(path: str, modified: int, size: int, inode: int) -> Manifest:
    """Parse a local manifest, whose state tells it from one that is written there later."""
    return parse_manifest(Path(path).read_text(encoding="utf-8"), path)


def parse_manifest(text: str, path: Path | str) -> Manifest:
    """Parse the manifest in ``text``; errors name ``path``."""
    try:
        facts = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); pack the dataset again") from None
    if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT_NAME:
        raise ValueError(
            f"{path}: not the manifest of a packed dataset (no format {FORMAT_NAME!r})"
        )
    version = facts.pop("version", None)
    if version not in READ_VERSIONS:
        raise ValueError(
            f"{path}: format version {version}, but this megavlm reads versions"
            f" {', '.join(map(str, READ_VERSIONS))}; update megavlm, or pack the dataset again"
        )
    try:
        return build(Manifest, facts, str(path), optional=True)
    except ValueError as error:
        raise ValueError(f"{error}; pack the dataset again") from None
