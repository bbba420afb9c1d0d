"""What to pack, and how: the settings of a packing, checked before any data are touched."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavlm.config.tiling import ANY_SIZE, MOST_TILES
from megavlm.data.images.feature_layout import feature_layout
from megavlm.data.images.frame_sampling import FrameChoice
from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.difficulty import MOST_LEVELS
from megavlm.data.packing.executors import Executor
from megavlm.data.packing.media import DeepImages
from megavlm.data.packing.windows import Windows
from megavlm.data.packing.work_folder import partial_of, refuse_filled
from megavlm.data.records.filters import check_scores
from megavlm.data.records.meta_file import Annotations
from megavlm.data.records.scores import open_scores
from megavlm.data.store.manifest import FORMAT_VERSION
from megavlm.data.text.chat_tokens import DEFAULT
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import QFORMER_TOKENIZER
from megavlm.io.remote import file_state

# May differ when a stopped job resumes, because no byte of the result depends on it.
FREE_SETTINGS = ("out", "workers", "executor", "max_rejects")
# Tokens and tiles are counted with 32 bits.
MOST = 2**31 - 1
# Changes when the files of a stopped job are not readable any more.
PACKER_VERSION = 5


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to pack, and how.

    Args:
        sources: annotation files.
        tokenizer: folder of the tokenizer; special tokens that it lacks are added to the copy in
            the dataset.
        qformer_tokenizer: folder of the tokenizer of the instructions that a Q-Former reads; empty:
            that in the folder of the tokenizer, for a template that has instructions.
        instruction_length: most tokens of an instruction; 0: the template's.
        out: folder of the dataset; missing or empty.
        capacity: tokens of a pack.
        features_per_tile: context tokens of one tile.
        template: name of the conversation template.
        system_message: what a conversation without a system turn begins with; None: the template's
            own; empty: nothing.
        tiling: how images become tiles.
        pixel_std: what the model divides red, green and blue by; the mean is the tiling's.
        frames: how frames of videos are chosen.
        deep_images: what becomes of images of more than 8 bits a channel.
        windows: how long documents are cut.
        truncate: tokens that the end of a longer sample is cut off after; 0: samples that no pack
            can hold are rejected. The text of a pair keeps its last token; 0: the template's
            length.
        tile_cap: most tiles of a pack; None: chosen from the data.
        tile_multiple: what the cap is a multiple of if it is chosen.
        alignment: each sample's length is rounded up to a multiple of this inside its pack.
        levels: levels of difficulty that records are cut into; 0: one for each difficulty.
        near: folder of scores, in whose order packs are filled with similar records; empty: packs
            are filled as well as can be.
        preferences: whether each record has two answers to one prompt, of which one is preferred.
        seed: fixes which of equal samples share a pack, and the order of packs.
        workers: processes that encode; 0: this one (with Ray: as many as the cluster has cores).
        executor: where they run.
        max_rejects: largest share of the records that may be rejected.
        decode_images: whether each image is decoded when it is packed, so that none can stop a
            training run.
        scan_pixels: whether the first pass decodes each image too, for a dry run.
    """

    sources: tuple[Annotations, ...]
    tokenizer: str
    out: str
    capacity: int
    features_per_tile: int
    tiling: Tiling
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    frames: FrameChoice = field(default_factory=FrameChoice)
    deep_images: DeepImages = "clip"
    windows: Windows = field(default_factory=Windows)
    truncate: int = 0
    qformer_tokenizer: str = ""
    instruction_length: int = 0
    template: str = DEFAULT
    system_message: str | None = None
    tile_cap: int | None = None
    tile_multiple: int = 1
    alignment: int = 1
    levels: int = 0
    near: str = ""
    preferences: bool = False
    seed: int = 0
    workers: int = 0
    executor: Executor = "processes"
    max_rejects: float = 0.01
    decode_images: bool = True
    scan_pixels: bool = False

    def check(self) -> None:
        """Raise ValueError or FileExistsError, naming the flag, for settings that cannot work;
        reads no record.
        """
        least = {
            "capacity": 1,
            "alignment": 1,
            "tile_multiple": 1,
            "levels": 0,
            "truncate": 0,
            "instruction_length": 0,
            "workers": 0,
            "seed": 0,
        }
        given = {name: getattr(self, name) for name in least}
        given |= {"window_tokens": self.windows.tokens, "window_images": self.windows.images}
        for name, value in given.items():
            bound = least.get(name, 0)
            if value < bound:
                raise ValueError(f"--{name} {value}: must be at least {bound}")
            if value > MOST and name != "seed":
                raise ValueError(f"--{name} {value}: must be at most {MOST}")
        if self.levels > MOST_LEVELS:
            raise ValueError(f"--levels {self.levels}: must be at most {MOST_LEVELS}")
        self._check_template()
        if self.capacity % self.alignment:
            raise ValueError(
                f"--capacity {self.capacity}: must be a multiple of --alignment {self.alignment}"
            )
        if self.features_per_tile > self.capacity:
            raise ValueError(
                f"--tokens_per_tile {self.features_per_tile}: must be at most --capacity"
                f" {self.capacity}"
            )
        if self.windows.tokens > self.capacity:
            raise ValueError(
                f"--window_tokens {self.windows.tokens}: must be at most --capacity {self.capacity}"
            )
        if self.levels and all(source.difficulty is None for source in self.sources):
            raise ValueError(
                f"--levels {self.levels}: no source has a difficulty; give --difficulty, or"
                " difficulty in each entry of --meta"
            )
        self._check_tiles()
        self._check_near()
        self._check_preferences()
        for source in self.sources:
            check_scores(source.keep, [source.path], f"filter of {source.name}")
        if not 0 <= self.max_rejects <= 1:
            raise ValueError(f"--max_rejects {self.max_rejects}: must be a share between 0 and 1")
        if self.out:
            refuse_filled(Path(self.out))

    def _check_near(self) -> None:
        """Raise ValueError for records that have no places, or levels beside them."""
        if not self.near:
            return
        flag = f"--near {self.near}"
        if any(source.difficulty is not None for source in self.sources):
            raise ValueError(f"{flag}: excludes levels of difficulty; leave --difficulty out")
        try:
            scores = open_scores(self.near)
            if not scores.has_places:
                raise ValueError("has no places; score again with tools/score_dataset.py --places")
            scores.check([source.path for source in self.sources])
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{flag}: {error}") from None

    def _check_preferences(self) -> None:
        """Raise ValueError for what does not go with two answers to each prompt."""
        if not self.preferences:
            return
        if chat_format(self.template).is_of_pairs:
            raise ValueError(
                f"--preferences: a text of --template {self.template} is no answer; give a template"
                " of conversations"
            )
        if self.windows.cut:
            raise ValueError(
                "--preferences: a document has no two answers; leave --window_tokens and"
                " --window_images out"
            )
        if self.truncate:
            raise ValueError(
                f"--truncate {self.truncate}: an answer without its end is not the one that"
                " --preferences compares; leave it out, and raise --capacity for longer records"
            )
        if self.near:
            raise ValueError(
                f"--near {self.near}: puts pairs of image and text beside hard negatives, and"
                " --preferences has none; leave one of them out"
            )

    def _check_template(self) -> None:
        """Raise ValueError for a template that does not go with the images' tiles."""
        form = chat_format(self.template)
        flag = f"--template {self.template}"
        if form.is_of_pairs and self.tiling.mode == "dynamic" and self.tiling.max_tiles != 1:
            raise ValueError(
                f"{flag}: the image of a pair is one tile; give --tiling crop, pad or"
                " stretch, or --max_tiles 1, which stretches it too"
            )
        if self.system_message and "{}" not in form.system:
            raise ValueError(
                f"--system {self.system_message}: has no effect, since {flag} has no system turn;"
                " leave it out"
            )
        if form.is_of_pairs and self.alignment != 1:
            raise ValueError(
                f"--alignment {self.alignment}: a text of {flag} ends with its last token; use 1"
            )
        if form.is_of_pairs and self.windows.cut:
            raise ValueError(
                f"{flag}: cuts texts at {form.pair_length} tokens and keeps their last one; leave"
                " --window_tokens and --window_images out"
            )
        if form.is_of_pairs and self.truncate and not 2 <= self.truncate <= form.pair_length:
            raise ValueError(
                f"--truncate {self.truncate}: texts of {flag} are cut at 2 to {form.pair_length}"
                " tokens"
            )
        if not form.instruction_length and (self.qformer_tokenizer or self.instruction_length):
            raise ValueError(
                f"{flag}: no Q-Former reads a text of it; leave --qformer_tokenizer and"
                " --instruction_length out"
            )
        if form.instruction_length and self.qformer_tokenizer_folder is None:
            raise ValueError(
                f"{flag}: a Q-Former reads the instruction; name its tokenizer with"
                f" --qformer_tokenizer (the folder of --tokenizer {self.tokenizer} has no"
                f" {QFORMER_TOKENIZER}/)"
            )
        if form.images_before_text and self.windows.cut:
            raise ValueError(
                f"{flag}: puts images before the first tokens of a text, which each window of a"
                " document has to begin with; leave --window_tokens and --window_images out"
            )
        if form.images.newline and self.tiling.mode != "patches":
            raise ValueError(
                f"--tiling {self.tiling.mode}: {flag} has a token behind each row of patches; use"
                " --tiling patches"
            )
        if self.tiling.has_grids or self.tiling.mode in ANY_SIZE:
            self._check_layout()
        least = 0 if form.is_of_pairs else 1
        if self.features_per_tile < least or (form.is_of_pairs and self.features_per_tile):
            raise ValueError(
                f"--tokens_per_tile {self.features_per_tile}: must be"
                f" {'0: ' + flag + ' has none' if form.is_of_pairs else 'at least 1'}"
            )

    def _check_layout(self) -> None:
        """Raise ValueError for images of one placeholder token or none, or features that fill no
        square.
        """
        form = chat_format(self.template)
        if form.is_of_pairs or form.images.is_single:
            raise ValueError(
                f"--tiling {self.tiling.mode}: --template {self.template} has no placeholder token"
                " for each feature of an image; use another --tiling"
            )
        feature_layout(self.tiling.mode, self.features_per_tile)

    def _check_tiles(self) -> None:
        """Raise ValueError for a cap on tiles that cannot work."""
        if self.tile_multiple > MOST_TILES:
            raise ValueError(f"--tile_multiple {self.tile_multiple}: must be at most {MOST_TILES}")
        if self.tile_cap is not None and self.tile_cap < 0:
            raise ValueError(f"--tile_cap {self.tile_cap}: must be at least 0, or auto")
        if self.tile_cap is not None and self.tile_multiple > 1:
            raise ValueError(
                f"--tile_multiple {self.tile_multiple}: goes with --tile_cap auto; --tile_cap"
                f" {self.tile_cap} is taken as it is"
            )

    @property
    def qformer_tokenizer_folder(self) -> str | None:
        """Return the folder of the tokenizer of instructions; none if the template has none, or if
        there is no such folder.
        """
        if not chat_format(self.template).instruction_length:
            return None
        inside = Path(self.tokenizer) / QFORMER_TOKENIZER
        return self.qformer_tokenizer or (str(inside) if inside.is_dir() else None)

    @property
    def most_of_instruction(self) -> int:
        """Return the most tokens of an instruction; 0: there are none."""
        return self.instruction_length or chat_format(self.template).instruction_length

    @property
    def partial(self) -> Path:
        """Return the folder that becomes ``out`` when it is complete."""
        return partial_of(Path(self.out))

    @property
    def rejects_path(self) -> Path:
        """Return where the list of rejected records goes if they are too many."""
        out = Path(self.out)
        return out.with_name(out.name + ".rejects.jsonl")

    def identity(self, tokenizer_fingerprint: str, qformer_fingerprint: str = "") -> dict[str, Any]:
        """Return what the result depends on, as JSON: settings, the state of the annotation files,
        the tokenizer and the format.
        """
        settings = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in (*FREE_SETTINGS, "sources", "tokenizer", "qformer_tokenizer")
        }
        if self.near:  # wherever it is
            settings["near"] = open_scores(self.near).fingerprint
        sources = []
        for source in self.sources:
            found = file_state(source.path)
            facts = dataclasses.asdict(source)
            del facts["length"]  # checked, but of no consequence
            if source.keep.scores is not None:  # wherever they are
                facts["keep"]["scores"] = open_scores(source.keep.scores).fingerprint
            sources.append({**facts, "bytes": found.size, "modified": found.version})
        return {
            **settings,
            "sources": sources,
            "tokenizer": tokenizer_fingerprint,
            "qformer_tokenizer": qformer_fingerprint,
            "format": FORMAT_VERSION,
            "packer": PACKER_VERSION,
        }
