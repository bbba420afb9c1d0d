"""Communication volume: bytes that a rank sends, by kind of parallelism.

Tensor parallelism all-reduces activations twice in each layer forward, twice backward (Shoeybi et
al., arXiv 1909.08053); an all-reduce over a ring of k ranks sends every element 2 (k - 1) / k
times, and so do the all-gather and reduce-scatter that replace it with sequence parallelism (arXiv
2205.05198). With it a trained layer also gathers its inputs again in the backward pass. Context
parallelism gathers keys and values in every layer, and reduce-scatters their gradients. Expert
parallelism sends each token to its experts and back, and the gradients likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.config.cross_attention import memory_rows
from megavlm.config.freeze_mask import trains
from megavlm.config.schema import LAYER_PARTS, Config
from megavlm.planner.activations import NUMBER_BYTES, RankLoad, has_backward, keeps_inputs
from megavlm.planner.layout import Chunk, Layout
from megavlm.planner.memory import sharing_ranks
from megavlm.planner.parameters import ParameterCounts, parameters_on_rank, replicated_head

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
    config: Config, layout: Layout, number: int, capacity: int, tiles: float
) -> CommunicationVolume:
    """Estimate what a rank sends for one microbatch's forward and backward pass through one of its
    chunks.

    Args:
        config: the run.
        layout: layers of every chunk.
        number: of the chunk.
        capacity: tokens of a pack, with padding.
        tiles: tiles of a pack, on average.
    """
    chunk = layout.chunks[number]
    load = RankLoad.mean(config.parallel, capacity, tiles)
    size = NUMBER_BYTES[config.training.precision]
    return CommunicationVolume(
        tensor=size * _tensor(config, chunk, load),
        context=size * _context(config, chunk, capacity, load),
        pipeline=size * _pipeline(config, layout, number, load),
        expert=_expert(config, chunk, load),
    )


def communication_per_step(
    config: Config, layout: Layout, rank: int, data_ranks: int
) -> CommunicationVolume:
    """Estimate what a pipeline rank sends once a step: gradients and updated parameters."""
    parallel = config.parallel
    held = sum(
        (
            parameters_on_rank(config, chunk)
            for chunk in layout.chunks[rank :: parallel.pipeline_model_parallel_size]
        ),
        ParameterCounts(),
    )
    tensor = parallel.tensor_model_parallel_size
    number = _GRADIENT + NUMBER_BYTES[config.training.precision]
    sharing, of_experts = sharing_ranks(config, data_ranks)
    dense = (held.trained - held.trained_experts) * (sharing - 1) / sharing
    experts = held.trained_experts * (of_experts - 1) / of_experts
    with_copies = {
        chunk % parallel.pipeline_model_parallel_size
        for chunk in (layout.embedding_chunk, len(layout.chunks) - 1)
    }
    sums_copies = len(with_copies) > 1 and rank in with_copies
    of_step = CommunicationVolume(
        tensor=2 * (tensor - 1) / tensor * _GRADIENT * held.trained_replicas,
        pipeline=float(_GRADIENT * replicated_head(config, layout.chunks) * sums_copies),
        data=number * (dense + experts),
    )
    return of_step + _muon(config, held, sharing, of_experts)


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
    return CommunicationVolume(tensor=float(_GRADIENT * others * dense), data=2 * _GRADIENT * moved)


def _tensor(config: Config, chunk: Chunk, load: RankLoad) -> float:
    """Count the elements that tensor parallelism sends per microbatch."""
    arch = config.architecture
    parallel = config.parallel
    tensor = parallel.tensor_model_parallel_size
    ring = 2 * (tensor - 1) / tensor
    backward = has_backward(config)
    gathers_again = parallel.sequence_parallel and keeps_inputs(config, chunk, "language")
    again = {
        part: {"none": 0, "selective": 1, "full": 2}[parallel.recompute_of(part)]
        for part in LAYER_PARTS
    }
    # Tokens go to experts from where sequence parallelism has them: attention alone sums, and the
    # shared expert.
    sums_once = arch.language.num_experts > 0 and not arch.language.shared_expert_ffn_hidden_size
    if sums_once and parallel.recompute_of("language") == "selective":
        again["language"] = 0  # experts are computed again, and attention alone sums
    found = 0.0
    for layer in chunk.layer_numbers(arch.vision.num_layers):
        in_vision = layer < arch.vision.num_layers
        sums = 2
        if backward[layer]:
            sums += 2 + again["vision" if in_vision else "language"]
            sums += gathers_again and not in_vision
        if not in_vision:
            sums = sums / 2 if sums_once else sums
            blocks = arch.cross_attention.stands_before(layer - arch.vision.num_layers)
            found += (2 if blocks else 1) * sums * load.tokens * arch.language.hidden_size
        elif parallel.vision == "tensor":
            found += sums * load.tiles * arch.vision.layer_tokens * arch.vision.hidden_size
    if chunk.has_connector:
        found += _at_connector(config, load)
    if chunk.has_head and arch.language.exists:
        found += load.tokens * arch.language.hidden_size
    return ring * found


def _at_connector(config: Config, load: RankLoad) -> float:
    """Count the elements that the connector and the embedding all-reduce per microbatch."""
    arch = config.architecture
    parallel = config.parallel
    sizes = arch.connector_sizes
    found = 0.0
    if parallel.vision == "tensor":
        found = load.tiles * sizes.all_reduced_elements
        # The gradient of what its first matrix reads is made as soon as that matrix is trained.
        if found and any(
            trains(part, config.training.trainable) for part in ("vision", "connector")
        ):
            found += load.tiles * sizes.features * sizes.feature_size
    elif arch.language.exists:  # each rank gathers the features of all
        features = load.tiles * arch.features_per_tile * arch.needs.connector_output(arch)
        found = features * parallel.tensor_model_parallel_size / 2
    if not arch.language.exists:
        return found
    # Embeddings are summed. Gradients are gathered with sequence parallelism: half as much.
    gathers = parallel.sequence_parallel and has_backward(config)[arch.vision.num_layers]
    return found + load.tokens * arch.language.hidden_size * (1.5 if gathers else 1)


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
        width = arch.needs.connector_output(arch)
        found += 2 * load.tiles * parallel.tile_ranks * arch.features_per_tile * width
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
    first_trained = next(
        n for n, chunk in enumerate(layout.chunks) if parameters_on_rank(config, chunk).trained
    )
    sent = (
        _boundary(config, layout.chunks[number], load) if number + 1 < len(layout.chunks) else 0.0
    )
    returned = _boundary(config, layout.chunks[number - 1], load) if first_trained < number else 0.0
    return sent + returned


def _boundary(config: Config, before: Chunk, load: RankLoad) -> float:
    """Count the elements that a rank sends to the chunk after ``before``."""
    arch = config.architecture
    parallel = config.parallel
    if not before.language_layers:
        return load.tiles * arch.vision.layer_tokens * arch.vision.hidden_size
    tokens = load.tokens
    tokens /= parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    rows = tokens + memory_rows(arch, load.tiles * parallel.tile_ranks)
    return rows * arch.language.hidden_size
