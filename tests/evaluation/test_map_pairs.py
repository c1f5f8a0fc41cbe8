"""Pairs of values of two maps: runs give what pixels give."""

import numpy as np
import pytest

from hf_maskformer.evaluation.map_pairs import count_pairs, id_positions, map_pairs


def table_by_pixels(first, second, shape):
    table = np.zeros(shape, dtype=np.int64)
    for row, column in zip(first.ravel().tolist(), second.ravel().tolist(), strict=True):
        table[row, column] += 1
    return table


def test_runs_of_a_hand_sized_map():
    first = np.repeat([[3] * 40 + [5] * 60], 30, axis=0)
    second = np.full((30, 100), 1)
    second[29, 90:] = 2
    values, others, lengths = map_pairs(first, second)
    assert values.tolist() == [3, 5] * 30 + [5]
    assert others.tolist() == [1] * 60 + [2]
    assert lengths.tolist() == [40, 60] * 29 + [40, 50, 10]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
@pytest.mark.parametrize("block", [1, 8, 40])
def test_table_equals_counting_pixels(dtype, block):
    rng = np.random.default_rng(block)
    first, second = (
        np.kron(rng.integers(0, 6, size=(80 // block, 120 // block)), np.ones((block, block))).astype(dtype)
        for _ in range(2)
    )
    pairs = map_pairs(first, second)
    assert (pairs.lengths is None) == (block == 1)  # noise is not cut into runs
    table = count_pairs(*pairs, (6, 7))
    assert table.dtype == np.int64
    np.testing.assert_array_equal(table, table_by_pixels(first, second, (6, 7)))


def test_noise_outside_the_looked_at_middle_gives_the_same_table():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, size=(2, 500, 400))
    first[240:300], second[240:300] = 1, 2
    pairs = map_pairs(first, second)
    assert pairs.lengths is None
    np.testing.assert_array_equal(count_pairs(*pairs, (4, 4)), table_by_pixels(first, second, (4, 4)))


def test_maps_that_are_views():
    rng = np.random.default_rng(1)
    first = np.kron(rng.integers(0, 3, size=(9, 8)), np.ones((20, 20), dtype=int)).T[::2, ::-1]
    table = count_pairs(*map_pairs(first, first[::-1]), (3, 3))
    np.testing.assert_array_equal(table, table_by_pixels(first, first[::-1], (3, 3)))


def test_no_pixels():
    empty = np.zeros((0, 5), dtype=np.uint8)
    assert count_pairs(*map_pairs(empty, empty), (2, 2)).tolist() == [[0, 0], [0, 0]]


def test_positions_of_ids_that_float64_cannot_tell_apart():
    values = np.array([2**60 + 1, 2**60, 2**60 + 2, 2**64 - 3], dtype=np.uint64)
    assert id_positions(values, np.array([2**60, -3, 2**60 + 1])).tolist() == [3, 1, 0, 0]


@pytest.mark.parametrize("ids", [[7, 2, 9], [7, 2, 16_000_000], [-3, 7, 2], [7, 300, 2]])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_positions_of_ids(ids, dtype):
    values = np.array([[2, 7, 0, 9], [9, 2, 2, 44]], dtype=dtype)
    expected = [[ids.index(value) + 1 if value in ids else 0 for value in row] for row in values.tolist()]
    assert id_positions(values, np.array(ids)).tolist() == expected
    assert id_positions(values, np.zeros(0, dtype=np.int64)).tolist() == [[0] * 4] * 2
