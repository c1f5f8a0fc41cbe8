"""The two kinds of loaded data: by number, and streamed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from data.hub_sets import MASKS, object_set
from hf_maskformer.data.load import load
from hf_maskformer.data.row_stream import RowStream
from hf_maskformer.data.sample import FEATURES, make_segment
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.model.label_spec import LabelSpec

SPEC = LabelSpec({0: "cat", 1: "dog"}, thing_label_ids=(0, 1))
ROWS = [
    {
        "image": {**cell, "path": None},
        "image_id": str(number),
        "height": 6,
        "width": 8,
        "file_name": f"{number}.png",
        "segments": [make_segment(1, number, MASKS[number])],
    }
    for number, cell in enumerate(object_set(2).with_format("arrow")[:]["image"].to_pylist())
]


def data_of(kind: str, task: str = "instance") -> SegmentationData:
    rows: Any = Dataset.from_list(ROWS, features=FEATURES)
    if kind == "streamed":
        rows = RowStream(ROWS, lambda raw, number, problems: dict(raw), "set train")
    return SegmentationData(rows, SPEC, task, "hub", "train")


@pytest.mark.parametrize("kind", ["numbered", "streamed"])
def test_both_kinds_are_gone_through_in_the_same_way(kind):
    data = data_of(kind)
    assert data.streaming is (kind == "streamed")
    assert [row["image_id"] for row in data.rows()] == ["0", "1"]
    for number, (sample, reference) in enumerate(data.samples_with_references()):
        np.testing.assert_array_equal(sample.masks, MASKS[number : number + 1])
        assert sample.image[0, 0].tolist() == [number] * 3
        assert reference["labels"].tolist() == [number]
    assert [sample.image_id for sample in data.samples()] == ["0", "1"]
    assert [sample.image_id for sample in data.samples()] == ["0", "1"]
    assert bool(data)


def test_rows_give_what_numbers_give():
    data = data_of("numbered", "semantic")
    row = data.row(1)
    np.testing.assert_array_equal(data.row_image(row), data.image(1))
    np.testing.assert_array_equal(data.row_sample(row).masks, data.sample(1).masks)
    np.testing.assert_array_equal(data.row_reference(row), data.reference(1))
    assert len(data) == 2


def test_images_that_the_index_left_out_are_known_each_time_it_is_opened(tmp_path):
    content = {"images": [], "categories": [{"id": 1, "name": "cat"}], "annotations": []}
    (tmp_path / "train" / "images").mkdir(parents=True)
    for number in range(3):
        file = tmp_path / "train" / "images" / f"{number}.png"
        file.write_bytes(ROWS[0]["image"]["bytes"] if number != 1 else b"")
        content["images"].append({"id": number, "file_name": file.name, "height": 6, "width": 8})
    (tmp_path / "train" / "instances.json").write_text(json.dumps(content))
    for _ in range(2):
        data = load(tmp_path, on_bad_sample="skip", cache_dir=str(tmp_path / "cache"))
        assert len(data) == 2
        (problem,) = data.left_out
        assert (problem.kind, Path(problem.file).name) == ("unreadable_file", "1.png")
    assert data_of("numbered").left_out == ()


def test_streamed_data_has_no_numbers_and_says_what_to_do():
    data = data_of("streamed")
    for use in (len, lambda d: d.row(0), lambda d: d.image(0), lambda d: d.sample(0), lambda d: d.reference(0)):
        with pytest.raises(TypeError, match=r"the data is streamed, .* data\.rows\(\) or data\.samples\(\)"):
            use(data)
    assert "images=streamed" in repr(data)
    assert "images=2" in repr(data_of("numbered"))


def test_an_image_of_another_size_than_its_row_is_refused():
    data = data_of("streamed")
    with pytest.raises(ValueError, match=r"0\.png is 8x6 \(width x height\), it was 8x5"):
        data.row_image({**ROWS[0], "height": 5})


def test_the_smaller_segment_is_seen_whatever_areas_are_stored() -> None:
    large, small = np.ones((6, 8), dtype=bool), np.zeros((6, 8), dtype=bool)
    small[1:5, 2:6] = True
    segments = [{**make_segment(7, 0, small), "area": 0.5}, {**make_segment(8, 1, large), "area": 0.0}]
    row = {**ROWS[0], "segments": segments}
    np.testing.assert_array_equal(data_of("numbered", "semantic").row_reference(row), np.where(small, 0, 1))
    panoptic = data_of("numbered", "panoptic").row_reference(row)
    np.testing.assert_array_equal(panoptic["segmentation"], np.where(small, 7, 8))
    assert [info["id"] for info in panoptic["segments_info"]] == [7, 8]
