"""Operations on whole tensors."""

from __future__ import annotations

import pytest
import torch

from megavlm.convert.weights.transforms import Fused, GroupedQKV, Operation, Padded, Same, Stacked

OPERATIONS = {
    "same": (Same(), (5, 7)),
    "padded": (Padded(11), (11, 3)),
    "padded columns": (Padded(7, axis=1), (5, 7)),
    "padded heads in one tensor": (
        Padded(18, inner=Fused(GroupedQKV(3, 3, 2), (6, 6, 6))),
        (18, 5),
    ),
    "stacked": (Stacked(2), (6, 5)),
    "grouped": (GroupedQKV(6, 2, 4), (40, 3)),
    "grouped bias": (GroupedQKV(6, 2, 4), (40,)),
    "heads equal groups": (GroupedQKV(3, 3, 2), (18, 5)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_join_undoes_split_and_split_undoes_join(name: str) -> None:
    operation, shape = OPERATIONS[name]
    whole = torch.randn(shape)
    parts = operation.split(whole)
    assert tuple(tuple(part.shape) for part in parts) == operation.part_shapes(shape)
    assert torch.equal(operation.join(parts), whole)
    other = [torch.randn(part.shape) for part in parts]
    for one, two in zip(operation.split(operation.join(other)), other, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_number_is_lost_or_doubled(name: str) -> None:
    operation, shape = OPERATIONS[name]
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    assert torch.equal(
        torch.cat([part.flatten() for part in operation.split(numbers)]).sort().values,
        numbers.flatten(),
    )


@pytest.mark.parametrize(("heads", "groups", "size"), [(6, 2, 4), (4, 4, 2), (5, 1, 3)])
def test_grouped_rows_are_queries_then_key_then_value_of_each_group(
    heads: int, groups: int, size: int
) -> None:
    width = 7
    query, key, value = (torch.randn(count * size, width) for count in (heads, groups, groups))
    fused = GroupedQKV(heads, groups, size).join([query, key, value])
    hidden = torch.randn(width)
    # What an attention layer of megatron-core reads from the product: groups, and in each its query
    # heads, a key and a value.
    product = (fused @ hidden).view(groups, heads // groups + 2, size)
    queries, keys, values = ((weight @ hidden).view(-1, size) for weight in (query, key, value))
    for head in range(heads):
        group = head // (heads // groups)
        torch.testing.assert_close(product[group, head % (heads // groups)], queries[head])
    torch.testing.assert_close(product[:, -2], keys)
    torch.testing.assert_close(product[:, -1], values)


@pytest.mark.parametrize("axis", [0, 1])
def test_padding_is_dropped_and_nothing_shorter_taken(axis: int) -> None:
    operation: Operation = Padded(11, axis)
    padded, expected = (torch.randn(16, 3), (11, 3)) if axis == 0 else (torch.randn(3, 16), (3, 11))
    assert torch.equal(operation.split(padded)[0], padded[:11] if axis == 0 else padded[:, :11])
    assert operation.takes(tuple(padded.shape), expected) and operation.takes(expected, expected)
    for other in ((10, 3), (16, 4), (11,)):
        assert not operation.takes(other if axis == 0 else other[::-1], expected)


def test_fused_thirds_become_groups_of_query_key_and_value() -> None:
    query, key, value = (torch.randn(6, 5) for _ in range(3))
    operation = Fused(GroupedQKV(3, 3, 2), (6, 6, 6))
    grouped = operation.join([torch.cat([query, key, value])])
    for head in range(3):
        rows = slice(2 * head, 2 * head + 2)
        assert torch.equal(
            grouped[6 * head : 6 * head + 6], torch.cat([query[rows], key[rows], value[rows]])
        )
