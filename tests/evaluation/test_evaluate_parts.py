"""`evaluate` on streams, and by parts that are merged."""

import numpy as np
import pytest

from hf_maskformer.data.row_stream import RowStream
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.evaluation.details import EvaluationDetails
from hf_maskformer.evaluation.evaluate import Score, evaluate, score_images
from model_answers import Oracle, processor_for, scalars, scenes


def streamed(data):
    rows = [data.row(index) for index in range(len(data))]
    stream = RowStream(rows, lambda raw, number, problems: raw, where="rows")
    return SegmentationData(stream, data.label_spec, data.task, data.format)


@pytest.mark.parametrize("limit", [None, 3])
def test_streamed_data_gives_the_same(limit):
    data = scenes("panoptic")
    stream = streamed(data)
    first, second = EvaluationDetails(worst=2), EvaluationDetails(worst=2)
    one = evaluate(Oracle(data), processor_for(data), data, progress=False, limit=limit, details=first)
    oracle = Oracle(stream, rows=[data.row(index) for index in range(len(data))])
    other = evaluate(oracle, processor_for(data), stream, progress=False, limit=limit, details=second)
    assert one == other
    assert first.images == second.images
    assert oracle.next_row == (limit or 5)
    assert [stream.row_image(image.row).shape for image in second.worst] == [(48, 64, 3)] * 2


def test_a_stream_without_rows_is_an_error():
    data = scenes("semantic", length=1)
    empty = SegmentationData(RowStream([], lambda raw, number, problems: raw, "rows"), data.label_spec, "semantic", "")
    with pytest.raises(ValueError, match="data has no images"):
        evaluate(Oracle(data), processor_for(data), empty, progress=False)
    with pytest.raises(ValueError, match="nothing to evaluate: data has unknown many images and limit is 0"):
        evaluate(Oracle(data), processor_for(data), empty, progress=False, limit=0)


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_merged_shards_equal_one_pass(task, count):
    data = scenes(task, length=5)
    wrong = {1, 3}
    details = EvaluationDetails(worst=3)
    whole = evaluate(
        Oracle(data, wrong=wrong), processor_for(data), data, progress=False, boundary=True, details=details
    )
    parts = []
    for number in range(count):
        oracle = Oracle(data, wrong=wrong)
        oracle.next_row = 5 * number // count
        parts.append(Score(task, data.label_spec, boundary=True, details=EvaluationDetails(worst=3)))
        score_images(oracle, processor_for(data), data, parts[-1], batch_size=2, shard=(number, count))
    assert [part.images for part in parts] == [5 * (n + 1) // count - 5 * n // count for n in range(count)]
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    np.testing.assert_allclose(scalars(merged.compute()), scalars(whole), rtol=1e-14)
    np.testing.assert_array_equal(merged.details.confusion.matrix, details.confusion.matrix)
    assert merged.details.images == details.images
    assert [image.index for image in merged.details.worst] == [image.index for image in details.worst]
    assert merged.details.worst[0].segments == details.worst[0].segments


def test_shards_of_a_stream_take_turns():
    data = streamed(scenes("semantic", length=5))
    rows = list(data.rows())
    score = Score("semantic", data.label_spec)
    oracle = Oracle(data, rows=[rows[1], rows[3]])
    score_images(oracle, processor_for(data), data, score, shard=(1, 2))
    assert score.images == 2
    assert score.compute()["mean_iou"] == pytest.approx(1.0)


def test_parts_of_different_evaluations_are_not_merged():
    spec = scenes("semantic", length=1).label_spec
    for other in (Score("panoptic", spec), Score("semantic", spec, boundary=True)):
        with pytest.raises(ValueError, match="only parts of one evaluation"):
            Score("semantic", spec).merge(other)
    with pytest.raises(ValueError, match="only parts of one evaluation"):
        Score("semantic", spec).merge(Score("semantic", spec, details=EvaluationDetails()))
