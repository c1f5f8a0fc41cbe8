"""PanopticQuality: hand-sized maps, and a plain reading of the published algorithm on random maps."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_maskformer.evaluation import PanopticQuality
from hf_maskformer.model.masks import panoptic_png_to_ids

# 4 x 4: stuff 0 above, two things of class 1 below
REFERENCE = {
    "segmentation": np.array([[1, 1, 1, 1], [1, 1, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]),
    "segments_info": [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 1}, {"id": 3, "label_id": 1}],
}


def entry(segmentation, *segments):
    """Segments as (id, label) or (id, label, iscrowd)."""
    infos = [dict(zip(("id", "category_id", "iscrowd"), segment, strict=False)) for segment in segments]
    return {"segmentation": np.array(segmentation), "segments_info": infos}


def counts(result, label):
    one = result["per_category"][label]
    return one["true_positives"], one["false_positives"], one["false_negatives"]


def slow_panoptic_quality(predictions, references, num_labels, thing_label_ids, width=None):
    """The COCO panoptic evaluation pixel set by pixel set, with Python dicts; Boundary PQ of that width if given."""
    stat = {label: {"iou": 0.0, "tp": 0, "fp": 0, "fn": 0} for label in range(num_labels)}
    for prediction, reference in zip(predictions, references, strict=True):
        count_image(stat, prediction, reference, width)
    things = set(thing_label_ids)
    pq, sq, rq = average(stat.values())
    return {
        "pq": pq,
        "sq": sq,
        "rq": rq,
        "pq_things": average(stat[label] for label in sorted(things))[0],
        "pq_stuff": average(stat[label] for label in sorted(set(stat) - things))[0],
        "counts": [(one["tp"], one["fp"], one["fn"]) for one in stat.values()],
    }


def count_image(stat, prediction, reference, width):
    """Adds one image to the counts and the IoU sums of the classes."""
    theirs, own = segment_pixels(prediction), segment_pixels(reference)
    crowds, matched_references, matched_predictions = {}, set(), set()
    for actual in reference["segments_info"]:
        if actual.get("iscrowd"):
            crowds[actual["category_id"]] = own.get(actual["id"], set())
            continue
        for predicted in prediction["segments_info"]:
            if predicted["category_id"] != actual["category_id"]:
                continue
            pair = own.get(actual["id"], set()), theirs[predicted["id"]]
            iou = set_iou(*pair, own["void"])
            if width is not None and iou:
                shape = reference["segmentation"].shape
                iou = min(iou, set_iou(*(edge(pixels, width, shape) for pixels in pair), own["void"]))
            if iou > 0.5:
                stat[actual["category_id"]]["tp"] += 1
                stat[actual["category_id"]]["iou"] += iou
                matched_references.add(actual["id"])
                matched_predictions.add(predicted["id"])
        stat[actual["category_id"]]["fn"] += actual["id"] not in matched_references
    for predicted in prediction["segments_info"]:
        pixels, label = theirs[predicted["id"]], predicted["category_id"]
        excused = len(pixels & own["void"]) + len(pixels & crowds.get(label, set()))
        stat[label]["fp"] += predicted["id"] not in matched_predictions and excused / len(pixels) <= 0.5


def segment_pixels(one):
    """The set of places of each id, and of "void": those of no listed id."""
    known = {segment["id"] for segment in one["segments_info"]}
    pixels = {"void": set()}
    for place, value in np.ndenumerate(one["segmentation"]):
        pixels.setdefault(int(value) if value in known else "void", set()).add(place)
    return pixels


def set_iou(own, theirs, void):
    """Void is in no union."""
    common = len(own & theirs)
    return common / (len(own) + len(theirs) - common - len(theirs & void)) if common else 0.0


def average(stats):
    """Mean PQ, SQ and RQ of the classes that were seen."""
    values = []
    for one in stats:
        if one["tp"] + one["fp"] + one["fn"]:
            weight = one["tp"] + 0.5 * one["fp"] + 0.5 * one["fn"]
            sq = one["iou"] / one["tp"] if one["tp"] else 0.0
            values.append((one["iou"] / weight, sq, one["tp"] / weight))
    return np.mean(values, axis=0) if values else np.full(3, np.nan)


def edge(pixels, width, shape):
    """The pixels of a set that have, at most `width` steps away, a place outside of the set or of the image."""
    mask = np.zeros(shape, dtype=bool)
    for place in pixels:
        mask[place] = True
    padded = np.pad(mask, width)
    size = 2 * width + 1
    return {(row, column) for row, column in pixels if not padded[row : row + size, column : column + size].all()}


def random_entry(rng, shape, num_labels, *, crowd, base=None, side=3, copied=0.85):
    """Random blocks of ids; `base` gives a map that is partly copied, so that segments match."""
    coarse = rng.integers(0, 8, size=(shape[0] // side + 1, shape[1] // side + 1))
    ids = np.kron(coarse, np.ones((side, side), dtype=np.int64))[: shape[0], : shape[1]] * 7
    if base is not None:
        ids = np.where(rng.random(shape) < copied, base, ids)
    present = [int(value) for value in np.unique(ids)]
    listed = [value for value in present if rng.random() < 0.85]
    segments = [
        {"id": value, "category_id": int(value // 7 % num_labels), "iscrowd": int(crowd and rng.random() < 0.25)}
        for value in rng.permutation(listed).tolist()
    ]
    return {"segmentation": ids, "segments_info": segments}


def test_perfect_prediction():
    result = PanopticQuality([1], 2).update([REFERENCE], [REFERENCE]).compute()
    assert [result[key] for key in ("pq", "sq", "rq", "pq_things", "pq_stuff")] == [1.0] * 5
    assert counts(result, 0) == (1, 0, 0)
    assert counts(result, 1) == (2, 0, 0)


def test_hand_sized_table():
    # stuff: 6 of 8 pixels, nothing else -> 0.75; thing 2: 4 of its 4 and 2 of stuff -> 4 / 6; thing 3 missed;
    # segment 9 lies wrongly on thing 3
    prediction = entry([[5, 5, 5, 5], [6, 6, 5, 5], [6, 6, 9, 9], [6, 6, 9, 9]], (5, 0), (6, 1), (9, 0))
    result = PanopticQuality([1], 2).update([prediction], [REFERENCE]).compute()
    assert counts(result, 0) == (1, 1, 0)
    assert counts(result, 1) == (1, 0, 1)
    assert result["per_category"][0]["sq"] == 0.75
    assert result["per_category"][0]["pq"] == pytest.approx(0.75 / 1.5, abs=1e-12)
    assert result["per_category"][1]["pq"] == pytest.approx((4 / 6) / 1.5, abs=1e-12)
    assert result["pq"] == pytest.approx((0.75 / 1.5 + (4 / 6) / 1.5) / 2, abs=1e-12)
    assert result["pq_things"] == result["per_category"][1]["pq"]
    assert result["pq_stuff"] == result["per_category"][0]["pq"]
    assert result["rq"] == pytest.approx(1 / 1.5, abs=1e-12)


def test_iou_of_exactly_one_half_is_no_match():
    reference = entry([[1, 1, 0, 0]], (1, 0))
    prediction = entry([[1, 0, 0, 0]], (1, 0))
    result = PanopticQuality([0], 1).update([prediction], [reference]).compute()
    assert counts(result, 0) == (0, 1, 1)  # half is not above one half
    assert result["pq"] == 0.0


def test_void_of_the_reference_is_in_no_union():
    reference = entry([[1, 1, 8, 8], [1, 1, 8, 8]], (1, 0))  # id 8 is in no segment: void
    prediction = entry([[1, 1, 1, 1], [1, 1, 1, 1]], (1, 0))
    result = PanopticQuality([0], 1).update([prediction], [reference]).compute()
    assert counts(result, 0) == (1, 0, 0)
    assert result["sq"] == 1.0


@pytest.mark.parametrize(("on_void", "false_positives"), [(2, 1), (3, 0)])
def test_prediction_mostly_on_void_is_dropped(on_void, false_positives):
    reference = entry([[0] * on_void + [1] * (8 - on_void)], (1, 1))
    prediction = entry([[3] * 4 + [0] * 4], (3, 0))
    result = PanopticQuality([0], 2).update([prediction], [reference]).compute()
    assert counts(result, 0) == (0, false_positives, 0)
    assert counts(result, 1) == (0, 0, 1)


def test_crowd_is_no_miss_and_excuses_only_its_class():
    reference = entry([[1, 1, 1, 1, 2, 2, 2, 2]], (1, 0, 1), (2, 1))
    same = entry([[5, 5, 5, 5, 6, 6, 6, 6]], (5, 0), (6, 1))
    other = entry([[5, 5, 5, 5, 6, 6, 6, 6]], (5, 2), (6, 1))
    result = PanopticQuality([0, 1, 2], 3).update([same, other], [reference, reference]).compute()
    assert counts(result, 0) == (0, 0, 0)
    assert counts(result, 1) == (2, 0, 0)
    assert counts(result, 2) == (0, 1, 0)
    assert result["pq"] == 0.5  # class 0 was never counted


def test_pixels_of_unlisted_ids_are_void_in_the_prediction():
    prediction = entry([[1, 1, 1, 1], [1, 1, 1, 1], [2, 2, 99, 3], [2, 2, 3, 3]], (1, 0), (2, 1), (3, 1))
    result = PanopticQuality([1], 2).update([prediction], [REFERENCE]).compute()
    assert counts(result, 1) == (2, 0, 0)
    assert result["per_category"][1]["sq"] == pytest.approx((1 + 3 / 4) / 2, abs=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_published_algorithm(seed):
    rng = np.random.default_rng(seed)
    num_labels = int(rng.integers(1, 6))
    things = rng.choice(num_labels, size=int(rng.integers(0, num_labels + 1)), replace=False).tolist()
    shape = tuple(rng.integers(6, 20, size=2).tolist())
    references = [random_entry(rng, shape, num_labels, crowd=True) for _ in range(3)]
    predictions = [
        random_entry(rng, shape, num_labels, crowd=False, base=reference["segmentation"]) for reference in references
    ]
    expected = slow_panoptic_quality(predictions, references, num_labels, things)
    result = PanopticQuality(things, num_labels).update(predictions, references).compute()
    assert [counts(result, label) for label in range(num_labels)] == expected["counts"]
    for key in ("pq", "sq", "rq", "pq_things", "pq_stuff"):
        np.testing.assert_allclose(result[key], expected[key], rtol=0, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("seed", range(60))
def test_boundary_quality_equals_the_published_algorithm(seed):
    rng = np.random.default_rng(seed)
    num_labels = int(rng.integers(1, 6))
    shape = tuple(rng.integers(12, 30, size=2).tolist())
    width = int(rng.integers(1, 4))
    references = [random_entry(rng, shape, num_labels, crowd=True, side=8) for _ in range(3)]
    predictions = [
        random_entry(rng, shape, num_labels, crowd=False, base=reference["segmentation"], copied=0.98)
        for reference in references
    ]
    expected = slow_panoptic_quality(predictions, references, num_labels, [0], width)
    metric = PanopticQuality([0], num_labels, boundary=True, dilation_ratio=width / np.hypot(*shape))
    result = metric.update(predictions, references).compute()
    assert [counts(result, label) for label in range(num_labels)] == expected["counts"]
    for key in ("pq", "sq", "rq", "pq_things", "pq_stuff"):
        np.testing.assert_allclose(result[key], expected[key], rtol=0, atol=1e-9, err_msg=key)


def test_boundary_quality_by_hand():
    # 12 x 12 with one segment; the prediction misses its last two columns. Boundary 1 wide: 44 and 40 pixels,
    # 32 in common: 10 above and below and the 12 of the left column, the corners once
    reference = entry(np.ones((12, 12), dtype=int), (1, 0))
    segmentation = np.ones((12, 12), dtype=int)
    segmentation[:, 10:] = 0
    prediction = entry(segmentation, (1, 0))
    common = 10 + 10 + 12 - 2
    metric = PanopticQuality([0], 1, boundary=True, dilation_ratio=0.05).update([prediction], [reference])
    assert metric.compute()["sq"] == pytest.approx(common / (44 + 40 - common), abs=1e-12)
    assert PanopticQuality([0], 1).update([prediction], [reference]).compute()["sq"] == pytest.approx(10 / 12)
    with pytest.raises(ValueError, match=r"other\.boundary must be True"):
        metric.merge(PanopticQuality([0], 1))


def test_merge_is_one_pass():
    rng = np.random.default_rng(3)
    references = [random_entry(rng, (9, 12), 3, crowd=True) for _ in range(5)]
    predictions = [random_entry(rng, (9, 12), 3, crowd=False, base=one["segmentation"]) for one in references]
    whole = PanopticQuality([0], 3).update(predictions, references)
    first = PanopticQuality([0], 3).update(predictions[:2], references[:2])
    first.merge(PanopticQuality([0], 3).update(predictions[2:], references[2:]))
    for key, value in whole.compute().items():
        if key != "per_category":
            assert first.compute()[key] == pytest.approx(value, abs=1e-12, nan_ok=True)
    assert [counts(first.compute(), k) for k in range(3)] == [counts(whole.compute(), k) for k in range(3)]


def test_empty_results_and_empty_references():
    nothing = entry([[0, 0]])
    result = PanopticQuality([0], 1).update([nothing], [nothing]).compute()
    assert all(np.isnan(result[key]) for key in ("pq", "sq", "rq", "pq_things", "pq_stuff"))
    something = entry([[1, 1]], (1, 0))
    assert PanopticQuality([0], 1).update([nothing], [something]).compute()["pq"] == 0.0
    # all of it lies on void, so it is not counted
    assert np.isnan(PanopticQuality([0], 1).update([something], [nothing]).compute()["pq"])


def test_tensors():
    prediction = {**REFERENCE, "segmentation": torch.from_numpy(REFERENCE["segmentation"]).to(torch.int32)}
    assert PanopticQuality([1], 2).update([prediction], [REFERENCE]).compute()["pq"] == 1.0


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (entry([[1, 1], [1, 1]], (1, 2)), r"image 0, prediction, segments_info: label 2 .* 0\.\.1"),
        (entry([[1, 1], [1, 1]], (1, 0), (1, 1)), "segment id 1 appears more than once"),
        (entry([[1, 1], [1, 1]], (1, 0), (7, 1)), "segment id 7 of segments_info has no pixel"),
        (entry([[1, 1]], (1, 0)), r"shape \(1, 2\) but reference \(2, 2\)"),
        (entry([[1.0, 1.0]], (1, 0)), "must be .* integer ids, got float64"),
        ({"segmentation": np.ones((2, 2), int), "segments_info": [{"id": 1}]}, "neither label_id nor category_id"),
        (
            entry([[1, 1], [1, 1]], (1.7, 0)),
            r"image 0, prediction, segments_info: id must be a whole number, got 1\.7",
        ),
        (entry([[1, 1], [1, 1]], (1, 0.9)), r"image 0, prediction, segments_info: label must be a whole .* got 0\.9"),
        (entry([[1, 1], [1, 1]], (2**70, 0)), r"segments_info: id must lie in -2\^63\.\.2\^63 - 1, got 1180591"),
        (entry([[1, 1], [1, 1]], (None, 0)), "image 0, prediction, segments_info: id is None"),
        ({"segmentation": np.ones((2, 2), int), "segments_info": [{"label_id": 1}]}, "segments_info: id is missing"),
        (
            {"segmentation": np.ones((2, 2), int), "segments_info": [1]},
            "segments_info: must be a dict with id, got int",
        ),
        ({"segmentation": np.ones((2, 2), int), "segments_info": None}, "prediction: segments_info is None"),
        ({"segmentation": np.ones((2, 2), int), "segments_info": 1}, "segments_info must be a list.* got int"),
    ],
)
def test_wrong_entries_are_refused(prediction, message):
    with pytest.raises(ValueError, match=message):
        PanopticQuality([1], 2).update([prediction], [entry([[1, 1], [1, 1]], (1, 0))])


def test_large_unsigned_ids_are_told_apart():
    ids = np.array([[2**60, 2**60, 2**60 + 1, 2**60 + 1, 2**64 - 3, 2**64 - 3]], dtype=np.uint64)
    listed = entry(ids, (2**60, 0), (2**60 + 1, 1))
    result = PanopticQuality([0], 2).update([listed], [listed]).compute()
    assert [counts(result, label) for label in range(2)] == [(1, 0, 0), (1, 0, 0)]
    with pytest.raises(ValueError, match="segment id -3 of segments_info has no pixel"):
        PanopticQuality([0], 2).update([entry(ids, (2**60, 0), (-3, 1))], [listed])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"thing_label_ids must be a whole number, got 0\.9"):
        PanopticQuality([0.9], 2)
    with pytest.raises(ValueError, match="thing_label_ids must be a list, an array or a tensor, got int"):
        PanopticQuality(1, 2)
    with pytest.raises(ValueError, match=r"thing_label_ids: label 2 is outside the allowed 0\.\.1"):
        PanopticQuality([2], 2)
    with pytest.raises(ValueError, match=r"other\.thing_label_ids must be \(0,\)"):
        PanopticQuality([0], 2).merge(PanopticQuality([1], 2))


def test_real_reference_against_itself(shared_data):
    folder = shared_data / "nuclei" / "val"
    panoptic = json.loads((folder / "panoptic.json").read_text())
    labels = {category["id"]: index for index, category in enumerate(panoptic["categories"])}
    things = [labels[category["id"]] for category in panoptic["categories"] if category["isthing"]]
    metric = PanopticQuality(things, len(labels))
    for annotation in panoptic["annotations"][:12]:
        with Image.open(folder / "panoptic" / annotation["file_name"]) as png:
            ids = panoptic_png_to_ids(np.asarray(png.convert("RGB")))
        segments = [{"id": one["id"], "label_id": labels[one["category_id"]]} for one in annotation["segments_info"]]
        reference = {"segmentation": ids, "segments_info": segments}
        metric.update([reference], [reference])
    result = metric.compute()
    assert [result[key] for key in ("pq", "pq_things", "pq_stuff")] == [1.0] * 3
    assert counts(result, things[0])[0] > 100
