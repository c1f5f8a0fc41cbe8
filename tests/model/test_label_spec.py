"""Label checks: each wrong number is named together with the image or file and the allowed range."""

import json

import numpy as np
import pytest
import torch

from hf_maskformer.model.label_spec import LabelSpec

SPEC = LabelSpec({0: "road", 1: "car", 2: "sky"}, thing_label_ids=(1,))


def test_fields_and_json_round_trip():
    spec = LabelSpec({1: "b", 0: "a"}, thing_label_ids=[1], ignore_index=-1, raw_to_label={7: 0, 9: -1})
    assert spec.num_labels == 2
    assert spec.thing_label_ids == (1,)
    assert spec.stuff_label_ids == (0,)
    assert LabelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert list(spec.id2label) == [0, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {}}, "without a gap"),
        ({"id2label": {1: "a", 2: "b"}}, r"without a gap, got \[1, 2\]"),
        ({"id2label": {0: "a"}, "thing_label_ids": (1,)}, r"thing_label_ids \[1\] .* 0..0"),
        ({"id2label": {0: "a"}, "raw_to_label": {5: 3}}, "raw_to_label maps 5 to 3"),
        ({"id2label": {0: "a", 1: "b"}, "ignore_index": 1}, "ignore_index 1 is also the label 'b'"),
        ({"id2label": {0: "a"}, "things": [0]}, "unknown keys"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LabelSpec.from_dict(fields)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_class_labels(kind):
    SPEC.check_class_labels(kind([0, 2, 2]), "image 0")
    with pytest.raises(ValueError, match=r"image 3: label 7 .* allowed: 0..2"):
        SPEC.check_class_labels(kind([0, 7]), "image 3")
    with pytest.raises(ValueError, match="label -1"):
        SPEC.check_class_labels(kind([-1, 0]), "image 3")


def test_one_based_labels_are_recognised():
    with pytest.raises(ValueError, match="1-based"):
        SPEC.check_class_labels([1, 3], "a.json")
    with pytest.raises(ValueError, match=r"allowed: 0\.\.2$"):
        SPEC.check_class_labels([0, 3], "a.json")
    with pytest.raises(ValueError, match="1-based"):
        SPEC.check_semantic_map(np.array([[1, 3, 255]], dtype=np.uint8), "a.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_semantic_map(dtype):
    SPEC.check_semantic_map(np.array([[0, 2], [255, 1]], dtype=dtype), "a.png")
    with pytest.raises(ValueError, match=r"a.png: label 254 .* 0..2; ignore_index is 255"):
        SPEC.check_semantic_map(np.array([[0, 254]]), "a.png")
    with pytest.raises(ValueError, match="integers, got float32"):
        SPEC.check_semantic_map(np.zeros((2, 2), dtype=np.float32), "a.png")
    SPEC.check_semantic_map(np.zeros((0, 0), dtype=dtype), "a.png")


def test_map_raw():
    spec = LabelSpec({0: "a", 1: "b"}, raw_to_label={10: 1, 20: 0, 30: 255})
    raw = np.array([[10, 20], [30, 255]], dtype=np.uint8)
    mapped = spec.map_raw(raw, "a.png")
    assert mapped.tolist() == [[1, 0], [255, 255]]
    assert mapped.dtype == np.int64
    with pytest.raises(ValueError, match=r"a.png: raw value 11 .* known: \[10, 20, 30, 255\]"):
        spec.map_raw(np.array([[11]]), "a.png")
    assert SPEC.map_raw(raw, "a.png").tolist() == raw.tolist()
