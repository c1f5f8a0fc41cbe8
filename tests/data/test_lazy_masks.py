"""Codes that are decoded late, and only where a window looks, give the pixels of codes that are decoded at once."""

import numpy as np
import pytest

from hf_maskformer.data.lazy_masks import RleSegments
from hf_maskformer.data.segment_masks import SegmentMasks
from hf_maskformer.model.masks import encode_rles

SIZE = (9, 7)


def random_masks(rng: np.random.Generator) -> np.ndarray:
    """(N, 9, 7): disjoint, overlapping, empty and full ones."""
    count = int(rng.integers(0, 6))
    if rng.random() < 0.4:
        ids = rng.integers(0, count + 1, SIZE)
        return np.stack([ids == index + 1 for index in range(count)]) if count else np.zeros((0, *SIZE), bool)
    return rng.random((count, *SIZE)) < rng.choice([0.0, 0.1, 0.5, 1.0])


def both_forms(masks: np.ndarray) -> tuple[SegmentMasks, RleSegments]:
    rles = encode_rles(masks)
    return SegmentMasks.from_rles(rles, SIZE), RleSegments.from_codes([rle["counts"] for rle in rles], SIZE)


@pytest.mark.parametrize("seed", range(60))
def test_lazy_equals_eager(seed: int) -> None:
    rng = np.random.default_rng(seed)
    eager, lazy = both_forms(random_masks(rng))
    for _ in range(2):  # as read, and after a union of random segments
        rows = np.sort(rng.integers(0, SIZE[0], rng.integers(1, 14)))
        columns = np.sort(rng.integers(0, SIZE[1], rng.integers(1, 14)))
        np.testing.assert_array_equal(lazy.take(rows, columns).dense(), eager.take(rows, columns).dense())
        np.testing.assert_array_equal(lazy.areas(), eager.areas())
        np.testing.assert_array_equal(lazy.dense(), eager.dense())
        np.testing.assert_array_equal(lazy.top_map(), eager.top_map())
        keep = rng.random(len(eager)) < 0.5
        np.testing.assert_array_equal(lazy.select(keep).dense(), eager.select(keep).dense())
        targets = rng.integers(-1, 3, len(eager))
        eager, lazy = eager.group(targets, 3), lazy.group(targets, 3)
        assert isinstance(lazy, RleSegments)


def test_a_window_paints_nothing_else() -> None:
    _, lazy = both_forms(np.ones((1, *SIZE), dtype=bool))
    assert lazy.take(np.arange(2, 4), np.arange(3, 6)).layers.shape == (1, 2, 3)
    assert "layers" not in vars(lazy)
    assert lazy.layers.shape == (1, *SIZE)


def test_runs_are_pieces_of_columns() -> None:
    """A run over three columns of four rows, seen at rows 1, 1, 3 and columns 0, 2."""
    mask = np.zeros((4, 3), dtype=bool)
    mask[2:, 0] = mask[:, 1] = mask[:2, 2] = True
    lazy = RleSegments.from_codes([rle["counts"] for rle in encode_rles(mask[None])], (4, 3))
    seen = lazy.take(np.array([1, 1, 3]), np.array([0, 2]))
    assert seen.dense().astype(int).tolist() == [[[0, 1], [0, 1], [1, 0]]]


@pytest.mark.parametrize(
    ("broken", "message"),
    [("", "not a COCO string"), ("~~", "not a COCO string"), ("11", r"cover 2 pixels, size \[9, 7\] has 63")],
)
def test_a_broken_code_is_refused_when_it_is_read(broken: str, message: str) -> None:
    sound = [rle["counts"] for rle in encode_rles(np.ones((2, *SIZE), dtype=bool))]
    with pytest.raises(ValueError, match=message):
        RleSegments.from_codes([sound[0], broken, sound[1]], SIZE)
