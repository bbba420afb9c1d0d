"""Samples that are too long: the end of a conversation is cut off, a document becomes windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from megavlm.data.packing.windows import Windows, cut_document
from megavlm.data.records.reject import RejectError
from megavlm.data.sample import Sample
from megavlm.data.text.chat_tokens import ChatTemplate
from megavlm.data.text.documents import learned_behind_image
from megavlm.data.text.image_rows import Shown


def truncated(whole: Sample, end: int, template: ChatTemplate, shown: Sequence[Shown]) -> Sample:
    """Return a sample without what stands behind its first ``end`` tokens (0: all of it). An
    image, of which ``shown`` says what it takes up, is kept or lost as a whole.

    Raises:
        RejectError: the end lies inside an image, or nothing to learn lies before it.
    """
    if not end or whole.length <= end:
        return whole
    context = template.context_token_id
    left = int(np.count_nonzero(whole.tokens[:end] == context))
    ends = np.cumsum(np.array([image.features for image in shown], np.int64))
    kept = int(np.count_nonzero(ends <= left))
    if left not in (0, *ends.tolist()):
        kind = "image" if shown[kept].images == 1 else "the video at image"
        raise RejectError(
            "too_long",
            f"{whole.length} tokens, and --truncate {end} would cut {kind} {kept + 1} in two:"
            " raise --truncate",
        )
    if not whole.supervised[1:end].any():
        raise RejectError(
            "empty_answer", f"no answer begins before --truncate {end} of {whole.length} tokens"
        )
    return dataclasses.replace(
        whole,
        tokens=whole.tokens[:end],
        supervised=whole.supervised[:end],
        images=whole.images[: sum(image.images for image in shown[:kept])],
    )


def cut_windows(
    whole: Sample, windows: Windows, template: ChatTemplate, shown: Sequence[Shown]
) -> Iterator[Sample]:
    """Yield the windows of a document, whose images take up what ``shown`` says, without those that
    have nothing to learn.

    Raises:
        RejectError: none has.
    """
    first = len(template.first_tokens)
    tokens = whole.tokens[first:]
    supervised = whole.supervised[first:]
    starts, ends = template.image_extents(tokens, shown)
    firsts = [0, *np.cumsum(np.array([one.images for one in shown], np.int64)).tolist()]
    if windows.tokens:  # the first tokens stand in every window
        windows = dataclasses.replace(windows, tokens=max(1, windows.tokens - first))
    number = 0
    for start, end, image, last in cut_document(tokens, starts, ends, windows):
        learned = supervised[start:end]
        if whole.images and template.format.learns_behind_images:
            learned = learned_behind_image(tokens[start:end], learned, template.context_token_id)
        if not learned[1:].any():
            continue
        yield dataclasses.replace(
            whole,
            tokens=np.concatenate([whole.tokens[:first], tokens[start:end]]),
            supervised=np.concatenate([whole.supervised[:first], learned]),
            images=whole.images[firsts[image] : firsts[last]],
            window=number,
        )
        number += 1
    if not number:
        raise RejectError("empty_answer", "no window of the document has a text to be learned")
