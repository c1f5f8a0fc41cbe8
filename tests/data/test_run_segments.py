"""Segments from runs are those that are made from dense masks."""

import numpy as np

from hf_maskformer.data.run_segments import runs_to_segments
from hf_maskformer.data.sample import make_segment
from hf_maskformer.model.masks import id_map_to_runs


def test_segments_equal_those_of_dense_masks() -> None:
    ids = np.random.default_rng(0).integers(0, 5, size=(7, 9))
    wanted, labels, crowds = [1, 4, 2], [0, 3, 3], [False, True, False]
    segments = runs_to_segments(id_map_to_runs(ids, wanted), wanted, labels, crowds)
    expected = [
        make_segment(value, label, ids == value, crowd)
        for value, label, crowd in zip(wanted, labels, crowds, strict=True)
    ]
    assert segments == expected


def test_no_masks_and_an_empty_one() -> None:
    ids = np.ones((2, 3), dtype=np.int64)
    assert runs_to_segments(id_map_to_runs(ids, []), [], []) == []
    (segment,) = runs_to_segments(id_map_to_runs(ids, [9]), [9], [0])
    assert (segment["area"], segment["bbox"], segment["iscrowd"]) == (0.0, [0.0, 0.0, 0.0, 0.0], False)
