"""MaskAveragePrecision: hand-sized cases and parity with pycocotools on random scenes, also for Boundary AP."""

import contextlib
import io
import json
from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage

from hf_maskformer.evaluation import MaskAveragePrecision
from hf_maskformer.model.masks import encode_rles

SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")


def box_masks(*boxes, size=(8, 8)):
    """Masks from (top, left, height, width)."""
    masks = np.zeros((len(boxes), *size), dtype=bool)
    for mask, (top, left, height, width) in zip(masks, boxes, strict=True):
        mask[top : top + height, left : left + width] = True
    return masks


def predicted(masks, scores, labels):
    return {"masks": masks, "scores": np.array(scores, dtype=float), "labels": np.array(labels, dtype=int)}


def actual(masks, labels, **optional):
    return {"masks": masks, "labels": np.array(labels, dtype=int), **optional}


def coco_code(mask):
    from pycocotools import mask as coco_mask

    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def coco_boundary(code):
    """The boundary of a mask as boundary-iou-api has it: the mask without what repeated erosion leaves of it."""
    from pycocotools import mask as coco_mask

    mask = coco_mask.decode(code).astype(bool)
    width = max(1, round(0.02 * float(np.hypot(*mask.shape))))
    return coco_code(mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=width))


def smaller_iou(evaluation, compute_iou, image_id, label):
    """IoU of masks, or of boundaries where that is smaller and the reference is no crowd."""
    iou = np.array(compute_iou(image_id, label))
    annotations = evaluation._gts[image_id, label], evaluation._dts[image_id, label]
    codes = [[annotation["segmentation"] for annotation in group] for group in annotations]
    for annotation in (*annotations[0], *annotations[1]):
        annotation["segmentation"] = coco_boundary(annotation["segmentation"])
    boundary_iou = np.array(compute_iou(image_id, label))
    for group, group_codes in zip(annotations, codes, strict=True):
        for annotation, code in zip(group, group_codes, strict=True):
            annotation["segmentation"] = code
    if not iou.size:
        return iou
    return np.where([one["iscrowd"] for one in annotations[0]], iou, np.minimum(iou, boundary_iou))


def coco_summary(predictions, references, num_labels, boundary=False):
    """The same figures from pycocotools: its six AP numbers and AP per class."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images, annotations, results = [], [], []
    for image_id, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        height, width = reference["masks"].shape[1:]
        images.append({"id": image_id, "height": height, "width": width})
        areas = reference.get("area", reference["masks"].sum(axis=(1, 2)))
        for index, mask in enumerate(reference["masks"]):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(reference["labels"][index]),
                    "segmentation": coco_code(mask),
                    "area": float(areas[index]),
                    "iscrowd": int(reference["iscrowd"][index]),
                    "bbox": [0, 0, 1, 1],
                }
            )
        for index, mask in enumerate(prediction["masks"]):
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(prediction["labels"][index]),
                    "segmentation": coco_code(mask),
                    "score": float(prediction["scores"][index]),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label, "name": str(label)} for label in range(num_labels)],
            "info": {},
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        if boundary:
            evaluation.computeIoU = partial(smaller_iou, evaluation, evaluation.computeIoU)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (T, R, K): all areas, 100 detections
    per_category = []
    for label in range(num_labels):
        known = precision[:, :, label][precision[:, :, label] > -1]
        per_category.append(float(known.mean()) if known.size else -1.0)
    summary = dict(zip(SUMMARY, evaluation.stats[:6].tolist(), strict=True))
    return {**summary, "per_category": per_category}


def random_scene(rng, num_labels, *, crowd):
    """Rectangles with holes; detections are shifted copies, doubles, inventions and empty masks."""
    height, width = rng.integers(40, 180, size=2)

    def rectangle():
        mask = np.zeros((height, width), dtype=bool)
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        mask[top : top + rng.integers(3, height), left : left + rng.integers(3, width)] = True
        if rng.random() < 0.3:
            mask[:: int(rng.integers(2, 5))] = False
        return mask

    count = int(rng.integers(0, 9))
    masks = np.array([rectangle() for _ in range(count)]).reshape(count, height, width)
    labels = rng.integers(0, num_labels, size=count)
    iscrowd = (rng.random(count) < 0.2) & crowd
    reference = {"masks": masks, "labels": labels, "iscrowd": iscrowd}
    if rng.random() < 0.5:
        reference["area"] = masks.sum(axis=(1, 2)) * rng.uniform(0.6, 1.4, size=count)
    found, found_labels = [np.zeros((height, width), dtype=bool)], [0]
    for mask, label in zip(masks, labels, strict=True):
        for _ in range(int(rng.integers(0, 4))):
            shift = tuple(rng.integers(-3, 4, size=2).tolist())
            found.append(np.roll(mask, shift, axis=(0, 1)))
            found_labels.append(int(label) if rng.random() < 0.9 else int(rng.integers(0, num_labels)))
    for _ in range(int(rng.integers(0, 4))):
        found.append(rectangle())
        found_labels.append(int(rng.integers(0, num_labels)))
    scores = rng.random(len(found)).round(1)  # many equal scores: the order of equals counts
    return predicted(np.array(found), scores, found_labels), reference


def assert_same(result, expected):
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(result[key], value, rtol=0, atol=1e-9, err_msg=key)


def test_perfect_and_half_overlap():
    masks = box_masks((0, 0, 4, 4), (4, 4, 4, 4))
    reference = actual(masks, [0, 0])
    assert MaskAveragePrecision(1).update([predicted(masks, [0.9, 0.8], [0, 0])], [reference]).compute()["map"] == 1.0
    # second detection: 12 of 16 pixels, IoU 0.75, found at the thresholds 0.5 to 0.75 (6 of 10)
    smaller = box_masks((0, 0, 4, 4), (4, 4, 3, 4))
    result = MaskAveragePrecision(1).update([predicted(smaller, [0.9, 0.8], [0, 0])], [reference]).compute()
    half = 51 / 101  # recall points up to 0.5 have precision 1
    assert result["map"] == pytest.approx((6 * 1 + 4 * half) / 10, abs=1e-12)
    assert result["map_50"] == result["map_75"] == 1.0
    assert result["map_small"] == result["map"]
    assert result["map_medium"] == result["map_large"] == -1.0


def test_false_positive_with_the_higher_score():
    masks = box_masks((0, 0, 4, 4), (4, 4, 4, 4))
    prediction = predicted(masks, [0.9, 0.8], [0, 0])
    result = MaskAveragePrecision(1).update([prediction], [actual(masks[1:], [0])]).compute()
    assert result["map"] == pytest.approx(0.5, abs=1e-12)


def test_absent_class_is_minus_one_and_in_no_mean():
    masks = box_masks((0, 0, 4, 4))
    prediction = predicted(np.concatenate([masks, masks]), [0.9, 0.8], [0, 2])
    result = MaskAveragePrecision(3).update([prediction], [actual(masks, [0])]).compute()
    assert result["per_category"] == [pytest.approx(1.0), -1.0, -1.0]
    assert result["map"] == pytest.approx(1.0)


def test_detections_on_a_crowd_are_not_counted():
    crowd, one = box_masks((0, 0, 4, 8)), box_masks((4, 0, 4, 4))
    reference = actual(np.concatenate([crowd, one]), [0, 0], iscrowd=np.array([1, 0]))
    detections = np.concatenate([box_masks((0, 0, 4, 4), (0, 4, 4, 4)), one])
    result = MaskAveragePrecision(1).update([predicted(detections, [0.9, 0.8, 0.7], [0, 0, 0])], [reference])
    assert result.compute()["map"] == pytest.approx(1.0)
    without = MaskAveragePrecision(1).update([predicted(detections, [0.9, 0.8, 0.7], [0, 0, 0])], [actual(one, [0])])
    assert without.compute()["map"] == pytest.approx(1 / 3)


def test_area_of_the_annotation_decides_the_size_range():
    masks = box_masks((0, 0, 4, 4))
    reference = actual(masks, [0], area=[5000.0])
    result = MaskAveragePrecision(1).update([predicted(masks, [0.9], [0])], [reference]).compute()
    assert (result["map_small"], result["map_medium"], result["map_large"]) == (-1.0, pytest.approx(1.0), -1.0)


@pytest.mark.parametrize("seed", range(64))
def test_equals_pycocotools(seed):
    rng = np.random.default_rng(seed)
    num_labels = int(rng.integers(1, 4))
    scenes = [random_scene(rng, num_labels, crowd=seed % 2 == 1) for _ in range(int(rng.integers(1, 5)))]
    predictions, references = zip(*scenes, strict=True)
    result = MaskAveragePrecision(num_labels).update(predictions, references).compute()
    assert_same(result, coco_summary(predictions, references, num_labels))


def test_more_than_100_detections_equal_pycocotools():
    rng = np.random.default_rng(5)
    tops, lefts = rng.integers(0, 40, size=(2, 150))
    masks = box_masks(*((top, left, 12, 12) for top, left in zip(tops, lefts, strict=True)), size=(52, 52))
    prediction = predicted(masks, rng.random(150), np.zeros(150))
    reference = actual(masks[::7], np.zeros(len(masks[::7])), iscrowd=np.zeros(len(masks[::7]), dtype=bool))
    result = MaskAveragePrecision(1).update([prediction], [reference]).compute()
    assert 0 < result["map"] < 1
    assert_same(result, coco_summary([prediction], [reference], 1))


def test_rle_tensors_and_lists_give_the_same():
    rng = np.random.default_rng(11)
    prediction, reference = random_scene(rng, 2, crowd=True)
    while not len(reference["masks"]):
        prediction, reference = random_scene(rng, 2, crowd=True)
    expected = MaskAveragePrecision(2).update([prediction], [reference]).compute()
    coded = {**prediction, "masks": encode_rles(prediction["masks"])}
    tensors = {key: torch.as_tensor(value) for key, value in reference.items()}
    assert MaskAveragePrecision(2).update([coded], [tensors]).compute() == expected
    listed = {key: value.tolist() for key, value in prediction.items() if key != "masks"}
    coded_reference = {**reference, "masks": encode_rles(reference["masks"])}
    result = MaskAveragePrecision(2).update([{**listed, "masks": list(prediction["masks"])}], [coded_reference])
    assert result.compute() == expected


def test_merge_is_one_pass():
    rng = np.random.default_rng(2)
    predictions, references = zip(*(random_scene(rng, 2, crowd=True) for _ in range(6)), strict=True)
    whole = MaskAveragePrecision(2).update(predictions, references)
    first = MaskAveragePrecision(2).update(predictions[:1], references[:1])
    second = MaskAveragePrecision(2).update(predictions[1:], references[1:])
    assert first.merge(second).compute() == whole.compute()
    assert second.num_images == 5


def test_empty_images():
    nothing = predicted(np.zeros((0, 8, 8), dtype=bool), [], [])
    no_reference = actual(np.zeros((0, 8, 8), dtype=bool), [])
    result = MaskAveragePrecision(2).update([nothing], [no_reference]).compute()
    assert result == {**dict.fromkeys(SUMMARY, -1.0), "per_category": [-1.0, -1.0]}
    masks = box_masks((0, 0, 4, 4))
    missed = MaskAveragePrecision(1).update([predicted([], [], [])], [actual(masks, [0])]).compute()
    assert missed["map"] == 0.0
    invented = MaskAveragePrecision(1).update([predicted(masks, [0.5], [0])], [actual([], [])]).compute()
    assert invented["map"] == -1.0


def crowded_scene(rng):
    """Many near copies of a few objects of one class, scores with ties: detections compete for their references."""
    bases = [(*rng.integers(0, 40, size=2).tolist(), 20, 20) for _ in range(4)]
    boxes = [
        (*np.add(bases[index % 4][:2], rng.integers(-3, 4, size=2)).clip(0).tolist(), 20, 20) for index in range(30)
    ]
    references = box_masks(*bases, size=(64, 64))
    iscrowd = rng.random(4) < 0.25
    scores = rng.integers(1, 6, size=30) / 5
    return predicted(box_masks(*boxes, size=(64, 64)), scores, [0] * 30), actual(references, [0] * 4, iscrowd=iscrowd)


@pytest.mark.parametrize("seed", range(20))
def test_competing_detections_equal_pycocotools(seed):
    rng = np.random.default_rng(seed)
    predictions, references = zip(*(crowded_scene(rng) for _ in range(3)), strict=True)
    result = MaskAveragePrecision(1).update(predictions, references).compute()
    assert_same(result, coco_summary(predictions, references, 1))


def test_boundary_ap_by_hand():
    # 20 x 20 image: the boundary is round(0.1 * 28.28) = 3 wide. A square of side 16 has 256 pixels, 100 of them in
    # the interior; the detection, one column narrower, has 240 and 90. 240 - 100 pixels are boundary in both.
    reference = box_masks((0, 0, 16, 16), size=(20, 20))
    detection = box_masks((0, 0, 16, 15), size=(20, 20))
    assert 0.80 < 140 / (156 + 150 - 140) < 0.85 < 0.90 < 15 / 16 < 0.95
    entries = [predicted(detection, [0.9], [0])], [actual(reference, [0])]
    assert MaskAveragePrecision(1, "segm").update(*entries).compute()["map"] == pytest.approx(0.9)
    boundary = MaskAveragePrecision(1, "boundary", dilation_ratio=0.1).update(*entries).compute()
    assert boundary["map"] == pytest.approx(0.7)
    assert boundary["map_small"] == boundary["map"]  # by the area of the mask


@pytest.mark.parametrize("seed", range(30))
def test_boundary_ap_equals_pycocotools_with_the_smaller_iou(seed):
    rng = np.random.default_rng(seed)
    num_labels = int(rng.integers(1, 4))
    scenes = [random_scene(rng, num_labels, crowd=seed % 2 == 1) for _ in range(2)]
    predictions, references = zip(*scenes, strict=True)
    result = MaskAveragePrecision(num_labels, "boundary").update(predictions, references).compute()
    assert_same(result, coco_summary(predictions, references, num_labels, boundary=True))


def test_boundary_iou_is_capped_by_the_mask_iou():
    # a ring and its filled square: hardly any difference at the outline, but half of the area
    filled = box_masks((0, 0, 20, 20), size=(24, 24))
    ring = filled.copy()
    ring[0, 3:17, 3:17] = False
    entries = [predicted(ring, [0.9], [0])], [actual(filled, [0])]
    mask = MaskAveragePrecision(1).update(*entries).compute()
    boundary = MaskAveragePrecision(1, "boundary").update(*entries).compute()
    assert mask["map_50"] == pytest.approx(1.0)
    assert boundary == mask


def test_boundary_does_not_touch_the_crowd_rule():
    crowd, one = box_masks((0, 0, 30, 30), (32, 32, 8, 8), size=(40, 40))
    reference = actual(np.stack([crowd, one]), [0, 0], iscrowd=[1, 0])
    inside = box_masks((10, 10, 6, 6), size=(40, 40))  # deep in the crowd, far from its boundary
    detections = predicted(np.concatenate([inside, one[None]]), [0.9, 0.8], [0, 0])
    result = MaskAveragePrecision(1, "boundary").update([detections], [reference]).compute()
    assert result["map"] == pytest.approx(1.0)


def test_boundary_merge_needs_the_same_settings():
    with pytest.raises(ValueError, match=r"other\.iou_type must be 'boundary'"):
        MaskAveragePrecision(1, "boundary").merge(MaskAveragePrecision(1))
    with pytest.raises(ValueError, match=r"other\.dilation_ratio must be 0\.01"):
        MaskAveragePrecision(1, "boundary", 0.01).merge(MaskAveragePrecision(1, "boundary"))
    with pytest.raises(ValueError, match="dilation_ratio must be above 0 and at most 1, got 0"):
        MaskAveragePrecision(1, "boundary", dilation_ratio=0)


def test_state_is_small():
    rng = np.random.default_rng(4)
    predictions, references = zip(*(random_scene(rng, 2, crowd=False) for _ in range(20)), strict=True)
    metric = MaskAveragePrecision(2).update(predictions, references)
    count = sum(len(entry["labels"]) for entry in (*predictions, *references))
    assert sum(part.nbytes for record in metric.records for part in record) <= 32 * count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([3])}, r"image 0, prediction: label 3 .* 0\.\.1"),
        ({"labels": np.array([0.5])}, "labels must be integers"),
        ({"scores": np.array([0.5, 0.5])}, r"scores must have one value per label \(1\), got 2"),
        ({"scores": np.array([np.nan])}, "scores contain nan"),
        ({"masks": box_masks((0, 0, 2, 2), (0, 0, 2, 2))}, r"one mask per label \(1\), got 2"),
        ({"masks": [{"size": [8, 8], "counts": [5]}]}, r"image 0, prediction: RLE counts cover 5 pixels"),
        ({"masks": box_masks((0, 0, 2, 2))[0]}, r"one mask per label \(1\), got 8"),
        ({"masks": box_masks((0, 0, 2, 2))[0][None, None]}, r"\(N, H, W\) or a list of RLE, got one of shape"),
        ({"masks": box_masks((0, 0, 2, 2), size=(4, 8))}, r"one \(height, width\), got \[\(4, 8\), \(8, 8\)\]"),
        (
            {"masks": np.full((1, 8, 8), -8.0)},
            r"image 0, prediction, mask 0: a floating.*may only hold 0 and 1, got -8",
        ),
        ({"masks": torch.full((1, 8, 8), torch.nan)}, r"image 0, prediction, mask 0: .* got nan: apply a threshold"),
        ({"masks": iter(())}, "prediction: masks must be a list, an array or a tensor, got tuple_iterator"),
        ({"masks": [[[0, 1], [0]]]}, "prediction: mask 0 cannot be read as an array"),
        ({"scores": ["high"]}, "prediction: scores must be numbers"),
        ({"scores": None}, "prediction: scores is None"),
    ],
)
def test_wrong_entries_are_refused(change, message):
    masks = box_masks((0, 0, 4, 4))
    with pytest.raises(ValueError, match=message):
        MaskAveragePrecision(2).update([{**predicted(masks, [0.5], [0]), **change}], [actual(masks, [0])])


@pytest.mark.parametrize("area", [np.nan, np.inf, -1.0])
def test_area_that_is_none_is_refused(area):
    masks = box_masks((0, 0, 4, 4), (4, 4, 4, 4))
    entries = [predicted(masks, [0.5, 0.5], [0, 0])], [actual(masks, [0, 0], area=[16.0, area])]
    with pytest.raises(ValueError, match=f"image 0, reference: area must be finite and at least 0, got {area}"):
        MaskAveragePrecision(1).update(*entries)


def test_unknown_iou_type_is_refused():
    with pytest.raises(ValueError, match=r"iou_type must be one of \['segm', 'boundary'\], got 'bbox'"):
        MaskAveragePrecision(2, iou_type="bbox")


def test_real_reference_against_itself(shared_data):
    content = json.loads((shared_data / "nuclei" / "val" / "instances.json").read_text())
    metric = MaskAveragePrecision(1)
    sizes = {}
    for annotation in content["annotations"]:
        sizes.setdefault(annotation["image_id"], []).append(annotation)
    chosen = [annotations for annotations in sizes.values() if len(annotations) <= 100][:15]
    for annotations in chosen:
        masks = [annotation["segmentation"] for annotation in annotations]
        labels = np.zeros(len(masks), dtype=int)
        reference = actual(masks, labels, area=np.array([annotation["area"] for annotation in annotations]))
        metric.update([predicted(masks, np.linspace(1, 0.1, len(masks)), labels)], [reference])
    result = metric.compute()
    assert result["map"] == pytest.approx(1.0, abs=1e-9)
    assert result["map_small"] == pytest.approx(1.0, abs=1e-9)
