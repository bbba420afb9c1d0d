"""Questions as packs, which the trainer runs as it runs those of a dataset.

A question has room for the first token of its answer behind it, so that a prefix ends there. The
answer itself needs none: layers keep the keys and values of what stands before it.

Shapes: T tokens of a pack (its capacity).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from megavlm.data.images.feature_layout import feature_layout, sizes_in_text
from megavlm.data.images.tiling import Tiling
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.rotary_positions import rotary_positions
from megavlm.data.records.record import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn
from megavlm.data.records.reject import RejectError
from megavlm.data.sample import Image, Sample
from megavlm.data.store.manifest import Manifest, Source, read_manifest
from megavlm.data.store.memory_reader import MemoryReader
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.instruction import NO_INSTRUCTION
from megavlm.data.text.tokenizer import QFORMER_TOKENIZER, load_tokenizer
from megavlm.evaluate.media import Clip, loaded, media_of
from megavlm.evaluate.metrics import METRICS
from megavlm.evaluate.task import Question, Task


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a model reads at once: the prompt of a question, that with one of its choices, or a pair
    of an image and a text.

    Args:
        path: file of the task.
        line: of the question in it.
        tokens: int32 [n], up to where the answer begins; with a choice, to the choice's end.
        supervised: bool [n], the tokens of the choice.
        images: its images and frames, whose files are not read yet; ``name`` is the path.
        clips: the videos, as in ``Media``; empty: there are none.
        instruction: int32 [m], what a Q-Former reads beside them.
        room: tokens that are kept free behind it.
    """

    path: Path
    line: int
    tokens: np.ndarray
    supervised: np.ndarray
    images: tuple[Image, ...]
    clips: tuple[Clip | None, ...] = ()
    instruction: np.ndarray = field(default_factory=lambda: NO_INSTRUCTION)
    room: int = 0

    @property
    def tiles(self) -> int:
        """Tiles of all images."""
        return sum(image.tiles for image in self.images)

    @property
    def where(self) -> str:
        """File and line of the question."""
        return f"{self.path}:{self.line}"


def requests_of(
    task: Task, question: Question, template: ChatTemplate, tiling: Tiling
) -> list[Request]:
    """Return the request that a question makes; with choices, one for each of them.

    Args:
        task: of the question.
        question: what is asked.
        template: of the conversation, with its tokenizer.
        tiling: how images become tiles.

    Raises:
        ValueError: an image or video that cannot be read, or a text that the template refuses.
    """
    where = task.where(question)
    _check_text(question, template, where)
    with_times = tiling.shows_times(template.format)
    media = media_of(question, tiling, where, with_times=with_times)
    layout = feature_layout(tiling.mode, template.features_per_tile)
    tiles, shown = sizes_in_text(media.images, layout)
    try:
        if not question.choices:
            tokens = template.prompt(media.turns, tiles, shown)
            found = [(tokens, np.zeros(len(tokens), bool))]
        else:
            metric = METRICS[task.metric]
            endings = (
                Turn(role="gpt", text=metric.choice(index, choice))
                for index, choice in enumerate(question.choices)
            )
            found = [template.encode((*media.turns, ending), tiles, shown) for ending in endings]
    except RejectError as error:
        raise ValueError(f"--eval.tasks {where}: {error.detail}") from None
    return [
        Request(
            path=task.path,
            line=question.line,
            tokens=tokens,
            supervised=supervised,
            images=media.images,
            clips=media.clips,
            instruction=template.instruction(media.turns, tiles),
            room=0 if question.choices else 1,
        )
        for tokens, supervised in found
    ]


def _check_text(question: Question, template: ChatTemplate, where: str) -> None:
    """Refuse a text that the template would leave out."""
    asked = "".join(turn.text for turn in question.turns if turn.role != "gpt")
    shown = asked.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").strip()
    if shown and not template.format.questions:
        raise ValueError(
            f"--eval.tasks {where}: the template {template.format.name} of the packs shows images"
            f" alone, and would leave out {shown[:40]!r}; write {IMAGE_PLACEHOLDER} as the question"
        )


def arrange(requests: Sequence[Request], manifest: Manifest) -> list[list[int]]:
    """Put requests into packs, in their order.

    Returns:
        The indices of each pack's requests.

    Raises:
        ValueError: one is larger than a pack.
    """
    packs: list[list[int]] = []
    tokens = manifest.capacity
    tiles = manifest.tile_cap
    for index, one in enumerate(requests):
        length = -(-(len(one.tokens) + one.room) // manifest.alignment) * manifest.alignment
        if length > manifest.capacity or one.tiles > manifest.tile_cap:
            raise ValueError(
                f"--eval.tasks {one.where}: {length} tokens and {one.tiles} tiles, but the packs of"
                f" --data.train hold {manifest.capacity} tokens and {manifest.tile_cap} tiles; ask"
                " with less text, fewer or smaller images or fewer frames, or name packs of larger"
                " --capacity and --tile_cap (--packs of tools/chat.py and tools/evaluate.py)"
            )
        if tokens + length > manifest.capacity or tiles + one.tiles > manifest.tile_cap:
            packs.append([])
            tokens = 0
            tiles = 0
        packs[-1].append(index)
        tokens += length
        tiles += one.tiles
    return packs


class RequestReader(MemoryReader):
    """Packs that are made of requests when they are read.

    Args:
        requests: each is a source of its own, so that what ``Batch.sources`` says of a token is the
            index of its request.
        order: the indices of each pack's requests.
        manifest: of the training packs.
    """

    def __init__(
        self, requests: Sequence[Request], order: Sequence[Sequence[int]], manifest: Manifest
    ) -> None:
        self.requests = requests
        self.order = order
        sources = tuple(
            Source(name=str(index), annotations=str(one.path)) for index, one in enumerate(requests)
        )
        # A question is one sample, whatever the training packs hold.
        alone = replace(manifest, sources=sources, preferences=False)
        super().__init__((), alone, "--eval.tasks")

    def __reduce__(self) -> tuple:
        return type(self), (self.requests, self.order, self.manifest)

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def _fill(self) -> int:
        """A token that stands for an answer: no image's, and none that ends a text, behind which
        no image would be read.
        """
        manifest = self.manifest
        taken = (manifest.end_token_id, manifest.context_token_id)
        return next(one for one in (manifest.pad_token_id, 0, 1, 2) if one not in taken)

    def samples(self, pack_id: int, *, load: bool) -> list[Sample]:
        """See ``MemoryReader``: the samples have room for the answers."""
        fill = self._fill
        tiling = tiling_of(self.manifest)
        pack = self.order[pack_id]
        return [
            Sample(
                tokens=np.pad(one.tokens, (0, one.room), constant_values=fill),
                # Where an answer begins, a prefix ends.
                supervised=np.pad(one.supervised, (0, one.room), constant_values=True),
                images=tuple(loaded(one.images, one.clips, tiling)) if load else one.images,
                source=index,
                line=one.line,
                instruction=one.instruction,
            )
            for index, one in ((index, self.requests[index]) for index in pack)
        ]


@dataclass(frozen=True, kw_only=True)
class TaskPacks:
    """A task, ready for the model.

    Args:
        task: the questions.
        requests: each question, or each of its choices, one question after the other.
        owners: index of the question of each of ``requests``.
        order: the indices in ``requests`` of each pack.
        packs: the packs.
        template: decodes answers.
    """

    task: Task
    requests: tuple[Request, ...]
    owners: tuple[int, ...]
    order: tuple[tuple[int, ...], ...]
    packs: PackedDataset
    template: ChatTemplate

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        own = self.template.tokenizer.eos_token_id
        return self.template.end_token_ids | ({own} if own is not None else set())

    @cached_property
    def _end_text(self) -> str:
        """What ends an answer, if it is no special token: a tokenizer may join it with what stands
        before it, such as a full stop and a line break.
        """
        special = self.template.tokenizer.all_special_ids
        return "" if self.template.end_token_id in special else self.template.format.final_end

    def is_over(self, tokens: Sequence[int]) -> bool:
        """Tell whether an answer is over with its last token."""
        end = self._end_text
        return tokens[-1] in self.ends or bool(end and end in self.template.text(tokens))

    def rotary_shift(self, index: int, tokens_per_second: int) -> int:
        """Return how much further than their places in a sample say the tokens behind a request are
        rotated: an image has fewer rows and columns than placeholder tokens.

        Args:
            index: of the request.
            tokens_per_second: of the model, as for ``rotary_positions``.
        """
        one = self.requests[index]
        length = np.array([len(one.tokens)])
        context = self.packs.manifest.context_token_id
        found = rotary_positions(one.tokens, length, one.images, context, tokens_per_second)
        return int(found.following[0]) - len(one.tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer, without what ends it."""
        first_end = next((i for i, token in enumerate(tokens) if token in self.ends), None)
        found = self.template.text(tokens[:first_end])
        return (found.partition(self._end_text)[0] if self._end_text else found).strip()


def prepare(
    task: Task, folder: Path | str, max_new_tokens: int = 0, positions: int = 0
) -> TaskPacks:
    """Make the packs of a task, with the tokenizer, template and tiles of a packed dataset.

    Args:
        task: the questions.
        folder: of the dataset.
        max_new_tokens: longest answer.
        positions: tokens that the model has positions for; 0: any number.

    Raises:
        ValueError: a question that does not fit the template, the packs or, with an answer, the
            positions, or images that cannot be read.
    """
    manifest, template, tiling = usage_of(folder)
    found = [requests_of(task, question, template, tiling) for question in task.questions]
    requests = tuple(one for each in found for one in each)
    for one in requests if positions else ():
        if (length := len(one.tokens) + one.room * max_new_tokens) > positions:
            raise ValueError(
                f"--eval.tasks {one.where}: {length} tokens with the longest answer, but the model"
                f" has positions for {positions}; lower --eval.max_new_tokens {max_new_tokens}, or"
                " leave the question out"
            )
    order = arrange(requests, manifest)
    return TaskPacks(
        task=task,
        requests=requests,
        owners=tuple(index for index, each in enumerate(found) for _ in each),
        order=tuple(tuple(pack) for pack in order),
        packs=PackedDataset(RequestReader(requests, order, manifest)),
        template=template,
    )


def usage_of(folder: Path | str, pair_length: int = 0) -> tuple[Manifest, ChatTemplate, Tiling]:
    """Return the facts of a packed dataset, and how it makes tokens of texts and tiles of images.

    Args:
        folder: of the dataset.
        pair_length: most tokens of the text of a pair; 0: the template's.
    """
    manifest = read_manifest(folder)
    words = Path(folder) / "tokenizer" / QFORMER_TOKENIZER
    template = ChatTemplate(
        load_tokenizer(Path(folder) / "tokenizer"),
        manifest.features_per_tile,
        name=manifest.template,
        system_message=manifest.system_message,
        qformer_tokenizer=load_tokenizer(words) if manifest.instruction_length else None,
        instruction_length=manifest.instruction_length,
        pair_length=pair_length,
    )
    return manifest, template, tiling_of(manifest)


def tiling_of(manifest: Manifest) -> Tiling:
    """Return how images of a packed dataset became tiles."""
    return Tiling(
        tile_size=manifest.image_size,
        min_tiles=manifest.min_tiles,
        max_tiles=manifest.max_tiles,
        thumbnail=manifest.thumbnail,
        mode=manifest.tiling,
        pixel_mean=manifest.pixel_mean,
        resample=manifest.resample,
        limit=manifest.image_limit,
        min_pixels=manifest.min_pixels,
        max_pixels=manifest.max_pixels,
        video=manifest.video,
        grids=manifest.grids,
        exif_rotation=manifest.exif_rotation,
    )
