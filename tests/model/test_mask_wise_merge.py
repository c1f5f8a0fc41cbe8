"""Mask-wise merging: each rule on hand-sized cases, a plain loop over the formula, and what must not matter."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.mask_wise_merge import mask_wise_segments
from hf_maskformer.model.postprocess import panoptic_segments
from hf_maskformer.model.resampling import FULL_EXTENT, resample, resize_maps

SURE = 30.0  # logit of a probability that is 1 in float32
THING, STUFF = 0, 1
RULES = {"thing_label_ids": {THING}, "label_ids_to_fuse": {STUFF}}


def merged(queries, masks, **settings):
    """Merge queries given as (label, probability), sigmoid classes, with masks of probabilities (Q, H, W)."""
    class_logits = torch.full((len(queries), 3), -SURE)
    for query, (label, probability) in enumerate(queries):
        class_logits[query, label] = torch.tensor(probability).logit()
    mask_logits = torch.tensor(masks, dtype=torch.float64).logit().clamp(-SURE, SURE).float()
    return mask_wise_segments(class_logits, mask_logits, activation="sigmoid", **{**RULES, **settings})


def row(*columns, length=10):
    """(1, length) mask that is 1 in the columns first..last."""
    first, last = columns
    return [[1.0 if first <= column <= last else 0.0 for column in range(length)]]


class TestRules:
    def test_score(self):
        """p q^2, q = 0.9 + 0.6 over area 2 + 1; the two pixels below 0.5 do not count."""
        result = merged([(THING, 0.8)], [[[0.9, 0.6, 0.4, 0.1]]], threshold=0.1)
        assert result["segmentation"].tolist() == [[1, 1, 0, 0]]
        assert result["segmentation"].dtype == torch.int32
        (segment,) = result["segments_info"]
        assert segment["score"] == pytest.approx(0.8 * (1.5 / 3) ** 2, abs=1e-6)
        assert (segment["id"], segment["label_id"], segment["was_fused"]) == (1, THING, False)

    def test_threshold_is_of_the_score_and_not_of_the_class(self):
        masks = [[[0.9, 0.6, 0.4, 0.1]]]  # scores 0.2
        assert merged([(THING, 0.8)], masks)["segments_info"] == []
        assert merged([(THING, 0.8)], masks, threshold=0.201)["segments_info"] == []
        assert len(merged([(THING, 0.8)], masks, threshold=0.199)["segments_info"]) == 1

    def test_a_score_at_the_threshold_stays(self):
        """0.5 * (3 / 4) ** 2 and its threshold are exact in binary."""
        assert len(merged([(THING, 0.5)], [row(0, 2)], threshold=0.28125)["segments_info"]) == 1

    def test_a_pixel_at_the_mask_threshold_is_outside(self):
        result = merged([(THING, 1.0)], [[[1.0, 0.5, 1.0]]], threshold=0.0)
        assert result["segmentation"].tolist() == [[1, 0, 1]]

    def test_a_mask_without_pixels_gives_nothing(self):
        result = merged([(THING, 1.0)], [[[0.4, 0.2]]], threshold=0.0, overlap_mask_area_threshold=0.0)
        assert result["segments_info"] == []
        assert not result["segmentation"].any()

    def test_the_better_score_is_on_top_whatever_the_order(self):
        masks = [row(0, 5), row(4, 9)]
        assert merged([(THING, 0.7), (THING, 0.9)], masks)["segmentation"].tolist() == [[2] * 4 + [1] * 6]
        assert merged([(THING, 0.9), (THING, 0.7)], masks)["segmentation"].tolist() == [[1] * 6 + [2] * 4]

    def test_a_good_mask_beats_a_better_class(self):
        """0.95 * (2 * 0.6 / 3) ** 2 against 0.8 * (2 / 3) ** 2."""
        result = merged([(THING, 0.95), (THING, 0.8)], [[[0.6, 0.6, 0.0]], [[0.0, 1.0, 1.0]]], threshold=0.0)
        assert result["segmentation"].tolist() == [[0, 1, 1]]

    @pytest.mark.parametrize(
        ("label", "covered", "kept"),
        [(THING, 4, True), (THING, 5, False), (STUFF, 2, True), (STUFF, 3, False)],
    )
    def test_published_overlaps(self, label, covered, kept):
        """Of a mask of ten pixels at most four may be taken from a thing and two from stuff."""
        result = merged([(THING, 0.99), (label, 0.4)], [row(0, covered - 1), row(0, 9)], threshold=0.1)
        expected = [1] * covered + [2 if kept else 0] * (10 - covered)
        assert result["segmentation"].tolist() == [expected]

    def test_stuff_can_have_the_overlap_of_things(self):
        settings = {"threshold": 0.1, "stuff_overlap_mask_area_threshold": None}
        result = merged([(THING, 0.99), (STUFF, 0.4)], [row(0, 3), row(0, 9)], **settings)
        assert result["segmentation"].tolist() == [[1] * 4 + [2] * 6]

    def test_without_known_things_every_label_has_the_overlap_of_things(self):
        result = merged([(THING, 0.99), (STUFF, 0.4)], [row(0, 3), row(0, 9)], threshold=0.1, thing_label_ids=None)
        assert len(result["segments_info"]) == 2

    def test_a_covered_mask_gives_nothing_even_without_an_overlap_rule(self):
        settings = {"overlap_mask_area_threshold": 0.0, "stuff_overlap_mask_area_threshold": 0.0}
        result = merged([(THING, 0.99), (STUFF, 0.9)], [row(0, 9), row(2, 8)], **settings)
        assert [segment["label_id"] for segment in result["segments_info"]] == [THING]

    def test_a_dropped_mask_leaves_its_pixels_to_the_next(self):
        masks = [row(0, 6), row(0, 8), row(7, 9)]  # the second keeps two of nine pixels
        result = merged([(THING, 0.99), (THING, 0.9), (THING, 0.8)], masks, threshold=0.1)
        assert result["segmentation"].tolist() == [[1] * 7 + [2] * 3]

    def test_stuff_of_one_class_shares_a_segment(self):
        masks = [row(0, 2), row(3, 5), row(6, 9)]
        result = merged([(STUFF, 0.7), (THING, 0.8), (STUFF, 0.9)], masks, threshold=0.1)
        assert result["segmentation"].tolist() == [[1, 1, 1, 2, 2, 2, 1, 1, 1, 1]]
        assert [(s["id"], s["label_id"], s["was_fused"]) for s in result["segments_info"]] == [
            (1, STUFF, True),
            (2, THING, False),
        ]
        assert result["segments_info"][0]["score"] == pytest.approx(0.9 * 0.8**2, abs=1e-6)

    def test_no_object_is_dropped(self):
        class_logits = torch.tensor([[1.0, 0.0, 1.5], [1.0, 0.0, 0.5]])
        result = mask_wise_segments(class_logits, torch.full((2, 2, 3), SURE), threshold=0.0)
        (segment,) = result["segments_info"]
        assert segment["score"] == pytest.approx(float(class_logits[1].softmax(0)[0]) * (6 / 7) ** 2, abs=1e-6)

    @pytest.mark.parametrize("size", [None, (8, 9)])
    def test_no_segment_gives_zeros(self, size):
        result = mask_wise_segments(torch.zeros(2, 3), torch.full((2, 4, 5), -9.0), target_size=size)
        assert result["segments_info"] == []
        assert torch.equal(result["segmentation"], torch.zeros(size or (4, 5), dtype=torch.int32))


def plain_merge(class_logits, mask_logits, size, activation, threshold, mask_threshold, parts, fuse, things):
    """The formula as one loop over whole masks in float64."""
    num_labels = class_logits.shape[-1] - 1
    if activation == "softmax":
        probabilities = class_logits.double().softmax(-1)
    else:
        probabilities = class_logits[:, :-1].double().sigmoid()
    p, labels = probabilities.max(-1)
    m = F.interpolate(mask_logits[None].double().sigmoid(), size=size, mode="bilinear", align_corners=False)[0]
    b = m > mask_threshold
    s = p * ((m * b).sum((1, 2)) / (b.sum((1, 2)) + 1)) ** 2
    segmentation, segments, by_label = torch.zeros(size, dtype=torch.int32), [], {}
    for query in s.argsort(descending=True).tolist():
        label, area = int(labels[query]), int(b[query].sum())
        if label == num_labels or s[query] < threshold or area == 0:
            continue
        filled = segmentation > 0
        free = b[query] & ~filled
        limit = 1 - parts[0 if label in things else 1]
        if free.sum() == 0 or (b[query] & filled).sum() / area > limit:
            continue
        if label not in by_label:
            segments.append({"id": len(segments) + 1, "label_id": label, "score": float(s[query])})
        segmentation[free] = by_label.get(label, len(segments))
        if label in fuse:
            by_label.setdefault(label, len(segments))
    return segmentation, segments


def smooth_outputs(seed, queries=15, num_labels=5):
    """Class logits and blobs of many sizes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 4 * torch.randn(queries, 4, 5, generator=generator) - 0.5
    return 3 * torch.randn(queries, num_labels + 1, generator=generator), resize_maps(coarse, (13, 17))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("block", range(4))
def test_equals_the_plain_loop(block, activation):
    """200 cases; the size, thresholds and known things differ."""
    found = 0
    for seed in range(25 * block, 25 * block + 25):
        class_logits, mask_logits = smooth_outputs(seed)
        size = [(13, 17), (31, 44), (26, 29)][seed % 3]
        parts = [(0.6, 0.8), (0.3, 0.37), (0.0, 0.0)][seed // 3 % 3]
        threshold, mask_threshold = [0.0, 0.25, 0.5][seed // 9 % 3], [0.5, 0.35][seed % 2]
        result = mask_wise_segments(
            class_logits,
            mask_logits,
            target_size=size,
            activation=activation,
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=parts[0],
            stuff_overlap_mask_area_threshold=parts[1],
            label_ids_to_fuse={1, 2},
            thing_label_ids={0, 3, 4},
        )
        segmentation, segments = plain_merge(
            class_logits, mask_logits, size, activation, threshold, mask_threshold, parts, {1, 2}, {0, 3, 4}
        )
        assert torch.equal(result["segmentation"], segmentation), seed
        actual = result["segments_info"]
        assert [(s["id"], s["label_id"]) for s in actual] == [(s["id"], s["label_id"]) for s in segments]
        assert [s["score"] for s in actual] == pytest.approx([s["score"] for s in segments], abs=2e-6)
        found += len(segments)
    assert found > 50


@pytest.mark.parametrize("size", [None, (16, 24), (20, 30)])
def test_disjoint_confident_masks_are_merged_alike(size):
    """Four quarters and a hole; segments are numbered by the score in one merge, by the query in the other."""
    masks = torch.full((5, 8, 12), -SURE)
    masks[0, :4, :6] = masks[1, :4, 6:] = masks[2, 4:, :6] = masks[3, 4:, 6:10] = SURE
    masks[4] = -SURE
    class_logits = torch.full((5, 4), -5.0)
    for query, (label, logit) in enumerate([(0, 9.0), (1, 8.0), (2, 7.0), (0, 6.0), (1, 5.0)]):
        class_logits[query, label] = logit
    results = [
        merge(class_logits, masks, target_size=size, threshold=0.3, label_ids_to_fuse={0})
        for merge in (panoptic_segments, mask_wise_segments)
    ]
    labels = []
    for result in results:
        table = torch.tensor([-1, *(s["label_id"] for s in result["segments_info"])])
        labels.append(table[result["segmentation"]])
        assert len(result["segments_info"]) == 3
    assert torch.equal(labels[0], labels[1])


@pytest.mark.parametrize("extent", [(0.6, 0.75), (10.3 / 13, 11.6 / 17), (1.0, 0.5)])
@pytest.mark.parametrize("noise", [50.0, -50.0])
def test_padding_does_not_matter(extent, noise):
    class_logits, mask_logits = smooth_outputs(7)
    noisy = mask_logits.clone()
    noisy[:, int(np.ceil(extent[0] * 13 - 1e-3)) :] = noise
    noisy[:, :, int(np.ceil(extent[1] * 17 - 1e-3)) :] = noise
    settings = {"target_size": (37, 41), "extent": extent, "threshold": 0.1}
    clean, padded = (mask_wise_segments(class_logits, maps, **settings) for maps in (mask_logits, noisy))
    assert clean["segments_info"]
    assert clean["segments_info"] == padded["segments_info"]
    assert torch.equal(clean["segmentation"], padded["segmentation"])


@pytest.mark.parametrize("extent", [FULL_EXTENT, (0.7, 0.9)])
def test_reading_parts_of_maps_gives_what_whole_maps_give(extent, monkeypatch):
    """Every mask is read in its own window; the whole photo as window must change nothing."""
    class_logits, mask_logits = smooth_outputs(3)
    settings = {"target_size": (60, 70), "extent": extent, "threshold": 0.1}
    windowed = mask_wise_segments(class_logits, mask_logits, **settings)
    monkeypatch.setattr(
        "hf_maskformer.model.mask_wise_merge.mask_windows", lambda maps, *rest: [(0, 60, 0, 70)] * len(maps)
    )
    whole = mask_wise_segments(class_logits, mask_logits, **settings)
    assert windowed["segments_info"]
    assert torch.equal(windowed["segmentation"], whole["segmentation"])
    assert [s["score"] for s in windowed["segments_info"]] == pytest.approx(
        [s["score"] for s in whole["segments_info"]], abs=2e-6
    )


def test_dropped_queries_are_never_resized(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hf_maskformer.model.mask_wise_merge.resample",
        lambda maps, *samples: seen.append(len(maps)) or resample(maps, *samples),
    )
    merged([(THING, 0.9), (STUFF, 0.2), (THING, 0.3), (STUFF, 0.1)], [row(0, 3)] * 4)
    assert sum(seen) == 2


class TestProcessor:
    def outputs(self):
        """A thing (score 0.64) in front of stuff (0.58), of which 6 / 10 are visible."""
        class_logits = torch.full((1, 2, 3), -9.0)
        class_logits[0, 0, THING] = 9.0
        class_logits[0, 1] = torch.tensor([1e-9, 0.7, 0.3]).log()
        masks = torch.tensor([row(0, 3), row(0, 9)]).logit().clamp(-SURE, SURE)
        return ModelOutput(class_queries_logits=class_logits, masks_queries_logits=masks[None])

    def maps(self, processor, outputs=None, **arguments):
        outputs = self.outputs() if outputs is None else outputs
        return processor.post_process_panoptic_segmentation(outputs, **arguments)[0]["segmentation"].tolist()

    def test_the_stored_merge_counts_unless_one_is_given(self):
        """Both merges give the thing its four pixels; only one asks for more of stuff."""
        settings = {"thing_label_ids": [THING], "overlap_mask_area_threshold": 0.6}
        both, thing_only = [[1] * 4 + [2] * 6], [[1] * 4 + [0] * 6]
        stored = HfMaskFormerImageProcessor(
            panoptic_merge="mask_wise", stuff_overlap_mask_area_threshold=0.8, **settings
        )
        assert self.maps(stored) == thing_only
        assert self.maps(stored, merge="mask_wise") == thing_only
        assert self.maps(stored, merge="argmax") == both
        default = HfMaskFormerImageProcessor(stuff_overlap_mask_area_threshold=0.8, **settings)
        assert self.maps(default) == both
        assert self.maps(default, merge="mask_wise") == thing_only

    def test_an_overlap_that_is_given_counts_for_stuff_too(self):
        processor = HfMaskFormerImageProcessor(
            thing_label_ids=[THING],
            overlap_mask_area_threshold=0.6,
            stuff_overlap_mask_area_threshold=0.8,
            panoptic_merge="mask_wise",
        )
        outputs = self.outputs()
        assert self.maps(processor, overlap_mask_area_threshold=0.6) == [[1] * 4 + [2] * 6]
        assert self.maps(processor, overlap_mask_area_threshold=0.5) == [[1] * 4 + [2] * 6]
        outputs["target_size"] = [(1, 10)]  # the pipeline's own 0.5 counts as not given
        assert self.maps(processor, outputs, overlap_mask_area_threshold=0.5) == [[1] * 4 + [0] * 6]

    def test_thresholds_and_labels_are_passed_on(self):
        processor = HfMaskFormerImageProcessor(panoptic_merge="mask_wise")
        assert self.maps(processor, overlap_mask_area_threshold=0.5) == [[1] * 4 + [2] * 6]
        assert self.maps(processor) == [[1] * 4 + [0] * 6]
        assert self.maps(processor, threshold=0.6, overlap_mask_area_threshold=0.5) == [[1] * 4 + [0] * 6]
        assert self.maps(processor, mask_threshold=1.0) == [[0] * 10]
        (fused,) = processor.post_process_panoptic_segmentation(
            self.outputs(), overlap_mask_area_threshold=0.5, label_ids_to_fuse={STUFF}
        )
        assert [segment["was_fused"] for segment in fused["segments_info"]] == [False, True]

    @pytest.mark.parametrize("merge", ["maskwise", "", 1])
    def test_an_unknown_merge_is_refused(self, merge):
        with pytest.raises(ValueError, match=r"merge must be one of \['argmax', 'mask_wise'\]"):
            self.maps(HfMaskFormerImageProcessor(), merge=merge)
        with pytest.raises(ValueError, match=r"panoptic_merge must be one of \['argmax', 'mask_wise'\]"):
            HfMaskFormerImageProcessor(panoptic_merge=merge)

    def test_bfloat16_and_target_sizes(self):
        class_logits, mask_logits = smooth_outputs(2)
        outputs = ModelOutput(
            class_queries_logits=class_logits[None].bfloat16(), masks_queries_logits=mask_logits[None].bfloat16()
        )
        result = HfMaskFormerImageProcessor(panoptic_merge="mask_wise", threshold=0.2)
        (one,) = result.post_process_panoptic_segmentation(outputs, target_sizes=torch.tensor([[9, 11]]))
        assert one["segmentation"].shape == (9, 11)
        assert one["segments_info"]
