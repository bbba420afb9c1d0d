"""The language model: megatron-core's GPTModel, with a vocabulary padded so that it divides over
ranks.
"""

from __future__ import annotations

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megavlm.config.schema import Language
from megavlm.model.specs import Kernels, language_spec
from megavlm.planner.layout import Chunk
from megavlm.planner.padding import padded_vocabulary


class LanguageModel(GPTModel):
    """The layers of the language model that stand in one chunk, with token embedding and head where
    the chunk has them.

    Args:
        config: megatron-core's configuration of the whole language model.
        language: ours.
        chunk: which layers are built.
        chosen: kernels of the layers.
        groups: process groups.
        turn: which of its rank's chunks it is, where a rank has several.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language: Language,
        chunk: Chunk,
        chosen: Kernels,
        groups: ProcessGroupCollection,
        turn: int | None,
    ):
        super().__init__(
            config=config,
            transformer_layer_spec=language_spec(len(chunk.language_layers), language, chosen),
            vocab_size=padded_vocabulary(language.vocab_size),
            max_sequence_length=language.max_position_embeddings,
            pre_process=chunk.has_connector,
            post_process=chunk.has_head,
            share_embeddings_and_output_weights=language.tied_head,
            position_embedding_type="rope",
            rotary_base=language.rotary_base,
            scatter_embedding_sequence_parallel=False,
            pg_collection=groups,
            vp_stage=turn,
        )
        self.cross_entropy = chosen.cross_entropy
        rows = self.vocab_size // groups.tp.size()
        self.real_rows = min(max(language.vocab_size - rows * groups.tp.rank(), 0), rows)

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

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy over the vocabulary without its padding.

        Args:
            labels: [1, T]
            logits: this rank's share [T, 1, padded V / tensor-parallel ranks]

        Returns:
            [1, T]
        """
        if self.real_rows < logits.shape[-1]:
            # Detached: the gradient of the padding is zero as it is, and autograd would copy all
            # logits to write that down.
            logits.detach()[..., self.real_rows :] = float("-inf")
        # Not a transpose: its stride of T in a dimension of one is what Transformer Engine's kernel
        # would step by.
        return self.cross_entropy(logits, labels.reshape(-1, 1), self.pg_collection.tp).T
