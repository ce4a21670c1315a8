"""The key/value cache: token number p of a row is in slot p, whatever the padding, and stays there."""

import itertools

import pytest
import torch
from torch import Tensor

from minivlm.cache import KVCache


def make(batch: int, step: int = 4) -> KVCache:
    return KVCache(1, batch, num_key_value_heads=1, head_dim=2, step=step)


def numbered(values: list[list[int]]) -> Tensor:
    """[B, T] numbers as keys [B, 1, T, 2]."""
    return torch.tensor(values)[:, None, :, None].expand(-1, 1, -1, 2).float()


def feed(cache: KVCache, mask: list[list[int]], values: list[list[int]]) -> Tensor:
    """Reserve and write; returns the keys as numbers [B, S]. The values are their negatives."""
    cache.reserve(torch.tensor(mask))
    keys, stored = cache.write(0, numbered(values), -numbered(values))
    assert torch.equal(keys, -stored)
    return keys[:, 0, :, 0]


def test_positions_go_on_where_they_stopped():
    cache = make(2)
    assert cache.reserve(torch.ones(2, 3)).tolist() == [[0, 1, 2]] * 2
    assert cache.reserve(torch.ones(2, 1)).tolist() == [[3]] * 2
    assert cache.lengths.tolist() == [4, 4]
    assert cache.key_positions.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("mask", "values"),
    [([[1, 1, 1], [0, 0, 1]], [[1, 2, 3], [9, 9, 4]]), ([[1, 1, 1], [1, 0, 0]], [[1, 2, 3], [4, 9, 9]])],
    ids=["left", "right"],
)
def test_padding_is_not_stored(mask: list[list[int]], values: list[list[int]]):
    """Padding on either side leaves the same cache, and rows differ in length."""
    cache = make(2)
    keys = feed(cache, mask, values)
    assert cache.lengths.tolist() == [3, 1]
    assert cache.key_is_real.int().tolist() == [[1, 1, 1], [1, 0, 0]]
    assert keys[cache.key_is_real].tolist() == [1, 2, 3, 4]
    # The shorter row continues in its own next slot; a finished row is padding.
    keys = feed(cache, [[0], [1]], [[9], [5]])
    assert cache.lengths.tolist() == [3, 2]
    assert keys[cache.key_is_real].tolist() == [1, 2, 3, 4, 5]


def test_rows_that_go_on_alike_are_copied_in_one_piece():
    """Beginning together is not enough: here, of two rows with two new tokens each, one is further on."""
    cache = make(2)
    feed(cache, [[1, 1], [1, 1]], [[1, 2], [6, 7]])
    assert cache._same == slice(0, 2)
    assert feed(cache, [[1], [1]], [[3], [8]]).tolist() == [[1, 2, 3], [6, 7, 8]]
    feed(cache, [[1], [0]], [[4], [9]])
    assert cache._same is None
    keys = feed(cache, [[1, 1], [1, 1]], [[5, 5], [8, 9]])
    assert cache._same is None
    assert keys[cache.key_is_real].tolist() == [1, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9]


def test_rows_that_are_padded_alike_are_not_copied_in_one_piece():
    cache = make(2)
    for mask, written in (([0, 1, 1], [1, 2]), ([1, 1, 0], [1, 2, 3, 4])):
        keys = feed(cache, [mask] * 2, [[9, 1, 2] if mask[0] == 0 else [3, 4, 9]] * 2)
        assert cache._same is None
        assert keys.tolist() == [written] * 2


def test_growth_keeps_what_was_written():
    cache = make(1, step=4)
    assert cache.capacity == 0
    addresses = []
    for number in range(1, 11):
        keys = feed(cache, [[1]], [[number]])
        assert keys[0].tolist() == list(range(1, number + 1))
        assert cache.capacity == (4 if number <= 4 else 8 if number <= 8 else 16)  # twice as many each time
        addresses.append(cache.keys[0].data_ptr())
    # Memory is allocated only at tokens 1, 5 and 9: not one copy per token.
    assert [after != before for before, after in itertools.pairwise(addresses)] == [
        number in (5, 9) for number in range(2, 11)
    ]


def test_a_long_prompt_grows_once_to_a_multiple_of_the_step():
    cache = make(1, step=4)
    cache.reserve(torch.ones(1, 9))
    assert cache.capacity == 12


def test_what_is_returned_is_a_view():
    cache = make(1)
    cache.reserve(torch.ones(1, 2))
    keys, values = cache.write(0, numbered([[1, 2]]), numbered([[1, 2]]))
    assert keys.shape == values.shape == (1, 1, 2, 2)
    assert keys.data_ptr() == cache.keys[0].data_ptr()
    assert values.data_ptr() == cache.values[0].data_ptr()


def test_reset_forgets_and_keeps_the_memory():
    cache = make(2)
    feed(cache, [[1, 1, 1], [0, 1, 1]], [[1, 2, 3], [9, 4, 5]])
    address = cache.keys[0].data_ptr()
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]
    assert cache.key_positions.shape == (1, 0)
    keys = feed(cache, [[1, 1], [1, 0]], [[6, 7], [8, 9]])
    assert keys[cache.key_is_real].tolist() == [6, 7, 8]
    assert cache.keys[0].data_ptr() == address


def test_layers_do_not_share():
    cache = KVCache(2, 1, num_key_value_heads=1, head_dim=2)
    for count in (1, 2):  # before and after the first write of each layer
        cache.reserve(torch.ones(1, 1))
        cache.write(0, numbered([[count]]), numbered([[count]]))
        cache.write(1, numbered([[10 * count]]), numbered([[10 * count]]))
    assert cache.keys[0][0, 0, :2, 0].tolist() == [1, 2]
    assert cache.keys[1][0, 0, :2, 0].tolist() == [10, 20]


def test_heads_and_width_keep_their_places():
    cache = KVCache(1, 2, num_key_value_heads=3, head_dim=4, dtype=torch.bfloat16)
    cache.reserve(torch.ones(2, 5))
    new = torch.randn(2, 3, 5, 4).bfloat16()
    keys, values = cache.write(0, new, -new)
    assert torch.equal(keys, new)
    assert torch.equal(values, -new)
