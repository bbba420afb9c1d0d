"""Cross checks of the settings of data, without a look into packed datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megavlm.config.checks.limits import at_least
from megavlm.config.schema import AUGMENTATIONS, Data


def data_problems(data: Data) -> Iterator[str]:
    """Yield what is wrong with the folders of packs and how they are read."""
    if not data.train:
        yield "--data.train: name the folder of a packed dataset; tools/pack_dataset.py makes one"
    folders = [("train", folder) for folder in data.train_folders]
    if data.valid:
        folders.append(("valid", data.valid))
    for name, folder in folders:
        if not any(sign in folder for sign in ("://", *"*?[{")) and not Path(folder).exists():
            yield (
                f"--data.{name} {folder}: no such path; tools/pack_dataset.py --out {folder} makes"
                " packs"
            )
    if data.weights and len(data.weights) != len(data.train_folders):
        yield (
            f"--data.weights: {len(data.weights)} weights for {len(data.train_folders)} folders of"
            " --data.train"
        )
    if any(not 0 < weight < float("inf") for weight in data.weights):
        yield f"--data.weights {','.join(map(str, data.weights))}: each must be above 0"
    if data.batch_shares and len(data.train_folders) < 2:
        yield (
            "--data.batch_shares true has no effect: --data.train names one folder; give several,"
            " with commas, or leave it out"
        )
    if data.weights and data.sampling != "packs":
        yield (
            f"--data.sampling {data.sampling} has no effect: --data.weights says how much is drawn"
            " from each folder; give --data.sampling packs, or leave --data.weights out"
        )
    for name in ("group", "strata"):
        if vars(data)[name] > 1 and not data.shuffle:
            yield (
                f"--data.{name} {vars(data)[name]} has no effect: --data.shuffle false takes packs"
                " as they are stored; leave one of them out"
            )
    yield from _loss_weights(data)
    for name in data.augment:
        if name == "half_crop" and "crop" in data.augment:
            yield "--data.augment crop,half_crop: an image is cropped in one way; give one of them"
        if name not in AUGMENTATIONS:
            yield f"--data.augment {name}: no such change; known are {', '.join(AUGMENTATIONS)}"
    yield from at_least(
        0, "data", data, "workers", "group", "strata", "timeout", "max_unreadable_packs"
    )
    yield from at_least(1, "data", data, "prefetch")


def _loss_weights(data: Data) -> Iterator[str]:
    """Yield what is wrong with the weights of folders in the loss."""
    weights = data.loss_weights
    flag = f"--data.loss_weights {','.join(map(str, weights))}"
    if weights and len(weights) != len(data.train_folders):
        folders = len(data.train_folders)
        yield f"{flag}: {len(weights)} weights for {folders} folders of --data.train"
    if any(not 0 < weight < float("inf") for weight in weights):
        yield f"{flag}: each must be above 0"
    if weights and not data.batch_shares:
        yield (
            f"{flag}: each is for the mean of its folder in a batch, so every batch must have packs"
            " of every folder; give --data.batch_shares true"
        )
