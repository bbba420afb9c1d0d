"""What a model is trained to do: the protocol of objectives.

Shape letters: T tokens of the pack, I tiles, F features of a tile, R rows that ride along, D hidden
size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn
from torch.func import functional_call

from megavlm.data.loading.batch import Batch
from megavlm.model.objective.losses import Losses
from megavlm.model.objective.stand_ins import read_for

Output = Tensor | tuple[Tensor, ...]
"""What the last chunk ends in."""


class Objective(MegatronModule):
    """A part of every chunk of the model; what it needs is a row of ``config/objectives``.

    For each pack of a step, in this order:

    1. ``fuse``, in the chunk with the connector: tokens and image features become what enters the
       language model, [T + R, 1, D].
    2. ``riding_rows``, in every chunk of the language model: R, the rows behind the tokens that
       travel from chunk to chunk, and which the layers do not see.
    3. ``forward``, in the last chunk, where the objective's own layers stand if there are any.
       Without a language model the connector stands there too, and the objective runs it.
    4. ``losses``, on ranks with the last chunk: the losses of the pack's tokens, [T]. If a loss
       depends on other packs (``spans_step``), ``step_losses`` takes its place, which
       ``train/whole_step`` calls for ``packs_at_once`` packs together.

    After the optimizer's update, or if it is skipped: ``after_step``, in every chunk.

    Attributes:
        spans_step: whether a loss depends on all samples of a step, see ``ObjectiveNeeds``. The
            step then runs ``train/whole_step``, which calls ``step_losses``.
        embeds_pairs: whether the last chunk ends in an embedding of each image and each text,
            [2, n, E] of length one, among which ``train/retrieval`` searches.
    """

    spans_step = False
    embeds_pairs = False
    _stand_ins: Mapping[nn.Parameter, Tensor] = MappingProxyType({})

    def take_connector(self, connector: nn.Module) -> None:
        """Take the connector of a model without a language model; called when the last chunk is
        built.
        """
        # Not as a submodule: its parameters are the chunk's already.
        self._connector = (connector,)

    @property
    def connector(self) -> nn.Module:
        """The connector, in the last chunk of a model without a language model."""
        return self._connector[0]

    def fuse(self, embeddings: Tensor, features: Tensor, batch: Batch) -> Tensor:
        """Bring tokens and images together.

        Args:
            embeddings: of the tokens [T, 1, D].
            features: of the whole pack, from the connector [I * F, 1, its output size].
            batch: the pack.

        Returns:
            [T + R, 1, D], what enters the first layer of the language model.
        """
        raise NotImplementedError(f"{type(self).__name__} has no language model")

    def riding_rows(self, batch: Batch) -> int:
        """Return R, the rows that go from chunk to chunk behind the tokens of a pack."""
        return 0

    def forward(self, output: Tensor, riding: Tensor | None, batch: Batch) -> Output:
        """End the last chunk. It is called as a module, so that DDP gathers the objective's own
        parameters before.

        Args:
            output: of the language model: losses of the tokens [1, T] or logits [1, T, V] if the
                objective has the vocabulary head, else hidden states [T, 1, D]. Without a language
                model: of the vision encoder, hidden states [N, I, D] of N tokens a tile.
            riding: what rode along [R, 1, D]; none if R is 0.
            batch: the pack.

        Returns:
            What ``losses`` takes.
        """
        return output[0]

    def losses(self, output: Tensor, batch: Batch) -> Losses:
        """Return the losses of each token [T], from what the last chunk ended in.

        The loss of the step is the sum of their totals, weighed by ``Batch.loss_weights``, over the
        sum of all weights of the step; data-parallel and context-parallel ranks add up their parts.
        Meters see the losses of the tokens, so every objective is logged by source too, and each
        named loss apart.
        """
        return Losses(total=output)

    def packs_at_once(self, packs: int) -> int:
        """Return for how many packs of this rank ``step_losses`` is called at once.

        Args:
            packs: of this rank in a step.
        """
        return packs

    @property
    def loss_parameters(self) -> list[nn.Parameter]:
        """The trained parameters that ``step_losses`` reads."""
        return []

    @contextmanager
    def gradients_to(self, stand_ins: Sequence[Tensor]) -> Iterator[None]:
        """Give the gradients of ``loss_parameters`` to float32 tensors of their shapes, inside the
        context, so that those of several packs are summed in float32. ``train/whole_step`` computes
        the losses of ``step_losses``, and takes their gradients, in it; ``step_losses`` must read
        its parameters by ``values_of`` and ``call``.
        """
        self._stand_ins = dict(zip(self.loss_parameters, stand_ins, strict=True))
        yield
        self._stand_ins = {}

    def values_of(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's values; see ``gradients_to`` for where their gradient goes."""
        stand_in = self._stand_ins.get(parameter)
        return parameter if stand_in is None else read_for(stand_in, parameter)

    def call(self, module: nn.Module, *inputs: Tensor, **options: Tensor) -> Tensor:
        """Call a module that ``step_losses`` needs, its parameters as of ``values_of``."""
        if not self._stand_ins:
            return module(*inputs, **options)
        parameters = {name: self.values_of(one) for name, one in module.named_parameters()}
        return functional_call(module, parameters, inputs, options)

    def step_losses(
        self,
        outputs: Sequence[Output],
        batches: Sequence[Batch],
        samples: Sequence[Sequence[int]],
    ) -> list[Losses]:
        """Return the losses of the tokens of each pack of this rank, if they depend on the whole
        step. Collective over the data-parallel ranks.

        Args:
            outputs: what the last chunk ended in, for each pack.
            batches: the packs.
            samples: of each pack of each data-parallel rank.

        Returns:
            The losses of each pack's tokens [T], in the order of the packs.
        """
        raise NotImplementedError(f"{type(self).__name__} has a loss for each pack alone")

    def after_step(self, is_skipped: bool) -> None:
        """Change what an update has changed, such as keep a parameter inside its bounds, or take
        what the step has told. Collective over the ranks with this chunk; nobody waits for the
        device.

        Args:
            is_skipped: whether there was no update.
        """

    def state(self) -> Mapping[str, Tensor]:
        """Return what this chunk remembers of earlier steps, by name: tensors that are the same on
        all ranks with the chunk, for ``train/objective_state``.
        """
        return {}


@torch.no_grad()
def keep_inside(
    parameter: nn.Parameter | None, *, least: float | None = None, most: float | None = None
) -> None:
    """Keep a trained parameter inside its bounds, in the optimizer's float32 copy too, which
    would go on beyond them otherwise.

    Args:
        parameter: none: it stands in another chunk.
        least, most: the bounds; none: there is none.
    """
    if parameter is None or not parameter.requires_grad:
        return
    master = vars(parameter).get("main_param")  # set by DistributedOptimizer
    for values in (parameter, master):
        if values is not None:
            values.clamp_(min=least, max=most)


def of_tokens(losses: Tensor, batch: Batch) -> Tensor:
    """Give every token of a pack [T] the loss of its sample; the padding gets any."""
    positions = torch.arange(len(batch.tokens), device=losses.device)
    pairs = torch.searchsorted(batch.sample_ends, positions, right=True) - 1
    return losses[pairs.clamp(max=len(losses) - 1)]
