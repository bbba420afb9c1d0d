"""Stage 1 of BLIP-2 (arXiv 2301.12597, section 3.1): a Q-Former learns from pairs of an image and
its text, by contrast (ITC), by matching (ITM) and by generation (ITG).

Contrast and generation share a pass of the Q-Former: its rows are the queries and the text twice,
once as [CLS] ... and once with [DEC] in the place of [CLS]. Matching is a second pass: each pair,
its text with a wrong image, and its image with a wrong text.

Shape letters: n pairs of a pack, G pairs of a pool over all data-parallel ranks, Q queries,
L tokens of a text, N tokens of a tile, E size of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, normalize
from torch.utils.checkpoint import checkpoint

from megavlm.config.freeze_mask import trains
from megavlm.config.schema import Config
from megavlm.data.loading.batch import Batch
from megavlm.model.connector.qformer_mask import TextRows, seen_by
from megavlm.model.objective.hard_negatives import draw_negatives
from megavlm.model.objective.losses import Losses, Reading
from megavlm.model.objective.objective import Objective, keep_inside, of_tokens
from megavlm.model.objective.pools import PoolOfPack, in_pack_order, pools_of_rank
from megavlm.parallel.gather_rows import gather_rows
from megavlm.parallel.process_groups import Groups
from megavlm.planner.layout import Chunk

_LEAST_TEMPERATURE = 1e-3


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """What contrast and matching read of some pairs.

    Args:
        images: embeddings of the queries, of length one, float32 [n, Q, E].
        texts: embeddings of the texts, of length one, float32 [n, E].
        hidden: of the vision encoder [n, N, width].
        ids: of the texts, int64 [n, L].
        lengths: of the texts, int64 [n].
    """

    images: Tensor
    texts: Tensor
    hidden: Tensor
    ids: Tensor
    lengths: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> _Pairs:
        """Change every tensor alike."""
        return _Pairs(**{one.name: change(vars(self)[one.name]) for one in fields(self)})


class QFormerObjective(Objective):
    """The heads and the losses of stage 1.

    Args:
        settings: megatron-core's configuration of the chunk.
        config: the run.
        chunk: the last one has the heads.
        groups: process groups.
    """

    spans_step = True

    def __init__(
        self,
        settings: TransformerConfig,
        config: Config,
        chunk: Chunk,
        groups: Groups,
    ):
        super().__init__(settings)
        architecture = config.architecture
        self.trains_vision = trains("vision", config.training.trainable)
        self.settings = architecture.image_text
        self.groups = groups
        qformer = architecture.connector.qformer
        self.queries = qformer.queries
        # [DEC] is the last row of the token embedding.
        self.decoder_token = qformer.vocab_size - 1
        self.temperature = None
        if not chunk.has_head:
            return
        width = qformer.hidden_size
        dtype = settings.params_dtype
        self.image_projection = nn.Linear(width, self.settings.size, dtype=dtype)
        self.text_projection = nn.Linear(width, self.settings.size, dtype=dtype)
        self.temperature = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.matching = nn.Linear(width, 2, dtype=dtype)
        # BERT's head: its matrix of the vocabulary is the Q-Former's token embedding.
        self.transform = nn.Linear(width, width, dtype=dtype)
        self.transform_norm = nn.LayerNorm(width, eps=qformer.layernorm_epsilon, dtype=dtype)
        self.vocabulary_bias = nn.Parameter(torch.zeros(qformer.vocab_size, dtype=dtype))

    def forward(self, output: Tensor, riding: None, batch: Batch) -> tuple[Tensor, ...]:
        """Run the Q-Former on a pack, for contrast and generation.

        Args:
            output: hidden states of the vision encoder [N, tiles, width].
            riding: none.
            batch: the pack.

        Returns:
            Of its pairs: embeddings of the images [n, Q, E] and of the texts [n, E], losses of
                generation [n], and hidden states [n, N, width], which matching reads again.
        """
        hidden = output[:, : batch.samples]
        ids, lengths = texts_of(batch, self.settings.text_tokens)
        tokens = ids.shape[1]
        real = torch.arange(tokens, device=ids.device) < lengths[:, None]
        spoken = ids.clone()
        spoken[:, 0] = self.decoder_token
        rows = self.connector(
            hidden,
            text=torch.cat([ids, spoken], dim=1),
            seen=seen_by(
                self.queries,
                [TextRows(mode="separate", real=real), TextRows(mode="causal", real=real)],
            ),
            positions=torch.arange(tokens, device=ids.device).repeat(2),
        )
        asked, read, said = rows.split([self.queries, tokens, tokens], dim=1)
        images = normalize(self.image_projection(asked).float(), dim=-1)
        texts = normalize(self.text_projection(read[:, 0]).float(), dim=-1)
        # A run looks at the longest text of some packs. One that is longer shall not be cut in
        # silence: its loss is no number, and the step tells the packs.
        generation = self._generation(said, ids, real).where(lengths <= tokens, torch.nan)
        return images, texts, generation, hidden.transpose(0, 1)

    def _generation(self, said: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """Return the summed loss of each text's tokens but the first, float32 [n]."""
        hidden = self.transform_norm(gelu(self.transform(said[:, :-1])))
        logits = linear(hidden, self.connector.token_embedding.weight, self.vocabulary_bias)
        losses = cross_entropy(
            logits.float().flatten(0, 1),
            ids[:, 1:].flatten(),
            reduction="none",
            label_smoothing=self._smoothing,
        )
        return (losses.view(len(ids), -1) * real[:, 1:]).sum(dim=1)

    @property
    def _smoothing(self) -> float:
        """Label smoothing of contrast and generation; held-out losses have none."""
        return self.settings.label_smoothing if self.training else 0.0

    def losses(self, output: Sequence[Tensor], batch: Batch) -> Losses:
        """Refuse: a pack alone has no loss."""
        raise TypeError("the loss of a pair depends on its pool; call step_losses")

    def packs_at_once(self, packs: int) -> int:
        """See ``Objective``."""
        return self.settings.packs_at_once(packs, self.groups.data_size)

    @property
    def loss_parameters(self) -> list[nn.Parameter]:
        """The trained parameters that ``step_losses`` reads: those of matching, which are most of
        the Q-Former's, and the temperature.
        """
        if self.temperature is None:
            return []
        own = [self.temperature, *self.matching.parameters(), *self.connector.parameters()]
        return [parameter for parameter in own if parameter.requires_grad]

    def step_losses(
        self,
        outputs: Sequence[Sequence[Tensor]],
        batches: Sequence[Batch],
        samples: Sequence[Sequence[int]],
    ) -> list[Losses]:
        """See ``Objective``: every token of a text has the loss of its pair."""
        packs = [self._pairs(output, batch) for output, batch in zip(outputs, batches, strict=True)]
        everyone = self._gathered(packs, samples)
        pools = pools_of_rank(samples, self.groups.data_rank, self.settings.pool_packs)
        return [
            self._pack_losses(
                own,
                everyone.map(lambda rows, at=at: rows[at.start : at.stop]),
                at,
                output[2],
                batch,
            )
            for own, at, output, batch in zip(packs, pools, outputs, batches, strict=True)
        ]

    def _pairs(self, output: Sequence[Tensor], batch: Batch) -> _Pairs:
        images, texts, _, hidden = output
        if not self.trains_vision:
            hidden = hidden.detach()
        ids, lengths = texts_of(batch, self.settings.text_tokens)
        return _Pairs(images=images, texts=texts, hidden=hidden, ids=ids, lengths=lengths)

    def _gathered(self, packs: Sequence[_Pairs], samples: Sequence[Sequence[int]]) -> _Pairs:
        """Gather the pairs of all ranks, in the order of the packs. Collective."""
        counts = [sum(of_rank) for of_rank in samples]
        group = self.groups.collection.dp_cp
        order = in_pack_order(samples)
        is_in_order = order == list(range(len(order)))
        places = torch.tensor(order).to(packs[0].ids.device, non_blocking=True)

        def gather(name: str) -> Tensor:
            rows = torch.cat([vars(pack)[name] for pack in packs])
            found = gather_rows(rows, counts, group)
            return found if is_in_order else found.index_select(0, places)

        return _Pairs(**{one.name: gather(one.name) for one in fields(_Pairs)})

    def _pack_losses(
        self, own: _Pairs, pool: _Pairs, at: PoolOfPack, generation: Tensor, batch: Batch
    ) -> Losses:
        """Return the losses of a pack's tokens.

        Args:
            own: the pairs of the pack.
            pool: all pairs that they are contrasted with, their own among them.
            at: where their own stand in it.
            generation: loss of each text's tokens, summed [n].
            batch: the pack.
        """
        partners = torch.arange(at.first, at.first + len(own.ids), device=own.ids.device)
        temperature = self.values_of(self.temperature).float()
        others = pool
        if self.settings.gradient == "local":
            others = pool.map(torch.Tensor.detach)
        of_images = similarities(own.images, others.texts) / temperature
        of_texts = similarities(others.images, own.texts).T / temperature
        smoothing = self._smoothing
        contrast = [
            cross_entropy(logits, partners, reduction="none", label_smoothing=smoothing)
            for logits in (of_images, of_texts)
        ]
        tokens = (pool.lengths - 1).sum()
        matching, readings = self._matching(
            own,
            pool,
            draw_negatives(of_texts, partners, batch.pair_draws[0]),
            draw_negatives(of_images, partners, batch.pair_draws[1]),
        )
        named = {
            "itc": (contrast[0] + contrast[1]) / 2,
            "itm": matching,
            # Of the mean over pairs this makes the mean over all tokens of the pool.
            "itg": generation * len(pool.ids) / tokens,
        }
        for name, logits in (("image_to_text", of_images), ("text_to_image", of_texts)):
            readings[f"recall_{name}"] = _counted(logits.argmax(dim=1) == partners)
        readings["temperature"] = (temperature[0].detach(), torch.ones_like(temperature[0]))
        return Losses.weighted(
            {name: of_tokens(losses, batch) for name, losses in named.items()},
            self.settings.weights,
            readings,
        )

    def _matching(
        self, own: _Pairs, pool: _Pairs, image: Tensor, text: Tensor
    ) -> tuple[Tensor, dict[str, Reading]]:
        """Return the loss of matching of each pair: the mean of that of the pair, of its text with
        a wrong image, and of its image with a wrong text.

        Args:
            own: the pairs.
            pool: where negatives are from.
            image: rows of the wrong images in the pool [n].
            text: rows of the wrong texts [n].
        """
        ids = torch.cat([own.ids, own.ids, pool.ids[text]])
        lengths = torch.cat([own.lengths, own.lengths, pool.lengths[text]])
        hidden = torch.cat([own.hidden, pool.hidden[image], own.hidden])
        if own.images.is_leaf and torch.is_grad_enabled():
            # Of a step of several packs: only one pack's pass is in memory at a time.
            logits = checkpoint(self._match, ids, lengths, hidden, use_reentrant=False)
        else:
            logits = self._match(ids, lengths, hidden)
        pairs = len(own.ids)
        labels = (torch.arange(3 * pairs, device=ids.device) < pairs).long()
        losses = cross_entropy(logits, labels, reduction="none").view(3, pairs)
        is_right = (logits.argmax(dim=1) == labels).view(3, pairs)
        # A pool of one pair has no negatives.
        kinds = 3 if len(pool.ids) > 1 else 1
        readings = {
            "itm_accuracy": _counted(is_right[:kinds]),
            "itm_accuracy_of_pairs": _counted(is_right[:1]),
            "itm_accuracy_of_negatives": _counted(is_right[1:kinds]),
        }
        return losses[:kinds].mean(dim=0), readings

    def _match(self, ids: Tensor, lengths: Tensor, hidden: Tensor) -> Tensor:
        """Say whether texts and images belong together, logits float32 [texts, 2].

        Args:
            ids: of the texts [n, L].
            lengths: of the texts [n].
            hidden: of the images, from the vision encoder [n, N, width].
        """
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        seen = seen_by(self.queries, [TextRows(mode="bidirectional", real=real)])
        rows = self.call(self.connector, hidden.transpose(0, 1), text=ids, seen=seen)
        return self.call(self.matching, rows[:, : self.queries]).float().mean(dim=1)

    def after_step(self, is_skipped: bool) -> None:
        """Keep the temperature above zero."""
        keep_inside(self.temperature, least=_LEAST_TEMPERATURE)


def texts_of(batch: Batch, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the texts of a pack's samples, each filled up with zeros.

    Args:
        batch: the pack.
        tokens: L, at least those of the longest text.

    Returns:
        ids: int64 [n, L]
        lengths: int64 [n]
    """
    starts = batch.sample_ends[: batch.samples].long()
    lengths = batch.sample_ends[1 : batch.samples + 1].long() - starts
    offsets = torch.arange(tokens, device=starts.device)
    positions = (starts[:, None] + offsets).clamp(max=len(batch.tokens) - 1)
    return batch.tokens[positions].where(offsets < lengths[:, None], 0), lengths


def similarities(images: Tensor, texts: Tensor) -> Tensor:
    """Return the similarity of each image and each text: the largest of the image's queries.

    Args:
        images: [a, Q, E].
        texts: [b, E].

    Returns:
        [a, b]
    """
    return torch.einsum("aqe,be->abq", images, texts).max(dim=2).values


def _counted(hits: Tensor) -> Reading:
    # Filled on the device: a copy from the host would wait for it.
    return hits.sum(), hits.new_full((), hits.numel(), dtype=torch.int64)
