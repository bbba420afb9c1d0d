"""The vision-language model: one pipeline over all its layers, of which each rank holds a chunk or
several.

Shape letters: T tokens of the pack, I tiles, S pixels along a tile, N tokens of a tile in the
vision encoder, F features of a tile, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megavlm.config.cross_attention import memory_rows
from megavlm.config.schema import Config
from megavlm.data.loading.batch import Batch
from megavlm.model.attention import PackedSamples
from megavlm.model.connector import build_connector
from megavlm.model.deepstack import as_levels
from megavlm.model.expert_adapters import attach_to_experts
from megavlm.model.fusion import as_rows, from_rows, place_newlines
from megavlm.model.kernels import Kernels, choose_kernels
from megavlm.model.language import LanguageModel
from megavlm.model.lora import LowRankAdapter, attach
from megavlm.model.lora_dropout import begin_pack
from megavlm.model.native_vision import NativeVisionEncoder
from megavlm.model.objective import build_objective
from megavlm.model.patches import Patches
from megavlm.model.recompute import ask_for_gradient
from megavlm.model.router import routers_of
from megavlm.model.transformer import language_config, vision_config
from megavlm.model.vision import VisionEncoder
from megavlm.parallel.process_groups import Groups
from megavlm.parallel.vision_parallel import (
    average_gradients,
    gather_features,
    gather_tiles,
    holds_whole_layers,
    mark_copies,
    save_once,
    sum_gradients,
)
from megavlm.planner.layout import Chunk, Layout

_NOTHING = (1, 1, 1)
"""Shape of what chunks send in place of hidden states of tiles if there are none."""


class VisionLanguageModel(MegatronModule):
    """A chunk of the model, one of those that stand on this rank.

    Args:
        config: the run.
        layout: layers of every chunk.
        groups: process groups of this rank.
        number: of the chunk; by default that of this rank's first.
    """

    def __init__(self, config: Config, layout: Layout, groups: Groups, number: int | None = None):
        number = groups.pipeline_rank if number is None else number
        chunk = layout.chunks[number]
        kernels = choose_kernels(config)
        arch = config.architecture
        settings = (language_config if arch.language.exists else vision_config)(
            config, layout, kernels
        )
        super().__init__(settings)
        # The pipeline schedules of megatron-core ask a chunk for these.
        has_several = config.parallel.virtual_pipeline_model_parallel_size > 1
        self.vp_stage = number // groups.pipeline_size if has_several else None
        self.model_type = ModelType.encoder_or_decoder
        self.input_tensor = None
        self.pre_process = chunk.has_patch_embedding
        self.post_process = chunk.has_head
        # megatron-core would sum gradients of tied weights at the pipeline's ends only.
        self.share_embeddings_and_output_weights = False
        self.number = number
        self.chunk = chunk
        self.architecture = arch
        self.chooses_loss_positions = config.training.head_tokens == "supervised"
        self.groups = groups

        self.connector = self.language = None
        # Set by the freeze mask: whether anything in the vision encoder is trained, the first chunk
        # that trains anything, and whether any rank trains an expert that this chunk shares.
        self.trains_vision = True
        self.first_trained = 0
        self.shares_trained_experts = False
        collection = groups.collection
        self.vision = self._vision(config, layout, chunk, kernels)
        if chunk.has_connector:
            self.connector = build_connector(config, kernels, groups.vision)
        # Parts of which every tensor-parallel rank has a copy, for tiles of its own.
        self.copies = []
        if holds_whole_layers(groups):
            self.copies = [part for part in (self.vision, self.connector) if part is not None]
        for part in self.copies:
            mark_copies(part)
        if self.connector in self.copies and not arch.language.exists:
            # It then sees the tiles of all ranks, so that each of them has its whole gradient.
            self.copies.remove(self.connector)
        if chunk.has_language:
            self.language = LanguageModel(
                self.config, config, chunk, kernels, collection, self.vp_stage
            )
            stack = "language.decoder.layers"
            attach(self.language, stack, arch, self.config, collection.tp)
            attach_to_experts(self.language, stack, arch)
        self.routers = tuple(routers_of(self))
        self.objective = build_objective(self.config, config, chunk, kernels, groups)
        if not arch.language.exists and chunk.has_connector:
            self.objective.take_connector(self.connector)

    def _vision(
        self, config: Config, layout: Layout, chunk: Chunk, kernels: Kernels
    ) -> VisionEncoder | NativeVisionEncoder | Patches | None:
        """Build this chunk's part of the vision encoder, or what cuts patches if there is none."""
        arch = config.architecture
        if not arch.vision.exists:
            is_first = chunk.has_patch_embedding
            return Patches(arch.vision, kernels, self.config.params_dtype) if is_first else None
        if not (chunk.has_patch_embedding or chunk.vision_layers):
            return None
        groups = self.groups.vision
        encoder = vision_config(config, layout, kernels)
        if arch.vision.spans_tiles:
            vision = NativeVisionEncoder(
                encoder, arch.vision, chunk, kernels, groups, self.vp_stage
            )
        else:
            drop_path = config.training.highest_drop_path
            vision = VisionEncoder(
                encoder, arch.vision, chunk, drop_path, kernels, groups, self.vp_stage
            )
        tile_rank = self.groups.rank_slice.tile_rank
        attach(vision, "vision.encoder.layers", arch, encoder, groups.tp, tile_rank)
        return vision

    def set_input_tensor(self, received: Tensor | list[Tensor]) -> None:
        """Take what the chunk before sent; called by the schedule."""
        received = received[0] if isinstance(received, list) else received
        trains_before = self.first_trained < self.number
        # What arrives asks for a gradient, whether or not anything that is trained has made it.
        self.input_tensor = received if received is None or trains_before else received.detach()

    def set_drop_path(self, share: float) -> None:
        """Use this share of the highest drop path rate from now on."""
        if self.vision is not None:
            self.vision.drop_path_share = share

    def received_shape(self, batch: Batch) -> tuple[int, int, int]:
        """Shape of what the chunk before sends for a pack."""
        if self.vision is not None or self.connector is not None:
            if batch.positions is not None:
                return _NOTHING
            vision = self.architecture.vision
            if vision.spans_tiles:
                outputs = 1 + vision.outputs_before(self.chunk.vision_layers.start)
                return outputs * vision.tokens * batch.num_tiles, 1, vision.hidden_size
            tokens = vision.tokens if batch.kept_patches is None else vision.layer_tokens
            return tokens, batch.num_tiles, vision.hidden_size
        rows = self._tokens(batch) * (1 + self._levels(batch)) + self.objective.riding_rows(batch)
        return rows + self._memory_rows(batch), 1, self.config.hidden_size

    def _tokens(self, batch: Batch) -> int:
        """Return how many tokens the layers of the language model have on this rank."""
        ranks = self.groups.tensor_size if self.config.sequence_parallel else 1
        return len(batch.tokens) // ranks

    def _memory_rows(self, batch: Batch) -> int:
        """Return the rows that go from chunk to chunk behind all others: the features of all tiles
        of the pack, for cross-attention.
        """
        return memory_rows(self.architecture, self._all_tiles(batch))

    def _levels(self, batch: Batch) -> int:
        """Return how many levels of features its layers and those of later chunks add."""
        if batch.positions is not None or not self.chunk.has_language:
            return 0
        return self.architecture.vision.levels_from(self.chunk.language_layers.start)

    def _all_tiles(self, batch: Batch) -> int:
        return batch.num_tiles * self.groups.rank_slice.tile_ranks

    @property
    def tied_weight(self) -> Tensor | None:
        """This chunk's copy of the token embedding that is also the head; none where they are not
        one, or not here.
        """
        is_tied = self.architecture.language.tied_head and self.language is not None
        return self.language.shared_embedding_or_output_weight() if is_tied else None

    def sharded_state_dict(self, prefix: str = "", *args, **kwargs) -> ShardedStateDict:
        """Describe the weights of this rank by name; ``train/checkpoint`` calls this to save and
        load them.
        """
        entries = super().sharded_state_dict(prefix, *args, **kwargs)
        for name, module in self.named_modules():
            if isinstance(module, LowRankAdapter):
                entries |= module.sharded(entries, f"{prefix}{name}.")
        if not holds_whole_layers(self.groups):
            return entries
        of_copies = {
            key: entry
            for key, entry in entries.items()
            if key.startswith((f"{prefix}vision.", f"{prefix}connector."))
        }
        return entries | save_once(of_copies, self.groups.tensor_rank)

    def finish_gradients(self) -> None:
        """Finish the gradients of weights of which each tensor-parallel rank has a copy.
        Collective.
        """
        newline = self.newline
        for part in self.copies:
            own = (parameter for parameter in part.parameters() if parameter is not newline)
            sum_gradients(own, self.groups)
        average_gradients(self._computed_alike(), self.groups)

    @property
    def newline(self) -> nn.Parameter | None:
        """The connector's embedding of the end of a row; none where there is none."""
        has_newline = self.architecture.connector.newline and self.connector is not None
        return self.connector.newline if has_newline else None

    def _computed_alike(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that every tensor-parallel rank uses alike: those of connectors that
        are not sharded, the embedding of the end of a row, and the rows of added tokens.
        """
        parts: list[nn.Module | None] = []
        is_whole = not self.architecture.connector_sizes.all_reduced_elements
        if is_whole and self.connector not in self.copies:
            parts.append(self.connector)
        elif self.newline is not None:
            yield self.newline
        if self.language is not None:
            parts += [self.language.added_embedding, self.language.added_head]
        for part in parts:
            if part is not None:
                yield from part.parameters()

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """Switch between training and evaluation, in which nothing is recomputed: megatron-core
        would do so for MLPs without looking.
        """
        super().train(mode)
        for layer in self.modules():
            if (
                isinstance(layer, TransformerLayer)
                and layer.config.recompute_granularity == "selective"
                and not layer.is_moe_layer
            ):
                layer.recompute_mlp = mode
        return self

    def forward(
        self, batch: Batch, with_loss: bool = True, only_loss_positions: bool = False
    ) -> Tensor:
        """Run this chunk on one pack.

        Args:
            batch: the pack.
            with_loss: end in losses, otherwise in logits.
            only_loss_positions: end in the logits of ``batch.loss_positions`` alone.

        Returns:
            The loss of every token [T], or logits [T or P, padded V / tensor-parallel ranks], from
                the last chunk; from others what the next chunk takes: [N, I, D] inside the vision
                encoder, [T, 1, D] inside the language model.
        """
        # Before the first chunk that trains anything there is no backward pass, and nothing is kept
        # for one.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.number >= self.first_trained):
            return self._run(batch, with_loss, only_loss_positions)

    def _run(self, batch: Batch, with_loss: bool, only_loss_positions: bool) -> Tensor:
        if self.architecture.lora.dropout:
            begin_pack(batch.draw)
        hidden = self.input_tensor
        if self.vision is not None:
            hidden = self._encode(hidden, batch)
        if self.post_process and self.language is None:
            return self.objective(gather_tiles(hidden, self.groups), None, batch)
        if self.connector is not None:
            hidden = self._fuse(hidden, batch)
        if self.language is not None:
            hidden = self._run_language(hidden, batch, with_loss, only_loss_positions)
        return hidden

    def _encode(self, received: Tensor | None, batch: Batch) -> Tensor:
        """Run this chunk's layers of the vision encoder, on what the chunk before sent or on the
        tiles -> [N, I, D]. Nothing is kept for a backward pass if nothing in them is trained.
        """
        if batch.positions is not None:
            return batch.tokens.new_zeros(_NOTHING, dtype=self.config.pipeline_dtype)
        draws = batch.drop_path_draws if self.trains_vision else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_vision):
            if self.architecture.vision.spans_tiles:
                return self.vision(received, batch.tiles, batch.images)
            return self.vision(received, batch.tiles, draws, batch.kept_patches)

    def _fuse(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Turn the tiles [N, I, D] into features, and put these among the embedded tokens -> [T, 1,
        D]. For cross-attention the features follow as rows of the same width, for DeepStack those
        of its levels, spread over the tokens.
        """
        fused = self.language.embed(batch.tokens)
        width = fused.shape[-1]
        features = None
        behind = []
        if batch.positions is None:
            read = self.architecture.connector.instruction_tokens > 0
            given = {"instructions": batch.instructions} if read else {}
            features = gather_features(self.connector(hidden, **given), self.groups)
            if levels := self._levels(batch):
                features, deep = features.split([width, levels * width], dim=-1)
                scatters = self.config.sequence_parallel
                behind = [as_levels(deep, batch, width, scatters)]
            fused = self.objective.fuse(fused, features, batch)
            if self.newline is not None:
                fused = place_newlines(fused, self.newline, batch)
        fused = self.language.add_positions(fused, batch)
        if self.config.sequence_parallel:
            fused = scatter_to_sequence_parallel_region(fused)
        if rows := self._memory_rows(batch):
            behind = [as_rows(features, rows, width)]
        return torch.cat([fused, *behind]) if behind else fused

    def _run_language(
        self, hidden: Tensor, batch: Batch, with_loss: bool, only_loss_positions: bool
    ) -> Tensor:
        """Run this chunk's layers of the language model [T, 1, D], and the objective behind the
        last. The rows behind the tokens, first those of the objective, then the features for
        cross-attention or DeepStack, pass the layers by.
        """
        shares = self.shares_trained_experts
        hidden = ask_for_gradient(hidden, self.config, helps_others=shares)
        received = memory = None
        if rows := self._memory_rows(batch):
            hidden, received = hidden.split([len(hidden) - rows, rows])
            features = self._all_tiles(batch) * self.architecture.features_per_tile
            memory = from_rows(received, features, self.architecture.memory_size)
        if levels := self._levels(batch):
            rows = levels * self._tokens(batch)
            hidden, memory = hidden.split([len(hidden) - rows, rows])
            received = memory[len(self.chunk.language_layers) * self._tokens(batch) :]
        riding = None
        if rows := self.objective.riding_rows(batch):
            hidden, riding = hidden.split([len(hidden) - rows, rows])
        self.language.set_input_tensor(hidden)
        packed = PackedSamples.of(
            batch,
            has_prefixes=self.architecture.prefix_lm,
            context_ranks=self.groups.context_size,
        )
        padding = self._padding(batch) if self.architecture.language.num_experts else {}
        has_head = self.architecture.needs.has_vocabulary_head
        chooses = self.chooses_loss_positions if with_loss else only_loss_positions
        self.language.loss_positions = batch.loss_positions if chooses else None
        self.language.token_positions = batch.positions
        self.language.rotary_positions = batch.rotary_positions
        output = self.language(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=hidden,
            labels=batch.labels[None] if with_loss and has_head else None,
            packed_seq_params=packed,
            **padding,
            extra_block_kwargs=None if memory is None else {"context": memory},
        )
        self.language.set_input_tensor(None)  # has a graph, which may hold the model
        if self.post_process:
            return self.objective(output, riding, batch)
        behind = [rows for rows in (riding, received) if rows is not None]
        return torch.cat([output, *behind]) if behind else output

    def _padding(self, batch: Batch) -> dict[str, Tensor]:
        """Return what tells routers which of this rank's tokens are padding [1, T]."""
        mask = batch.is_padding
        if self.config.sequence_parallel:
            mask = mask.chunk(self.groups.tensor_size)[self.groups.tensor_rank]
        return {"padding_mask": mask[None]}
