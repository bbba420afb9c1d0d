"""Whether packs can be shared out over the ranks that work on each of them."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.schema import Parallel


def rows_of_a_rank(parallel: Parallel, capacity: int) -> int:
    """Tokens of a pack of ``capacity`` tokens that a rank has between the layers of the language
    model.
    """
    tensor = max(parallel.tensor_model_parallel_size, 1) if parallel.sequence_parallel else 1
    return capacity // max(parallel.context_parallel_size, 1) // tensor


def sharing_problems(
    parallel: Parallel, where: str, capacity: int, alignment: int
) -> Iterator[str]:
    """Yield the reasons why the ranks cannot share packs.

    Args:
        parallel: the layout.
        where: flag and folder of the dataset, for the message.
        capacity: tokens of a pack.
        alignment: each sample starts at a multiple of this many tokens.
    """
    context = max(parallel.context_parallel_size, 1)
    pieces = 2 * context
    if context > 1 and alignment % pieces:
        yield (
            f"{where}: its samples start at multiples of {alignment}, and"
            f" --parallel.context_parallel_size {context} cuts each into {pieces} equal pieces;"
            f" pack with --alignment {pieces}"
        )
    yield from capacity_problems(parallel, where, capacity)


def capacity_problems(parallel: Parallel, where: str, capacity: int) -> Iterator[str]:
    """Yield the reasons why the ranks cannot share packs of ``capacity`` tokens; arguments as for
    ``sharing_problems``.
    """
    tensor = max(parallel.tensor_model_parallel_size, 1)
    context = max(parallel.context_parallel_size, 1)
    if context > 1 and capacity % (2 * context):
        yield (
            f"{where}: packs of {capacity} tokens cannot be cut into the {2 * context} equal pieces"
            f" of --parallel.context_parallel_size {context}; pack with a --capacity that is a"
            f" multiple of {2 * context}"
        )
    if parallel.sequence_parallel and capacity // context % tensor:
        yield (
            f"{where}: packs of {capacity} tokens cannot be shared by"
            f" --parallel.tensor_model_parallel_size {tensor}, as --parallel.sequence_parallel true"
            f" asks; pack with a --capacity that is a multiple of {tensor * context}"
        )
