"""Communication volume: bytes that a rank sends, by kind of parallelism.

Tensor parallelism is in ``planner/tensor_parallel``. Context parallelism gathers keys and values in
every layer, and reduce-scatters their gradients. Expert parallelism sends each token to its experts
and back, and the gradients likewise. Data-parallel replicas sum gradients and gather what was
updated; some losses gather what they contrast.
"""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.config.freeze_mask import trains
from megavlm.config.schema import Config
from megavlm.planner.activations import NUMBER_BYTES, boundary_elements, has_backward
from megavlm.planner.layout import Chunk, Layout
from megavlm.planner.memory import sharing_ranks
from megavlm.planner.parameters import ParameterCounts, parameters_on_rank, replicated_head
from megavlm.planner.rank_load import RankLoad
from megavlm.planner.tensor_parallel import sent_to_tensor_ranks

_GRADIENT = 4
_ROUTER = 4


@dataclass(frozen=True, kw_only=True)
class CommunicationVolume:
    """Bytes that a rank sends.

    Args:
        tensor: to tensor-parallel ranks.
        context: to context-parallel ranks.
        pipeline: to the previous and next pipeline stage.
        data: to data-parallel replicas.
        expert: to expert-parallel ranks.
    """

    tensor: float = 0.0
    context: float = 0.0
    pipeline: float = 0.0
    data: float = 0.0
    expert: float = 0.0

    def __add__(self, other: CommunicationVolume) -> CommunicationVolume:
        sums = {kind: sent + vars(other)[kind] for kind, sent in vars(self).items()}
        return CommunicationVolume(**sums)

    def __mul__(self, times: float) -> CommunicationVolume:
        return CommunicationVolume(**{kind: sent * times for kind, sent in vars(self).items()})


def communication_per_microbatch(
    config: Config,
    layout: Layout,
    number: int,
    capacity: int,
    tiles: float,
    supervised: float | None = None,
    image_tiles: float = 0.0,
) -> CommunicationVolume:
    """Estimate what a rank sends for one microbatch's forward and backward pass through one of its
    chunks; without anything trained, for the forward pass alone.

    Args:
        config: the run.
        layout: layers of every chunk.
        number: of the chunk.
        capacity: tokens of a pack, with padding.
        tiles: tiles of a pack, on average.
        supervised: tokens of a pack that the head runs on, on average; none: all.
        image_tiles: of an image, if each rank has whole images; 0: ranks share tiles.
    """
    chunk = layout.chunks[number]
    load = RankLoad.mean(config.parallel, capacity, tiles, supervised, image_tiles)
    size = NUMBER_BYTES[config.training.precision]
    return CommunicationVolume(
        tensor=size * sent_to_tensor_ranks(config, chunk, load),
        context=size * _context(config, chunk, capacity, load),
        pipeline=size * _pipeline(config, layout, number, load),
        expert=_expert(config, chunk, load),
    )


def communication_per_step(
    config: Config, layout: Layout, rank: int, data_ranks: int, tiles: float = 0.0
) -> CommunicationVolume:
    """Estimate what a pipeline rank sends once a step: gradients and updated parameters, and what
    the loss contrasts.

    Args:
        config: the run.
        layout: layers of every chunk.
        rank: pipeline rank.
        data_ranks: data-parallel replicas.
        tiles: tiles of a pack, on average; a pair has one.
    """
    parallel = config.parallel
    held = _held(config, layout, rank)
    tensor = parallel.tensor_model_parallel_size
    ranks = parallel.pipeline_model_parallel_size
    with_copies = {chunk % ranks for chunk in (layout.embedding_chunk, len(layout.chunks) - 1)}
    sums_copies = len(with_copies) > 1 and rank in with_copies
    of_step = CommunicationVolume(
        tensor=2 * (tensor - 1) / tensor * _GRADIENT * held.trained_replicas,
        pipeline=float(_GRADIENT * replicated_head(config, layout.chunks) * sums_copies),
        data=sum(synchronised_per_step(config, layout, rank, data_ranks)),
    )
    if rank == ranks - 1:
        of_step += CommunicationVolume(data=_contrasted(config, data_ranks, tiles))
    return of_step + _muon(config, held, *sharing_ranks(config, data_ranks))


def synchronised_per_step(
    config: Config, layout: Layout, rank: int, data_ranks: int
) -> tuple[float, float]:
    """Count the bytes that a pipeline rank sends to its data-parallel replicas of gradients, which
    are summed in float32, and of updated parameters; arguments as for ``communication_per_step``.
    """
    held = _held(config, layout, rank)
    sharing, of_experts = sharing_ranks(config, data_ranks)
    dense = held.trained - held.trained_experts
    sent = dense * (sharing - 1) / sharing
    sent += held.trained_experts * (of_experts - 1) / of_experts
    # Behind the update the optimizer of experts and that of all else gather everything, each.
    is_twice = dense and held.trained_experts and not config.parallel.overlap_param_gather
    times = 2 if is_twice else 1
    return _GRADIENT * sent, times * NUMBER_BYTES[config.training.precision] * sent


def _held(config: Config, layout: Layout, rank: int) -> ParameterCounts:
    """Count the parameters of a pipeline rank."""
    own = layout.chunks[rank :: config.parallel.pipeline_model_parallel_size]
    return sum((parameters_on_rank(config, chunk) for chunk in own), ParameterCounts())


def _contrasted(config: Config, data_ranks: int, tiles: float) -> float:
    """Count the bytes that a rank sends of its pairs, for a loss that contrasts those of all."""
    arch = config.architecture
    size = NUMBER_BYTES[config.training.precision]
    of_pair = arch.needs.gathered_bytes(arch, config.training.trainable, size)
    pairs = tiles * config.training.global_batch_size
    return (data_ranks - 1) / data_ranks * pairs * of_pair


def _muon(
    config: Config, held: ParameterCounts, sharing: int, of_experts: int
) -> CommunicationVolume:
    """Count what Muon sends: the momentum of each matrix to the rank that makes its update, pieces
    of the update back, and before that the parts that tensor-parallel ranks have.

    Args:
        config: the run.
        held: parameters on the rank.
        sharing, of_experts: see ``sharing_ranks``.
    """
    if config.optimizer.kind != "muon":
        return CommunicationVolume()
    dense = held.trained_by_muon / sharing
    experts = held.trained_experts_by_muon / of_experts
    moved = dense * (sharing - 1) / sharing + experts * (of_experts - 1) / of_experts
    others = config.parallel.tensor_model_parallel_size - 1
    whole = _GRADIENT * others * held.cut_by_muon / sharing
    return CommunicationVolume(tensor=whole, data=2 * _GRADIENT * moved)


def _context(config: Config, chunk: Chunk, capacity: int, load: RankLoad) -> float:
    """Count the elements that context parallelism sends per microbatch."""
    arch = config.architecture
    parallel = config.parallel
    ranks = parallel.context_parallel_size
    language = arch.language
    heads = max(language.num_query_groups // parallel.tensor_model_parallel_size, 1)
    gathered = 2 * heads * language.head_size * capacity
    backward = has_backward(config)
    found = 0.0
    for layer in chunk.language_layers:
        again = parallel.recompute_of("language") == "full"
        found += gathered * (1 + (1 + again) * backward[arch.vision.num_layers + layer])
    if chunk.has_connector:
        features = parallel.tile_ranks * load.tiles * arch.features_per_tile
        has_gradient = any(
            trains(one, config.training.trainable) for one in ("vision", "connector")
        )
        found += features * arch.needs.connector_output(arch) * (2 if has_gradient else 1)
    return (ranks - 1) / ranks * found


def _expert(config: Config, chunk: Chunk, load: RankLoad) -> float:
    """Count the bytes that experts on several ranks send per microbatch, for tokens spread evenly:
    each token to the ranks of its experts, and to all ranks that share one, and back.
    """
    arch = config.architecture
    parallel = config.parallel
    language = arch.language
    ranks = parallel.expert_model_parallel_size
    shared = parallel.expert_tensor_parallel_size
    if not language.num_experts or ranks * shared == 1:
        return 0.0
    own = load.tokens / parallel.tensor_model_parallel_size
    size = NUMBER_BYTES[config.training.precision]
    if config.experts.dispatcher == "allgather":
        # The experts' outputs are summed over ranks in the dtype of the router's weights, of which
        # each token brings all.
        copies = float(ranks * shared - 1)
        token = (size + _ROUTER) * language.hidden_size + _ROUTER * language.num_experts
        mask = language.num_experts  # a byte that says whether it goes to an expert
    else:
        copies = language.experts_per_token * ((ranks - 1) / ranks + shared - 1)
        token = 2 * size * language.hidden_size + _ROUTER
        mask = 0
    again = parallel.recompute_of("language") != "none"
    backwards = has_backward(config)
    found = 0.0
    for layer in chunk.language_layers:
        backward = backwards[arch.vision.num_layers + layer]
        found += token * (1 + (1 + again) * backward) + mask * (1 + again * backward)
    return own * copies * found


def _pipeline(config: Config, layout: Layout, number: int, load: RankLoad) -> float:
    """Count the elements of the output sent forward, and of the gradient sent back if anything
    before the chunk is trained.
    """
    trained = [bool(parameters_on_rank(config, chunk).trained) for chunk in layout.chunks]
    first_trained = trained.index(True) if any(trained) else len(trained)
    sent = (
        boundary_elements(config, layout.chunks[number], load)
        if number + 1 < len(layout.chunks)
        else 0.0
    )
    returned = (
        boundary_elements(config, layout.chunks[number - 1], load)
        if first_trained < number
        else 0.0
    )
    return sent + returned
