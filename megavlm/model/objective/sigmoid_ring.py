"""SigLIP's loss with texts that go from rank to rank (arXiv 2303.15343, section 3.3): no rank ever
has the texts, or the similarities, of all of them.

Texts and, backward, their gradients go once around the ring; similarities are computed again
backward. Shape letters: n pairs of this data-parallel rank, m of another one, M of the one that has
most, E size of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import linear, logsigmoid, pad

from megavlm.parallel.ring import pass_on

Positives = Callable[[int], Tensor]
"""Says which of this rank's images and of a rank's texts are positives of each other, bool
[n, m].
"""


@dataclass(frozen=True, kw_only=True)
class Ring:
    """The ranks that contrast their pairs.

    Args:
        group: data-parallel ranks.
        rank: this one.
        counts: pairs of each.
        positives: by rank.
    """

    group: ProcessGroup
    rank: int
    counts: Sequence[int]
    positives: Positives

    def texts(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the ranks and their texts [m, E], this one's first. Collective."""
        held = pad(own, (0, 0, 0, max(self.counts) - len(own)))
        ranks = len(self.counts)
        for step in range(ranks):
            owner = (self.rank - step) % ranks
            yield owner, held[: self.counts[owner]]
            if step + 1 < ranks:
                held = pass_on(held, self.group)

    def signs(self, owner: int) -> Tensor:
        """Return 1 for positives and -1 for all others, float32 [n, m]."""
        return self.positives(owner).float() * 2 - 1


class _SigmoidRing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ring: Ring
    ) -> Tensor:
        losses = images.new_zeros(len(images))
        for owner, others in ring.texts(texts):
            logits = scale * linear(images, others) + bias
            losses -= logsigmoid(ring.signs(owner) * logits).sum(dim=1)
        ctx.save_for_backward(images, texts, scale, bias)
        ctx.ring = ring
        return losses

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        images, texts, scale, bias = ctx.saved_tensors
        ring = ctx.ring
        of_images = torch.zeros_like(images)
        of_scale = torch.zeros_like(scale)
        of_bias = torch.zeros_like(bias)
        # The gradient of the texts that are here; it goes on with them, and ends at their owner.
        of_texts = images.new_zeros(max(ring.counts), images.shape[1])
        for owner, others in ring.texts(texts):
            similar = linear(images, others)
            signs = ring.signs(owner)
            of_logits = -signs * torch.sigmoid(-signs * (scale * similar + bias))
            of_logits *= gradient[:, None]
            of_images += scale * (of_logits @ others)
            of_texts[: len(others)] += scale * (of_logits.T @ images)
            of_scale += (of_logits * similar).sum()
            of_bias += of_logits.sum()
            of_texts = pass_on(of_texts, ring.group)
        return of_images, of_texts[: len(texts)], of_scale, of_bias, None


def sigmoid_ring_losses(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ring: Ring
) -> Tensor:
    """Return the loss of each image of this rank against the texts of all ranks [n], with exact
    gradients. Collective, and so is its backward pass.

    Args:
        images, texts: of this rank's pairs, float32 [n, E].
        scale, bias: of the similarities, float32 [1].
        ring: the ranks.
    """
    return _SigmoidRing.apply(images, texts, scale, bias, ring)
