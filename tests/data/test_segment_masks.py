"""Id maps in layers behave as the list of masks they stand for."""

import numpy as np
import pytest

from hf_maskformer.data.segment_masks import SegmentMasks
from hf_maskformer.model.masks import encode_rles


def random_masks(count: int, density: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 7, 5)) < density


def disjoint_masks() -> np.ndarray:
    masks = np.zeros((3, 7, 5), dtype=bool)
    masks[0, :2], masks[2, 4:, 1:3] = True, True  # segment 1 has no pixel
    return masks


@pytest.mark.parametrize("masks", [disjoint_masks(), random_masks(5, 0.4), random_masks(1, 1.0), random_masks(3, 0.0)])
def test_masks_and_codes_round_trip(masks: np.ndarray) -> None:
    for segments in (SegmentMasks.from_masks(masks), SegmentMasks.from_rles(encode_rles(masks), (7, 5))):
        assert len(segments) == len(masks)
        assert segments.size == (7, 5)
        np.testing.assert_array_equal(segments.dense(), masks)
        np.testing.assert_array_equal(segments.areas(), masks.sum(axis=(1, 2)))


def test_one_layer_as_long_as_nothing_overlaps() -> None:
    assert len(SegmentMasks.from_masks(disjoint_masks()).layers) == 1
    assert len(SegmentMasks.from_masks(random_masks(3, 0.9)).layers) == 3


def test_no_masks() -> None:
    for segments in (SegmentMasks.from_masks(np.zeros((0, 4, 6))), SegmentMasks.from_rles([], (4, 6))):
        assert segments.dense().shape == (0, 4, 6)
        assert segments.areas().shape == (0,)


def test_group_is_the_union_and_counts_a_pixel_once() -> None:
    masks = random_masks(5, 0.5)
    grouped = SegmentMasks.from_masks(masks).group(np.array([1, 0, 1, -1, 1]), 2)
    expected = np.stack([masks[1], masks[0] | masks[2] | masks[4]])
    np.testing.assert_array_equal(grouped.dense(), expected)
    np.testing.assert_array_equal(grouped.areas(), expected.sum(axis=(1, 2)))


def test_select_and_apply() -> None:
    masks = random_masks(4, 0.5)
    segments = (
        SegmentMasks.from_masks(masks).apply(lambda array: array[..., ::-1]).select(np.array([1, 0, 0, 1], bool))
    )
    np.testing.assert_array_equal(segments.dense(), masks[[0, 3], :, ::-1])


def test_later_segments_are_on_top() -> None:
    masks = random_masks(4, 0.5)
    expected = np.zeros((7, 5), dtype=int)
    for number, mask in enumerate(masks, start=1):
        expected[mask] = number
    np.testing.assert_array_equal(SegmentMasks.from_masks(masks).top_map(), expected)


def test_more_segments_than_two_bytes_hold() -> None:
    ids = np.array([[0, 70000], [65536, 1]])
    segments = SegmentMasks.from_id_map(ids, 70000)
    np.testing.assert_array_equal(segments.top_map(), ids)


def test_a_code_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"RLE has size \[7, 5\], the image has size \[5, 7\]"):
        SegmentMasks.from_rles(encode_rles(disjoint_masks()), (5, 7))


@pytest.mark.parametrize("masks", [disjoint_masks(), random_masks(5, 0.4), random_masks(300, 0.1)])
def test_masks_come_one_by_one(masks: np.ndarray) -> None:
    given = list(SegmentMasks.from_masks(masks))
    assert all(mask.dtype == bool for mask in given)
    np.testing.assert_array_equal(np.stack(given), masks)


def test_take_is_indexing() -> None:
    masks = random_masks(4, 0.5)
    rows, columns = np.array([0, 0, 3, 6]), np.array([1, 4, 4])
    taken = SegmentMasks.from_masks(masks).take(rows, columns)
    np.testing.assert_array_equal(taken.dense(), masks[:, rows][:, :, columns])
