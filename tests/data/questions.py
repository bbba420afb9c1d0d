"""Random questions for the packs of ``samples``, without tokenizer and template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.store.manifest import read_manifest
from megavlm.evaluate.packs import Request, RequestReader, TaskPacks, arrange
from tests.data.native_packs import Clip, native_sample
from tests.data.samples import make_sample


@dataclass(frozen=True, kw_only=True)
class Endless(TaskPacks):
    """Questions whose answers end only when they are as long as asked."""

    def is_over(self, tokens: Sequence[int]) -> bool:
        return False


def random_questions(packs: Path, folder: Path, vocab_size: int) -> TaskPacks:
    """Make questions of unlike lengths with none, one or two images, in the order of packs. Of
    images of any size the second is a video, behind whose frames the text goes on.

    Args:
        packs: dataset whose packs they are to be like.
        folder: existing, for their images.
        vocab_size: of the model.
    """
    manifest = read_manifest(packs)
    if manifest.tiling == "native":
        manifest = replace(manifest, tile_cap=manifest.capacity)
    rng = np.random.default_rng(4)
    sizes = dict(
        vocab_size=vocab_size,
        context_token_id=manifest.context_token_id,
        tile_size=manifest.image_size,
        features_per_tile=manifest.features_per_tile,
        grids=((1, 1),),
    )
    requests = []
    for line, (images, words) in enumerate([(1, 9), (0, 3), (2, 12), (0, 70), (1, 33)], start=1):
        if manifest.tiling == "native":
            shown = ((48, 24), Clip(size=(24, 24), frames=7, interval=2.3))[:images]
            of_image = dict(tile_size=manifest.image_size, vocab_size=vocab_size)
            of_image["context_token_id"] = manifest.context_token_id
            sample = native_sample(rng, shown, line=line, words=words, **of_image)
        else:
            sample = make_sample(rng, images=images, text_tokens=words, line=line, **sizes)
        shown = []
        for number, image in enumerate(sample.images):
            path = folder / f"{line}-{number}.png"
            path.write_bytes(image.encoded)
            shown.append(replace(image, encoded=b"", name=str(path)))
        requests.append(
            Request(
                path=folder / "task.jsonl",
                line=line,
                tokens=sample.tokens,
                supervised=np.zeros(len(sample.tokens), bool),
                images=tuple(shown),
                room=1,
            )
        )
    order = arrange(requests, manifest)
    return Endless(
        task=None,
        requests=tuple(requests),
        owners=tuple(range(len(requests))),
        order=tuple(map(tuple, order)),
        packs=PackedDataset(RequestReader(requests, order, manifest)),
        template=None,
    )
