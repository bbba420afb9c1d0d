"""Records of two answers to one prompt, with images and videos, and packings of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megavlm.data.images.tiling import Tiling
from megavlm.data.packing.encode import Encoder
from megavlm.data.packing.job import Job
from megavlm.data.packing.media import Images
from megavlm.data.records.meta_file import Annotations, single_source
from megavlm.data.records.raw_record import RawRecord
from megavlm.data.records.readers import open_reader
from megavlm.data.sample import Sample
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.tokenizer import load_tokenizer
from tests.data.images.test_video import write_folder

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer"
TILING = Tiling(tile_size=16, max_tiles=4)
FEATURES = 4
CONTEXT = 5
WORDS = ["what", "number", "reads", "the", "sign", "five", "and", "the", "answer", "is"]
BOTH = {"chosen": "the sign reads five", "rejected": "five"}


def _text(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def _record(rng: random.Random, place: int, names: list[str]) -> dict:
    """Write a record in one of the forms, with up to two images, or a video."""
    images = place % 3
    ask = "<image>\n" * images + _text(rng, 12)
    chosen = f"{_text(rng, 25)} one"
    rejected = f"{_text(rng, 25)} two"
    fields = {"image": rng.sample(names, images), "hard": place % 2}
    if place % 10 == 9:
        ask = _text(rng, 5)
        fields = {"video": "film", "hard": place % 2}
    before = [{"role": "user", "content": _text(rng, 9)}, {"role": "assistant", "content": "one"}]
    turns = [*(before if place % 4 == 0 else ()), {"role": "user", "content": ask}]
    good = {"role": "assistant", "content": chosen}
    bad = {"role": "assistant", "content": rejected}
    forms = (
        {"question": ask, "chosen": chosen, "rejected": rejected},
        {"messages": turns, "chosen": good, "rejected": bad},
        {"prompt": turns, "chosen": [good], "rejected": [bad]},
        {"chosen": [*turns, good], "rejected": [*turns, bad]},
        {"messages": [*turns, good], "rejected_response": rejected},
    )
    return {**fields, **forms[place % len(forms)]}


def write_records(folder: Path) -> Path:
    """Fill a folder with images, a video and ``pairs.jsonl`` of 300 records, and
    ``bad.jsonl`` of 10, four of which are no preferences."""
    rng = random.Random(0)
    for place in range(12):
        shape = (rng.randint(10, 90), rng.randint(10, 90), 3)
        pixels = np.random.default_rng(place).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    names = sorted(path.name for path in folder.glob("*.png"))
    write_folder(folder / "film", 10)
    lines = [json.dumps(_record(rng, place, names)) for place in range(300)]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    one = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    bad = [one, {"question": "q", "chosen": "a", "rejected": "a"}, {"text": "a document"}]
    bad.append({"question": "what " * 600, **BOTH})
    (folder / "bad.jsonl").write_text("\n".join(map(json.dumps, bad)) + "\n" + "\n".join(lines[:6]))
    return folder


def job_of(data: Path, out: Path, name: str = "pairs", **settings) -> Job:
    facts = {
        "sources": single_source(data / f"{name}.jsonl", data),
        "tokenizer": str(TOKENIZER),
        "capacity": 1024,
        "features_per_tile": FEATURES,
        "tiling": TILING,
        "preferences": True,
    }
    return Job(**{**facts, "out": str(out), **settings})


def make_encoder(
    *,
    capacity: int = 1024,
    alignment: int = 1,
    tile_cap: int | None = None,
    tokenizer: Any | None = None,
) -> Encoder:
    template = ChatTemplate(tokenizer or load_tokenizer(TOKENIZER), FEATURES)
    return Encoder(template, TILING, capacity, tile_cap, preferences=True, alignment=alignment)


def source_of(data: Path) -> tuple[Annotations, list[RawRecord]]:
    (source,) = single_source(data / "pairs.jsonl", data)
    return source, list(open_reader(source.path).read(0, 1, 1000))


def encoded(data: Path, **settings) -> dict[int, Sample]:
    """Return the sample of each record, by its line."""
    source, raws = source_of(data)
    encoder = make_encoder(**settings)
    found = {}
    for raw in raws:
        (found[raw.number],) = encoder.encode_raw(raw, source, source=0, images=Images.LOAD)
    return found
