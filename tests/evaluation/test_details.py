"""What an evaluation keeps: the worst images in order, their maps, one line per image."""

import math

import numpy as np
import pytest

from hf_maskformer.evaluation.details import (
    Confusion,
    EvaluationDetails,
    ImageResult,
    WorstImage,
    class_segments,
)

MAP = np.array([[0, 0, 2], [0, 7, 7]])


def row(name, size=(2, 3)):
    return {"file_name": name, "height": size[0], "width": size[1]}


def filled(scores, worst=3, first=0):
    details = EvaluationDetails(worst=worst)
    for index, score in enumerate(scores, start=first):
        details.add(index, row(f"{index}.png"), ImageResult(score, MAP, [{"id": 2, "label_id": 5}]))
    return details


def order(details):
    return [(image.index, image.score) for image in details.worst]


def test_the_worst_come_first_and_of_equals_the_earlier():
    details = filled([0.5, 0.9, 0.1, math.nan, 0.5, 0.5, 0.0], worst=4)
    assert order(details) == [(6, 0.0), (2, 0.1), (0, 0.5), (4, 0.5)]
    assert len(details.images) == 7
    assert details.images[3].file_name == "3.png"


@pytest.mark.parametrize("worst", [0, 1, 3, 20])
def test_the_heap_equals_sorting(worst):
    scores = np.random.default_rng(0).integers(0, 6, 40) / 5
    expected = sorted((score, index) for index, score in enumerate(scores.tolist()))[:worst]
    assert order(filled(scores.tolist(), worst)) == [(index, score) for score, index in expected]


def test_merged_parts_equal_the_whole():
    scores = [0.3, 0.2, 0.9, 0.2, math.nan, 0.1, 0.2]
    whole = filled(scores)
    late, early = filled(scores[3:], first=3), filled(scores[:3])
    late.merge(early)
    late.complete(Confusion(np.zeros((1, 1), dtype=np.int64), ["a"], ["a"], "pixels"))
    assert order(late) == order(whole) == [(5, 0.1), (1, 0.2), (3, 0.2)]
    assert [image.index for image in late.images] == list(range(7))


def test_the_predicted_map_survives():
    segments = [{"id": 7, "label_id": 1, "score": 0.5}, {"id": 2, "label_id": 4}, {"id": 9, "label_id": 3}]
    details = EvaluationDetails(worst=1)
    details.add(0, row("a.png"), ImageResult(0.2, MAP, segments))
    ids, found = details.worst[0].predicted_map()
    np.testing.assert_array_equal(ids, [[0, 0, 2], [0, 1, 1]])
    assert [(one["id"], one["label_id"], one["score"]) for one in found] == [(1, 1, 0.5), (2, 4, None)]


def test_an_empty_prediction_has_an_empty_map():
    ids, segments = WorstImage(0.0, 0, row("a.png"), []).predicted_map()
    np.testing.assert_array_equal(ids, np.zeros((2, 3)))
    assert segments == []


def test_images_without_a_place_come_last():
    details = EvaluationDetails()
    details.add_unread(None, "b.png")
    details.add_unread(None, "a.png")
    details.add(0, row("0.png"), ImageResult(0.5, MAP, []))
    details.add_unread(1, "1.png")
    details.complete(Confusion(np.zeros((1, 1), dtype=np.int64), ["a"], ["a"], "pixels"))
    found = [(image.index, image.file_name, image.note) for image in details.images]
    bad = "cannot be read"
    assert found == [(0, "0.png", ""), (1, "1.png", bad), (None, "b.png", bad), (None, "a.png", bad)]


def test_class_segments_are_the_labels_present():
    assert class_segments(MAP) == [{"id": 0, "label_id": 0}, {"id": 2, "label_id": 2}, {"id": 7, "label_id": 7}]


def test_classes_of_a_confusion():
    square = Confusion(np.zeros((2, 2)), ["a", "b"], ["a", "b"], "pixels")
    objects = Confusion(np.zeros((3, 3)), ["a", "b", "background"], ["a", "b", "missed"], "objects")
    panoptic = Confusion(np.zeros((2, 3)), ["a", "b"], ["a", "b", "no segment"], "pixels")
    assert [one.num_classes for one in (square, objects, panoptic)] == [2, 2, 2]


def test_a_negative_number_of_worst_images_is_refused():
    with pytest.raises(ValueError, match="worst must be at least 0, got -1"):
        EvaluationDetails(worst=-1)
