"""Confusions and scores of single images, counted by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_maskformer.evaluation.scorers import (
    NO_CLASS,
    InstanceScorer,
    PanopticScorer,
    SemanticScorer,
    class_map,
    match_objects,
)
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import encode_rle
from model_answers import answers, data_row, row_of_map

SPEC = LabelSpec({0: "sky", 1: "cat", 2: "dog"}, thing_label_ids=(1, 2))
SIZE = (4, 6)


def columns(first, last):
    """(4, 6) bool: some of the columns."""
    mask = np.zeros(SIZE, dtype=bool)
    mask[:, first:last] = True
    return mask


def reference(*objects):
    masks, labels, crowd = zip(*objects, strict=True) if objects else ((), (), ())
    return {
        "masks": [encode_rle(mask) for mask in masks],
        "labels": np.array(labels, dtype=np.int64),
        "iscrowd": np.array(crowd, dtype=bool),
    }


def segments(*objects):
    return [{"label_id": label, "rle": encode_rle(mask)} for mask, label in objects]


# --- semantic --------------------------------------------------------------------------------------------------------


def test_semantic_confusion_and_scores():
    truths = [[[0, 0, 1, 1], [0, 0, 1, 255]], [[2, 2, 2, 2], [2, 2, 2, 2]]]
    maps = [[[0, 0, 0, 1], [0, 0, 1, 2]], [[2, 2, 2, 2], [0, 0, 0, 0]]]
    processor = SimpleNamespace(
        post_process_semantic_segmentation=lambda outputs, target_sizes: [torch.tensor(one) for one in maps]
    )
    scorer = SemanticScorer(SPEC, details=True)
    results = scorer.add(processor, None, [(2, 4)] * 2, [row_of_map(truth) for truth in truths])
    # image 0: sky 4 of 5, cat 2 of 3, dog predicted on void only; image 1: dog 4 of 8, sky 0 of 4
    assert [result.score for result in results] == [pytest.approx((4 / 5 + 2 / 3) / 2), pytest.approx(0.25)]
    confusion = scorer.confusion()
    np.testing.assert_array_equal(confusion.matrix, [[4, 0, 0], [1, 2, 0], [4, 0, 4]])
    assert confusion.rows == confusion.columns == ["sky", "cat", "dog"]
    assert confusion.counted == "pixels"
    assert [segment["label_id"] for segment in results[1].segments] == [0, 2]
    assert scorer.compute()["per_category_iou"] == [pytest.approx(4 / 9), pytest.approx(2 / 3), pytest.approx(0.5)]


def test_without_details_nothing_is_kept():
    processor = SimpleNamespace(
        post_process_semantic_segmentation=lambda outputs, target_sizes: [torch.zeros(1, 1).long()]
    )
    scorer = SemanticScorer(SPEC)
    assert scorer.add(processor, None, [(1, 1)], [row_of_map([[0]])]) == []
    assert scorer.compute()["mean_iou"] == 1.0


def test_an_image_of_void_has_no_score():
    processor = SimpleNamespace(
        post_process_semantic_segmentation=lambda outputs, target_sizes: [torch.zeros(1, 2).long()]
    )
    scorer = SemanticScorer(SPEC, details=True)
    (result,) = scorer.add(processor, None, [(1, 2)], [data_row([], (1, 2))])
    assert np.isnan(result.score)


# --- objects ---------------------------------------------------------------------------------------------------------


def test_objects_are_matched_whatever_their_class():
    truth = reference((columns(0, 2), 1, False), (columns(2, 4), 2, False), (columns(5, 6), 1, False))
    said = segments((columns(0, 2), 1), (columns(2, 5), 1), (columns(4, 5), 2))
    counts, score = match_objects(said, truth, SIZE, 3)
    expected = np.zeros((4, 4), dtype=int)
    expected[1, 1] = 1  # the cat, IoU 1
    expected[2, 1] = 1  # the dog, IoU 2/3, taken for a cat
    expected[1, 3] = 1  # the last cat is missed
    expected[3, 2] = 1  # a dog where there is none
    np.testing.assert_array_equal(counts, expected)
    assert score == pytest.approx(1 / ((3 + 3) / 2))  # one right of IoU 1; three objects, three said


def test_an_object_is_found_once_by_the_best_and_from_half_on():
    truth = reference((columns(0, 2), 1, False))
    counts, score = match_objects(segments((columns(0, 4), 1), (columns(0, 2), 1)), truth, SIZE, 3)
    assert (counts[1, 1], counts[3, 1], counts[1, 3]) == (1, 1, 0)
    assert score == pytest.approx(0.5 / 1.5)
    counts, score = match_objects(segments((columns(0, 5), 1)), truth, SIZE, 3)
    assert (counts[1, 1], counts[3, 1], counts[1, 3]) == (0, 1, 1)
    assert score == 0.0


def test_crowds_need_not_be_found_and_excuse():
    truth = reference((columns(0, 4), 1, True))
    counts, score = match_objects(segments((columns(0, 2), 2), (columns(3, 6), 1)), truth, SIZE, 3)
    assert counts.sum() == counts[3, 1] == 1  # two thirds of the second lie outside the crowd
    assert score == 0.0
    counts, score = match_objects(segments((columns(0, 2), 2)), truth, SIZE, 3)
    assert counts.sum() == 0
    assert np.isnan(score)


def test_overlapping_objects_are_compared_whole():
    truth = reference((columns(0, 4), 1, False), (columns(2, 6), 2, False))
    counts, score = match_objects(segments((columns(2, 6), 2), (columns(0, 4), 1)), truth, SIZE, 3)
    assert counts[1, 1] == counts[2, 2] == 1
    assert score == 1.0


def test_nothing_there_and_nothing_said_has_no_score():
    counts, score = match_objects([], reference(), SIZE, 3)
    assert counts.sum() == 0
    assert np.isnan(score)
    assert match_objects([], reference((columns(0, 1), 1, False)), SIZE, 3)[1] == 0.0


def test_instance_confusion_has_things_and_none():
    processor = HfMaskFormerImageProcessor(size={"max_height": 8, "max_width": 8})
    row = data_row([(0, columns(0, 2), False), (1, columns(2, 4), False), (2, columns(4, 6), False)], SIZE)
    outputs = answers([(np.stack([columns(2, 4), columns(0, 2)]), [2, 2])], 3, SIZE)
    scorer = InstanceScorer(SPEC, details=True)
    (result,) = scorer.add(processor, outputs, [SIZE], [row])
    confusion = scorer.confusion()
    assert (confusion.rows, confusion.columns) == (["cat", "dog", "background"], ["cat", "dog", "missed"])
    np.testing.assert_array_equal(confusion.matrix, [[0, 1, 0], [0, 0, 1], [0, 1, 0]])
    assert confusion.counted == "objects"
    assert result.score == 0.0
    assert [segment["label_id"] for segment in result.segments] == [2, 2]


def test_weak_instances_count_for_ap_only():
    processor = HfMaskFormerImageProcessor(size={"max_height": 8, "max_width": 8}, threshold=1.0)
    row = data_row([(1, columns(2, 4), False)], SIZE)
    scorer = InstanceScorer(SPEC, details=True)
    (result,) = scorer.add(processor, answers([(columns(2, 4)[None], [1])], 3, SIZE), [SIZE], [row])
    assert scorer.compute()["map"] == pytest.approx(1.0)
    np.testing.assert_array_equal(scorer.confusion().matrix, [[0, 0, 1], [0, 0, 0], [0, 0, 0]])
    assert result.segments == []


@pytest.mark.parametrize("none", [[], [{"id": 3, "label_id": 2}]])
def test_a_class_map_has_no_class_where_there_is_no_segment(none):
    ids = np.array([[0, 7], [3, 7]])
    found = class_map(ids, [{"id": 7, "label_id": 1}, *none])
    assert found.dtype == np.int64
    assert found.tolist() == [[NO_CLASS, 1], [2 if none else NO_CLASS, 1]]


# --- panoptic --------------------------------------------------------------------------------------------------------


def test_panoptic_confusion_has_a_column_without_segment():
    processor = HfMaskFormerImageProcessor(size={"max_height": 8, "max_width": 8}, thing_label_ids=[1, 2])
    row = data_row([(0, columns(0, 2), False), (1, columns(2, 4), False), (2, columns(4, 5), False)], SIZE)
    outputs = answers([(np.stack([columns(0, 3), columns(3, 4)]), [0, 1])], 3, SIZE)
    scorer = PanopticScorer(SPEC, boundary=True, details=True)
    (result,) = scorer.add(processor, outputs, [SIZE], [row])
    confusion = scorer.confusion()
    assert confusion.columns == ["sky", "cat", "dog", "no segment"]
    np.testing.assert_array_equal(confusion.matrix, [[8, 0, 0, 0], [4, 4, 0, 0], [0, 0, 0, 4]])
    # sky: IoU 2/3, matched; cat: IoU 1/2 is no match; dog: missed
    assert result.score == pytest.approx((2 / 3 + 0 + 0) / 3)
    metrics = scorer.compute()
    assert metrics["pq"] == pytest.approx(result.score)
    assert len(metrics["per_category_boundary_pq"]) == 3
