"""Contrast pairs of an image and its text with all other pairs of a step: CLIP's loss (arXiv
2103.00020) and SigLIP's (arXiv 2303.15343).

Shape letters: T tokens of the pack, n pairs (of a pack, or of this data-parallel rank), N pairs of
the step over all data-parallel ranks, E size of the embeddings, D hidden size, R rows that ride
along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, logsigmoid, normalize

from megavlm.config.schema import Architecture
from megavlm.data.loading.batch import Batch
from megavlm.model.fusion import as_rows, from_rows
from megavlm.model.objective.losses import Losses
from megavlm.model.objective.objective import Objective, keep_inside, of_tokens
from megavlm.model.objective.sigmoid_ring import Ring, sigmoid_ring_losses
from megavlm.parallel.gather_rows import gather_rows
from megavlm.parallel.process_groups import Groups
from megavlm.planner.layout import Chunk


class Contrastive(Objective):
    """Embeddings of images and texts, and the loss between them.

    Args:
        settings: megatron-core's configuration of the language model.
        architecture: the model.
        chunk: the last one has the projection of the texts, and the loss's scale and bias.
        groups: process groups.
    """

    spans_step = True
    embeds_pairs = True

    def __init__(
        self,
        settings: TransformerConfig,
        architecture: Architecture,
        chunk: Chunk,
        groups: Groups,
    ):
        super().__init__(settings)
        self.settings = architecture.contrastive
        self.width = architecture.language.hidden_size
        self.group = groups.collection.dp_cp
        self.data_rank = groups.data_rank
        self.text_projection = None
        self.logit_scale = None
        self.logit_bias = None
        if chunk.has_head:
            dtype = settings.params_dtype
            self.text_projection = nn.Linear(
                self.width, self.settings.size, bias=self.settings.text_bias, dtype=dtype
            )
            self.logit_scale = nn.Parameter(torch.zeros(1, dtype=dtype))
            if self.settings.loss == "sigmoid":
                self.logit_bias = nn.Parameter(torch.zeros(1, dtype=dtype))

    def fuse(self, embeddings: Tensor, features: Tensor, batch: Batch) -> Tensor:
        """See ``Objective``: embeddings of the images ride along behind the tokens, filled up to
        whole rows.
        """
        rows = self.riding_rows(batch)
        images = as_rows(features[: batch.samples], rows, self.width)
        return torch.cat([embeddings, images])

    def riding_rows(self, batch: Batch) -> int:
        """See ``Objective``."""
        return math.ceil(batch.samples * self.settings.size / self.width)

    def forward(self, output: Tensor, riding: Tensor, batch: Batch) -> Tensor:
        """Return the embeddings of a pack's images and texts, of length one, float32 [2, n, E]. A
        text's is that of its last token.
        """
        size = self.settings.size
        images = from_rows(riding, batch.samples, size)[:, 0]
        last = output[:, 0].index_select(0, batch.sample_ends[1 : batch.samples + 1] - 1)
        texts = self.text_projection(last)
        return normalize(torch.stack([images, texts]).float(), dim=-1)

    def losses(self, output: Tensor, batch: Batch) -> Losses:
        """Refuse: a pack alone has no loss."""
        raise TypeError("the loss of a pair depends on the whole step; call step_losses")

    @property
    def loss_parameters(self) -> list[nn.Parameter]:
        """The trained parameters that ``step_losses`` reads, on ranks with the last chunk."""
        own = (self.logit_scale, self.logit_bias)
        return [parameter for parameter in own if parameter is not None and parameter.requires_grad]

    def step_losses(
        self, outputs: Sequence[Tensor], batches: Sequence[Batch], samples: Sequence[Sequence[int]]
    ) -> list[Losses]:
        """Return the losses of the tokens of each pack of this rank; all tokens of a text have the
        loss of its pair. Collective over the data-parallel ranks.

        Args:
            outputs: of the last chunk, for each pack [2, n, E].
            batches: the packs.
            samples: pairs of each pack of each data-parallel rank in this step.
        """
        counts = [sum(of_rank) for of_rank in samples]
        images, texts = torch.cat(list(outputs), dim=1)
        ids = None
        if self.settings.positives != "own":
            own = torch.cat([batch.pair_ids for batch in batches])
            ids = gather_rows(own, counts, self.group)
        pairs = self._pair_losses(images, texts, counts, ids)
        sizes = [batch.samples for batch in batches]
        return [
            Losses(total=of_tokens(part, batch))
            for part, batch in zip(pairs.split(sizes), batches, strict=True)
        ]

    def _pair_losses(
        self, images: Tensor, texts: Tensor, counts: Sequence[int], ids: Tensor | None
    ) -> Tensor:
        """Return the loss of each pair of this rank [n], in float32: bfloat16 has steps of one half
        near a logit of 100. ``ids`` of the images and texts of all ranks [N, 2].
        """
        scale = self.values_of(self.logit_scale).float().exp()
        first = sum(counts[: self.data_rank])
        own = torch.arange(first, first + len(images), device=images.device)

        def positives(owner: int) -> Tensor:
            start = sum(counts[:owner])
            others = torch.arange(start, start + counts[owner], device=own.device)
            return self._positives(own, others, ids)

        if self.settings.exchange == "ring":
            ring = Ring(group=self.group, rank=self.data_rank, counts=counts, positives=positives)
            bias = self.values_of(self.logit_bias).float()
            return sigmoid_ring_losses(images, texts, scale, bias, ring)
        all_texts = gather_rows(texts, counts, self.group)
        logits = scale * linear(images, all_texts)
        everyone = torch.arange(sum(counts), device=own.device)
        if self.settings.loss == "sigmoid":
            logits = logits + self.values_of(self.logit_bias).float()
            signs = 2 * self._positives(own, everyone, ids).float() - 1
            return -logsigmoid(signs * logits).sum(dim=1)
        all_images = gather_rows(images, counts, self.group)
        of_texts = scale * linear(texts, all_images)
        targets = own
        if ids is not None:
            same = self._positives(own, everyone, ids).float()
            targets = same / same.sum(dim=1, keepdim=True)
        by_image = cross_entropy(logits, targets, reduction="none")
        return (by_image + cross_entropy(of_texts, targets, reduction="none")) / 2

    def _positives(self, own: Tensor, others: Tensor, ids: Tensor | None) -> Tensor:
        """Return which pairs are positives of each other, bool [n, m].

        Args:
            own, others: numbers of the pairs among all of the step [n] and [m].
            ids: of all images and texts [N, 2]; none: a pair has itself alone.
        """
        if ids is None:
            return own[:, None] == others[None]
        same = ids[own][:, None] == ids[others][None]
        kind = self.settings.positives
        return same.any(dim=-1) if kind == "either" else same[..., ("image", "text").index(kind)]

    def after_step(self, is_skipped: bool) -> None:
        """Keep the scale below its bound."""
        if most := self.settings.max_scale:
            keep_inside(self.logit_scale, most=math.log(most))
