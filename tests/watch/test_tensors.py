"""Values kept for tensors: found for that very object only, however often an `id` is used again."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resdiag.watch.base.tensors import TensorTable


@given(st.lists(st.tuples(st.sampled_from(["make", "make", "drop", "write"]), st.integers(0, 7))),
       st.booleans())  # fmt: skip
def test_a_table_is_a_dict_of_living_tensors_by_identity(moves, versioned):
    table, tensors, expected = TensorTable[int](versioned=versioned), {}, {}
    for number, (move, place) in enumerate(moves):
        if move == "make":  # frees what was there; the new tensor often gets its id
            tensors.pop(place, None)
            expected.pop(place, None)
            tensors[place] = torch.zeros(1)
            assert table.get(tensors[place]) is None
            if number % 3:
                table.set(tensors[place], number)
                expected[place] = number
        elif move == "drop":
            tensors.pop(place, None)
            expected.pop(place, None)
        elif place in tensors:
            tensors[place].add_(1)
            if versioned:
                expected.pop(place, None)
        for at, tensor in tensors.items():
            assert table.get(tensor) == expected.get(at)
    table.clear()
    assert all(table.get(tensor) is None for tensor in tensors.values())


def test_an_id_that_is_used_again_has_no_old_value():
    table, seen, again = TensorTable[int](), set(), 0
    for number in range(200):
        tensor = torch.zeros(2)
        again += id(tensor) in seen
        seen.add(id(tensor))
        assert table.get(tensor) is None
        table.set(tensor, number)
        assert table.get(tensor) == number
        del tensor
    assert again > 0  # else this test shows nothing


@pytest.mark.parametrize("versioned", [False, True])
def test_a_table_holds_no_tensor_and_knows_no_equal_one(versioned):
    table = TensorTable[str](versioned=versioned)
    tensor, twin = torch.ones(2), torch.ones(2)
    table.set(tensor, "kept")
    assert table.get(twin) is None
    assert table.get(tensor.view(2)) is None
    gone = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert gone() is None


def test_a_value_of_an_earlier_version_is_lost():
    table, tensor = TensorTable[int](versioned=True), torch.ones(2)
    before = tensor._version
    tensor.add_(1)
    table.set(tensor, 1, before)
    assert table.get(tensor) is None
    table.set(tensor, 2)
    assert table.get(tensor) == 2
