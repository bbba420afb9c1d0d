"""The language model: megatron-core's GPTModel, with a vocabulary padded so that it divides over
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import Module

from megavlm.config.padding import padded_vocabulary
from megavlm.config.schema import Config, Language, Loss
from megavlm.data.loading.batch import Batch
from megavlm.model.added_tokens import AddedEmbedding, AddedHead
from megavlm.model.block_attention import capped
from megavlm.model.experts import prepare_dispatchers
from megavlm.model.kernels import Kernels
from megavlm.model.rotary import section_angles
from megavlm.model.specs import language_spec
from megavlm.model.vocabulary_loss import LossTerms, vocabulary_loss
from megavlm.model.yarn import frequencies
from megavlm.planner.layout import Chunk

# Lengths of the longest sample whose angles are kept; as many as megatron-core keeps.
_ANGLES_KEPT = 32


class LanguageModel(GPTModel):
    """The layers of the language model that stand in one chunk, with token embedding and head where
    the chunk has them.

    Args:
        config: megatron-core's configuration of the whole language model.
        run: ours; without a head over the vocabulary the last chunk ends in hidden states.
        chunk: which layers are built.
        kernels: of the layers.
        groups: process groups.
        vp_stage: index of the model chunk on its rank; none if the rank has one.

    With added tokens, the table of embeddings and the head have rows for the other tokens alone.

    Attributes:
        loss_positions: int64 [P], where head and loss are computed in the next forward pass;
            none: everywhere.
        token_positions: int64 [T], see ``Batch.positions``, for the next forward pass.
        rotary_positions: int64 [3, T], see ``Batch.rotary_positions``, for the next forward pass.
    """

    def __init__(
        self,
        config: TransformerConfig,
        run: Config,
        chunk: Chunk,
        kernels: Kernels,
        groups: ProcessGroupCollection,
        vp_stage: int | None,
    ):
        architecture = run.architecture
        language = architecture.language
        super().__init__(
            config=config,
            transformer_layer_spec=language_spec(
                chunk.language_layers, architecture, kernels, run.experts
            ),
            vocab_size=padded_vocabulary(language.vocab_size),
            max_sequence_length=language.position_rows,
            pre_process=chunk.has_connector,
            post_process=chunk.has_head,
            share_embeddings_and_output_weights=language.tied_head,
            position_embedding_type="learned_absolute"
            if language.has_learned_positions
            else "rope",
            rotary_base=language.rotary_base,
            rotary_percent=language.rotary_percent,
            scatter_embedding_sequence_parallel=False,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        prepare_dispatchers(self)
        self._prepare_positions(language)
        self.embedding_scale = 1.0
        if language.scaled_embedding:
            # Rounded to the dtype of the embeddings, as in transformers.
            scale = torch.tensor(language.hidden_size**0.5, dtype=config.params_dtype)
            self.embedding_scale = float(scale)
        self.cross_entropy = kernels.cross_entropy
        self.loss_positions: Tensor | None = None
        if self.post_process and not architecture.needs.has_vocabulary_head:
            # GPTModel returns hidden states if it is told that another chunk has the head; its
            # layers have been built with the final norm.
            self.post_process = False
            del self.output_layer
        self.real_words = language.vocab_size
        rows = self.vocab_size // groups.tp.size()
        self.real_rows = min(max(language.vocab_size - rows * groups.tp.rank(), 0), rows)
        self.added_embedding = self.added_head = None
        if architecture.added_tokens:
            self._add_tokens(architecture.added_tokens, architecture.table_rows)
        self.softcap = language.final_softcap
        if self.post_process and self.softcap:
            # Called by GPTModel for the logits.
            self.output_layer.forward = partial(self._capped, self.output_layer.forward)
        self.loss_terms: LossTerms | None = None
        self.ends_in_loss = False
        if self.post_process:
            self._gather_before_head(groups)
            if run.loss.is_by_block:
                self._take_loss_terms(run.loss, rows)

    def _prepare_positions(self, language: Language) -> None:
        """Make positions what the language model has, and those that a pass gives."""
        self.token_positions: Tensor | None = None
        self.has_learned_positions = language.has_learned_positions
        self.unused_positions = language.unused_positions
        if self.pre_process and language.has_learned_positions:
            # megatron-core makes them in float32, whatever params_dtype says.
            self.embedding.position_embeddings.to(self.config.params_dtype)
        if language.rotary_yarn_factor > 1:
            self.rotary_pos_emb.inv_freq = frequencies(language)
        self.rotary_positions: Tensor | None = None
        if language.rotary_sections:
            # GPTModel calls it for the angles of its tokens.
            self.rotary_pos_emb.forward = partial(self._section_angles, language)
        elif not language.has_learned_positions:
            # megatron-core keeps angles in a cache of the class, whose keys hold the module and, by
            # its hook, this model: it would stay in memory after its run.
            rotary = self.rotary_pos_emb
            angles = partial(type(rotary).forward.__wrapped__, rotary)
            rotary.forward = lru_cache(_ANGLES_KEPT)(angles)
            # GPTModel calls it for the angles of its tokens.
            rotary.register_forward_hook(self._at_positions)

    def _section_angles(self, language: Language, *args, **kwargs) -> Tensor:
        """Return the angles of this rank's tokens [T, 1, 1, head size], whatever megatron-core asks
        for.
        """
        frequencies = self.rotary_pos_emb.inv_freq.to(self.rotary_positions.device)
        return section_angles(
            self.rotary_positions,
            frequencies,
            language.rotary_sections,
            interleaved=language.rotary_interleaved,
        )

    def _take_loss_terms(self, loss: Loss, rows: int) -> None:
        """Let the loss project hidden states itself, block by block; this rank has ``rows`` rows of
        the head.
        """
        self.loss_terms = LossTerms(
            block=loss.vocabulary_block or rows,
            rows=self.real_rows,
            first_row=rows * self.pg_collection.tp.rank(),
            vocabulary=self.real_words,
            smoothing=loss.label_smoothing,
            z_loss=loss.z_loss,
            softcap=self.softcap,
        )
        # Called by GPTModel, which gives the result to ``compute_language_model_loss``.
        self.output_layer.forward = partial(self._project, self.output_layer.forward)

    def _add_tokens(self, count: int, first: int) -> None:
        """Make rows of embedding and head for added tokens, where the chunk has either."""
        if self.pre_process:
            self.added_embedding = AddedEmbedding(self.config, count, first)
        if self.post_process:
            self.added_head = AddedHead(self.config, count, first, self.pg_collection.tp)
            # Called by GPTModel for the logits.
            self.output_layer.forward = partial(self._with_added, self.output_layer.forward)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed the tokens of a pack: int64 [T] -> [T, 1, D], without learned positions."""
        if self.has_learned_positions:
            embeddings = self.embedding.word_embeddings(tokens[:, None])
        else:
            embeddings = self.embedding(input_ids=tokens[None], position_ids=None)
        if self.added_embedding is not None:
            embeddings = self.added_embedding(tokens, embeddings)
        return embeddings if self.embedding_scale == 1 else embeddings * self.embedding_scale

    def add_positions(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Add learned positions, if the model has them, to tokens and image features alike.

        Args:
            hidden: what enters the first layer [T + R, 1, D]; the last R rows get no positions.
            batch: the pack.
        """
        if not self.has_learned_positions:
            return hidden
        tokens = len(batch.tokens)
        if batch.positions is None:
            rows = self.position_ids(batch.sample_ends, tokens)
        else:
            rows = self.unused_positions + batch.positions[None]
        positions = self.embedding.position_embeddings(rows).transpose(0, 1)
        return torch.cat([hidden[:tokens] + positions, hidden[tokens:]])

    def position_ids(self, sample_ends: Tensor, tokens: int) -> Tensor:
        """Return the row of each token in the table of positions [1, T].

        Args:
            sample_ends: where samples end in the whole pack [N + 1].
            tokens: T, of this rank.
        """
        rank = self.pg_collection.cp.rank()
        ranks = self.pg_collection.cp.size()
        own_ends = sample_ends // ranks
        offsets = torch.arange(tokens, device=sample_ends.device)
        sample = torch.searchsorted(own_ends, offsets, right=True) - 1
        offsets = offsets - own_ends[sample]
        # Context-parallel ranks have the r-th piece of a sample from the front and from the back,
        # see ``RankSlice.tokens``.
        piece = sample_ends.diff()[sample] // (2 * ranks)
        skipped = torch.where(offsets < piece, rank, 2 * ranks - 2 - rank) * piece
        rows = self.unused_positions + offsets + (skipped if ranks > 1 else 0)
        # The padding at the end may be longer than any sample.
        return rows.clamp(max=self.max_position_embeddings - 1)[None]

    def _at_positions(self, rotary: Module, inputs: tuple, angles: Tensor) -> Tensor:
        """Choose the angles of new tokens; called by torch behind the rotary embedding's forward.

        Args:
            rotary: the rotary embedding.
            inputs: of its forward.
            angles: of each place in a sample [longest sample, 1, 1, rotated width].

        Returns:
            [T * context-parallel ranks, 1, 1, rotated width], if ``token_positions`` are given
        """
        if self.token_positions is None:
            return angles
        own = angles.index_select(0, self.token_positions)
        ranks = self.pg_collection.cp.size()
        if ranks == 1:
            return own
        # All ranks have the same tokens; each takes a piece from the front and one from the back.
        front, back = own.chunk(2)
        return torch.cat([front.repeat(ranks, 1, 1, 1), back.repeat(ranks, 1, 1, 1)])

    def setup_embeddings_and_output_layer(self) -> None:
        """Mark embedding and head as megatron-core looks for them; called by GPTModel.

        Its own version takes the token embedding to stand in the first chunk of the pipeline. Here
        it stands behind the vision encoder. Where a tied head stands in another chunk, both are
        copies, whose gradients ``model/tied`` sums; one of them counts in the norm of the gradient.
        They start equal because both are filled from one tensor.
        """
        tied = self.share_embeddings_and_output_weights
        if self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        if self.post_process and not (tied and self.pre_process):
            self.output_layer.weight.is_embedding_or_output_parameter = True
        if not tied:
            return
        weight = self.shared_embedding_or_output_weight()
        if self.pre_process and self.post_process:
            weight.zero_out_wgrad = True
            return
        if dist.get_rank() not in dist.get_process_group_ranks(self.embd_group):
            raise ValueError(
                "token embedding and tied head must stand on ranks of the embedding group"
            )
        weight.shared_embedding = True
        if self.post_process:
            weight.shared = True

    def _gather_before_head(self, groups: ProcessGroupCollection) -> None:
        """Let a hook bring together the tokens of all tensor-parallel ranks and choose among them.

        The head would gather them itself under sequence parallelism, and then multiply all.
        """
        self.scattered_over = groups.tp if self.output_layer.sequence_parallel else None
        if self.scattered_over is not None:
            self.output_layer.sequence_parallel = False
            # The backward pass of the gathering sums the gradients of the hidden states.
            self.output_layer.disable_grad_reduce = True
        self.output_layer.register_forward_pre_hook(self._choose)

    def forward(self, *args, labels: Tensor | None = None, **kwargs) -> Tensor:
        """Run the chunk; see GPTModel."""
        self.ends_in_loss = labels is not None
        return super().forward(*args, labels=labels, **kwargs)

    def _with_added(
        self, plain: Callable[..., tuple], hidden: Tensor, weight: Tensor | None = None, **options
    ) -> tuple[Tensor, Tensor | None]:
        """Compute logits, those of added tokens from rows of their own: hidden states [P, 1, D] ->
        this rank's share [P, 1, padded V / tensor-parallel ranks].
        """
        logits, bias = plain(hidden, weight=weight, **options)
        return self.added_head(hidden, logits, self.scattered_over is None), bias

    def _capped(
        self, plain: Callable[..., tuple], hidden: Tensor, weight: Tensor | None = None, **options
    ) -> tuple[Tensor, Tensor | None]:
        """Compute logits with their soft cap; shapes as of ``_with_added``."""
        logits, bias = plain(hidden, weight=weight, **options)
        return capped(logits, self.softcap), bias

    def _project(
        self, plain: Callable[..., tuple], hidden: Tensor, weight: Tensor | None = None, **options
    ) -> tuple[Tensor, Tensor | None]:
        """Leave the hidden states as they are if the loss projects them itself."""
        if self.ends_in_loss:
            return hidden, None
        return plain(hidden, weight=weight, **options)

    def _loss_by_block(self, hidden: Tensor, labels: Tensor, terms: LossTerms) -> Tensor:
        """Return the losses [1, P] of hidden states [P, 1, D] and labels [P, 1]."""
        if not self.training:
            terms = replace(terms, smoothing=0.0, z_loss=0.0)
        head = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            head = self.shared_embedding_or_output_weight()
        return vocabulary_loss(
            hidden[:, 0],
            head,
            labels[:, 0],
            terms,
            self.pg_collection.tp,
            sums_gradient=self.scattered_over is None,
        )[None]

    def _choose(self, head: Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Choose the hidden states that have a loss; called by torch before the head's forward.

        Args:
            head: the output layer.
            inputs: hidden states [T or T / tensor-parallel ranks, 1, D].

        Returns:
            hidden states [P or T, 1, D]
        """
        (hidden,) = inputs
        if self.scattered_over is not None:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.scattered_over
            )
        positions = self.loss_positions
        return (hidden if positions is None else hidden.index_select(0, positions),)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Compute the cross-entropy over the vocabulary without its padding.

        Called by GPTModel.

        Args:
            labels: [1, T]
            logits: this rank's share [P or T, 1, padded V / tensor-parallel ranks]; hidden states
                [P or T, 1, D] if the loss projects them itself

        Returns:
            [1, T], 0 where no loss is computed
        """
        positions = self.loss_positions
        # Not a transpose: its stride of T in a dimension of one is what Transformer Engine's kernel
        # would step by.
        wanted = labels.reshape(-1, 1) if positions is None else labels[0, positions, None]
        if self.loss_terms is not None:
            losses = self._loss_by_block(logits, wanted, self.loss_terms)
        else:
            losses = self._loss_of_logits(logits, wanted)
        if positions is None:
            return losses
        return losses.new_zeros(labels.shape).index_copy(1, positions, losses)

    def _loss_of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the losses [1, P] of logits [P, 1, V] and labels [P, 1]."""
        if self.real_rows < logits.shape[-1]:
            # Detached: the gradient of the padding is zero as it is, and autograd would copy all
            # logits to write that down.
            logits.detach()[..., self.real_rows :] = float("-inf")
        return self.cross_entropy(logits, labels, self.pg_collection.tp).T
