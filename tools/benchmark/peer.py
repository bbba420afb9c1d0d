"""The same model, stage and packs in ``transformers``, as its users train it.

- ``transformers``: one sample at a time, gradients accumulated over the samples of a pack, then
  AdamW.
- ``transformers_padded``: the samples of a pack as one batch, padded to the longest.
- ``transformers_packed``: the pack as one row whose positions start again at each sample.
  ``transformers`` makes a block-diagonal mask of
  them, or, where the package flash-attn is installed, tells it where samples end. ``_flex``:
  through torch's flex attention.
- ``..._compiled``: the same under ``torch.compile``.

What is the same for all: weights, gradients and moments in bfloat16 without float32 main weights
(less work and memory than mixed precision, in the peer's favour), torch's scaled dot product
attention, fused AdamW, gradients clipped at norm 1, pixels normalised on the device, images decoded
ahead of time by this project's loader. A loader of its users does no better, so what differs is the
training itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megavlm.config.schema import Vision
from megavlm.convert.hf import native_config
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.data.loading.batch import Batch, BatchOptions
from megavlm.data.loading.dataset import PackedDataset
from megavlm.data.loading.order import Plan
from tools.benchmark.cases import Case
from tools.benchmark.feed import Feed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODULES = {
    "vision": ("vision_tower",),
    "connector": ("multi_modal_projector",),
    "language": ("language_model", "lm_head"),
}
IGNORED = -100


class Peer:
    """A model of ``transformers`` in training; arguments as for ``trainer.Trainer``."""

    def __init__(self, case: Case, packs: PackedDataset, pack_ids: list[int], workers: int):
        if case.precision not in DTYPES:
            raise ValueError(f"{case.precision}: transformers trains in {' or '.join(DTYPES)}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._vision = case.architecture.vision
        self._dtype = DTYPES[case.precision]
        self._mode = case.implementation
        self._manifest = packs.manifest
        attention = self._attention()
        model = build(case, self._dtype, self.device, attention, packs.manifest.context_token_id)
        if case.recompute == "full":
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-5, weight_decay=0.05, fused=True)
        self._model = torch.compile(model, dynamic=True) if "_compiled" in self._mode else model
        self.feed = Feed(
            packs,
            Plan(num_packs=len(packs), seed=0, shuffle=False),
            pack_ids,
            BatchOptions(reduction="token"),
            workers,
        )
        self.notes = {
            "attention": str(attention),
            "moments": str(self._dtype).removeprefix("torch."),
        }

    def _attention(self) -> str | dict[str, str]:
        if "_flex" in self._mode:
            return {"text_config": "flex_attention", "vision_config": "sdpa"}
        has_flash = "_packed" in self._mode and importlib.util.find_spec("flash_attn") is not None
        return (
            {"text_config": "flash_attention_2", "vision_config": "sdpa"} if has_flash else "sdpa"
        )

    def step(self) -> Tensor:
        """One update; the loss, on the device."""
        batch = next(self.feed).to(self.device, non_blocking=True)
        inputs = list(self._inputs(batch))
        total = torch.zeros((), device=self.device)
        for each in inputs:
            loss = self._model(**each, use_cache=False).loss / len(inputs)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _inputs(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        pixels = normalise(batch.tiles, self._vision, self._dtype)
        if "_packed" in self._mode:
            yield packed(batch, pixels)
        elif "_padded" in self._mode:
            yield padded(
                list(samples(batch, pixels, self._manifest.features_per_tile)),
                self._manifest.pad_token_id,
            )
        else:
            yield from samples(batch, pixels, self._manifest.features_per_tile)

    def close(self) -> None:
        """End the loader's processes."""
        self.feed.close()


def build(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | dict[str, str],
    image_token_id: int,
) -> InternVLForConditionalGeneration:
    """Build a model with random weights, with the parts that the stage freezes frozen."""
    torch.manual_seed(0)
    settings = native_config.write(
        case.architecture, TokenIds(image=image_token_id, begin=0, end=2, pad=0), dtype
    )
    with device:
        model = InternVLForConditionalGeneration._from_config(
            InternVLConfig.from_dict(settings), attn_implementation=attention, dtype=dtype
        )
    model.requires_grad_(False)
    for part in case.trainable:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in MODULES[part]:
                module.requires_grad_(True)
    return model.train()


def normalise(tiles: Tensor, vision: Vision, dtype: torch.dtype) -> Tensor:
    """uint8 [I, 3, S, S] -> [I, 3, S, S]"""
    mean, std = (
        torch.tensor(values, device=tiles.device)[:, None, None]
        for values in (vision.pixel_mean, vision.pixel_std)
    )
    return ((tiles.float() / 255 - mean) / std).to(dtype)


def labels_of(batch: Batch) -> Tensor:
    """int64 [T]: the token itself where it is supervised, as ``transformers`` wants it; it shifts
    them itself.
    """
    labels = torch.full_like(batch.tokens, IGNORED)
    supervised = batch.loss_weights[:-1] > 0
    labels[1:][supervised] = batch.labels[:-1][supervised]
    return labels


def samples(batch: Batch, pixels: Tensor, features_per_tile: int) -> Iterator[dict[str, Tensor]]:
    """Each sample of the pack alone, without the padding at the end, with its tiles."""
    labels = labels_of(batch)
    ends = batch.sample_ends.tolist()
    seen = 0
    positions = batch.feature_positions.tolist()
    for start, end in zip(ends, ends[1:]):
        count = sum(start <= index < end for index in positions) // features_per_tile
        if bool((labels[start:end] != IGNORED).any()):
            tokens = batch.tokens[None, start:end]
            inputs = {
                "input_ids": tokens,
                "labels": labels[None, start:end],
                "attention_mask": torch.ones_like(tokens),
            }
            yield inputs | ({"pixel_values": pixels[seen : seen + count]} if count else {})
        seen += count


def padded(alone: list[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad samples to the rows of one batch."""
    fill = {"input_ids": pad_token_id, "labels": IGNORED, "attention_mask": 0}
    rows = {
        name: torch.nn.utils.rnn.pad_sequence(
            [sample[name][0] for sample in alone], batch_first=True, padding_value=value
        )
        for name, value in fill.items()
    }
    return rows | {
        "pixel_values": torch.cat(
            [sample["pixel_values"] for sample in alone if "pixel_values" in sample]
        )
    }


def packed(batch: Batch, pixels: Tensor) -> dict[str, Tensor]:
    """Make the whole pack one row."""
    ends = batch.sample_ends.long()
    every = torch.arange(len(batch.tokens), device=ends.device)
    positions = every - ends[torch.searchsorted(ends, every, right=True) - 1]
    return {
        "input_ids": batch.tokens[None],
        "labels": labels_of(batch)[None],
        "position_ids": positions[None],
        "pixel_values": pixels,
    }
