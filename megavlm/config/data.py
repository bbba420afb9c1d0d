"""Settings of the data that a run is trained and evaluated on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megavlm.config.sampling import Sampling
from megavlm.config.tiling import Tiling

# A value that accepts every template, or every tiling.
ANY = "any"
# Of ``--data.strata`` if a step has so many packs.
STRATA = 8
# What ``--data.augment`` knows.
AUGMENTATIONS = ("jpeg", "crop", "half_crop", "flip", "colour")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Packed datasets, made by ``tools/pack_dataset.py``, or annotation files to be packed first.

    Args:
        train: folder of the packed training set, or its URL in object storage, such as
            ``s3://bucket/packs``; separate several with commas. An annotation file, or a meta file,
            is packed at its first use, into ``cache``.
        weights: share of packs to draw from each folder of ``train``; empty: as ``sampling`` says.
        sampling: draw from folders of ``train`` in proportion to their packs (packs), or samples to
            the square root of the folder's (sqrt).
        batch_shares: give every global batch the same number of packs from each folder of ``train``
            (its share, rounded to whole packs); otherwise any 64 consecutive packs match the shares
            to within one or two packs.
        curriculum: in the first epoch, visit packs by level of difficulty, easiest first, shuffled
            within a level; later epochs mix all levels. The packs must be made with
            ``tools/pack_dataset.py --difficulty``.
        valid: folder of the packed validation set, or an annotation file as in ``train``; empty: no
            evaluation.
        packing: options of ``tools/pack_dataset.py`` for annotation files, as one text such as
            ``--data.packing="--tokenizer Qwen2.5-0.5B-Instruct --root images"``.
        cache: folder of packs made of annotation files; empty: ``~/.cache/megavlm/packs``.
        shuffle: visit the packs in a seeded order, a new one each epoch; otherwise as stored.
        group: size of a bucket of similar-cost packs that are drawn together, to keep ranks
            balanced; 0: the global batch size divided by ``strata``; 1: no buckets.
        strata: equal parts of all packs, by cost, that buckets which follow each other come from,
            one from each, so that the packs of a step are mixed as all packs are (stratified
            sampling); 1: a bucket comes from anywhere; 0: 8, or the global batch size if that is
            less, or 1 if ``group`` is 1.
        loss_reduction: weight of each supervised token in the loss: 1 (token), 1/n (sample) or
            1/sqrt(n) (square), if its sample has n supervised tokens.
        loss_weights: weight of each folder of ``train`` in the loss, which is then the sum of
            these weights times the mean loss of the folder's labels in the batch, however many it
            has (Flamingo, arXiv 2204.14198, section 2.4); needs ``batch_shares``. Empty: every
            label weighs as ``loss_reduction`` says, whichever folder it is from.
        template: conversation templates (``--template`` of ``tools/pack_dataset.py``) that the
            packs may be packed with; any: every one.
        tiling: how images must have become tiles (``--tiling`` of ``tools/pack_dataset.py``); any:
            either way.
        reference: folder of the log-probabilities that the reference model gives the answers of
            ``train`` and ``valid``, for the objective preference. What it lacks is computed before
            the first step, by the weights that the run starts from. Empty: ``reference`` in
            ``checkpoint.save``.
        augment: random image augmentations, for sources packed with data_augment: jpeg (quality 75
            to 100, as in InternVL), crop, half_crop (BLIP-2's), flip, colour. Crops and flip
            invalidate boxes and words such as "left".
        next_image: share of the samples in training whose tokens read the next image instead of the
            last one, where cross-attention reads images (Flamingo: 0.5 for web pages).
        workers: loader processes per rank; 0 decodes in the training process.
        prefetch: packs that each loader process decodes ahead.
        timeout: abort the run if a loader process delivers nothing for this many seconds; 0 waits
            forever.
        max_unreadable_packs: go on without packs of ``train`` that cannot be read (damaged, an
            image that no decoder takes, a file that is gone), at most so many different ones in the
            whole run; each is named and counted. All ranks then wait for each other before each
            step. 0: the first one ends the run.
    """

    train: str = ""
    weights: tuple[float, ...] = ()
    sampling: Sampling = "packs"
    batch_shares: bool = False
    curriculum: bool = False
    valid: str = ""
    packing: str = ""
    cache: str = ""
    shuffle: bool = True
    group: int = 0
    strata: int = 0
    loss_reduction: Literal["token", "sample", "square"] = "square"
    loss_weights: tuple[float, ...] = ()
    template: tuple[str, ...] = (ANY,)
    tiling: Tiling = ANY
    reference: str = ""
    augment: tuple[str, ...] = ()
    next_image: float = 0.0
    workers: int = 4
    prefetch: int = 4
    timeout: int = 600
    max_unreadable_packs: int = 0

    @property
    def train_folders(self) -> tuple[str, ...]:
        """The folders of ``train``."""
        return tuple(folder.strip() for folder in self.train.split(",") if folder.strip())
