"""Videos of known pictures, and packs of them made by the packer's command line with the recipes of
Qwen's models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.text.tokenizer import add_special_tokens, load_tokenizer
from tests.convert.tool import run_tool

GOLDEN = Path(__file__).parents[1] / "golden"
BOUNDS = {"least": 2352, "most": 15680, "total": 36000}
PIXELS = ["--min_pixels", "1568", "--max_pixels", "31360"]
for _name, _flag in (("least", "min"), ("most", "max"), ("total", "total")):
    PIXELS += [f"--video_{_flag}_pixels", str(BOUNDS[_name])]


@dataclass(frozen=True, kw_only=True)
class Film:
    """A video, and what is to be taken of it at two frames a second and at least four.

    Args:
        name: of its file.
        size: width and height of its frames as they are shown, in pixels.
        frames: how many it has; those of files are a tenth of a second apart, of folders a second.
        chosen: the frames that are taken.
    """

    name: str
    size: tuple[int, int]
    frames: int
    chosen: list[int]

    @property
    def pictures(self) -> list[Image.Image]:
        """Its frames, as they are shown."""
        width, height = self.size
        across, down = np.meshgrid(np.linspace(0, 90, width), np.linspace(0, 60, height))
        return [
            Image.fromarray(np.stack([across, down, across[::-1]], -1).astype(np.uint8) + place)
            for place in np.linspace(0, 160, self.frames).astype(np.uint8)
        ]

    @property
    def times(self) -> list[float]:
        """The times of the chosen frames, in seconds."""
        return [number / (10 if "." in self.name else 1) for number in self.chosen]


FILMS = [
    Film(name="short.mp4", size=(94, 62), frames=13, chosen=[1, 4, 7, 10]),
    Film(name="long.mp4", size=(32, 36), frames=103, chosen=[*range(2, 98, 5)]),
    Film(name="large.mp4", size=(120, 84), frames=63, chosen=[*range(2, 58, 5)]),  # for the total
    Film(name="one.mp4", size=(130, 70), frames=1, chosen=[0]),
    Film(name="three.mp4", size=(64, 200), frames=3, chosen=[0, 1]),
    Film(name="phone.mp4", size=(48, 90), frames=25, chosen=[2, 7, 12, 17]),
    Film(name="a.gif", size=(51, 77), frames=7, chosen=[0, 1, 3, 5]),
    Film(name="folder", size=(160, 31), frames=6, chosen=[0, 1, 2, 3, 4, 5]),
]
BY_NAME = {film.name: film for film in FILMS}


def write_film(folder: Path, film: Film) -> None:
    path = folder / film.name
    pictures = film.pictures
    if path.suffix == ".gif":
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    elif not path.suffix:
        path.mkdir()
        for number, picture in enumerate(pictures):
            picture.save(path / f"{number}.png")
    else:
        turn = 90 if film.name == "phone.mp4" else 0
        stored = [picture.rotate(-turn, expand=True) for picture in pictures]
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
            stream.width, stream.height = stored[0].size
            stream.pix_fmt = "yuv444p"
            stream.gop_size = 6
            stream.set_display_rotation(turn)
            for picture in stored:
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())


def chat(question: str, answer: str = "it moves", **media) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**media, "conversations": turns}


def write_films(folder: Path) -> Path:
    """Write all films, an image and a tokenizer."""
    words = load_tokenizer(GOLDEN / "tokenizer")
    add_special_tokens(words, "qwen2_vl")
    words.save_pretrained(folder / "words")
    for film in FILMS:
        write_film(folder, film)
    Image.new("RGB", (70, 40), (9, 99, 199)).save(folder / "still.png")
    return folder


def pack(films: Path, out: Path, records: list[dict], *options: str, recipe: str = "qwen2_5_vl"):
    """Pack records by the command line of the tool, which has to work."""
    path = out.with_suffix(".jsonl")
    if not path.exists():  # a packing that was stopped goes on with the same file
        path.write_text("\n".join(map(json.dumps, records)))
    files = ["--jsonl", str(path), "--root", str(films), "--tokenizer", str(films / "words")]
    form = ["--recipe", recipe, "--stage", "sft" if "2" in recipe else "3", "--capacity", "640"]
    form += ["--alignment", "4", "--workers", "0", "--system", "none", "--max_rejects", "1"]
    assert run_tool(*files, *form, *PIXELS, *options, "--out", str(out), tool="pack_dataset") == 0
    return PackedDataset(out)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A sample of a pack: its line, its text, and its images with their content."""

    line: int
    text: str
    images: list[tuple[np.void, bytes]]


def samples_of(packs: PackedDataset) -> Iterator[Packed]:
    words = load_tokenizer(packs.folder / "tokenizer")
    for number in range(len(packs)):
        stored = packs.reader.read(number)
        ends = np.cumsum(stored.lengths)
        for sample, end in enumerate(ends):
            tokens = stored.tokens[end - stored.lengths[sample] : end]
            own = np.flatnonzero(stored.images["sample"] == sample)
            yield Packed(
                line=int(stored.provenance["line"][sample]),
                text=words.decode(tokens.tolist()),
                images=[(stored.images[index], stored.image(index)) for index in own],
            )
