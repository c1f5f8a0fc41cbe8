"""Post-processing rules on hand-sized cases, against a plain reference, and against transformers where it is right."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco
from transformers import MaskFormerImageProcessor
from transformers.utils import ModelOutput

from hf_maskformer.model import cell_grid, postprocess, resampling
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.masks import decode_rle, decode_rles

HIGH = 8.0  # logit of a sure decision


def logits_of(classes: list[int | None], masks: list, num_labels: int, score: float | None = None) -> dict:
    """Outputs of one image: query q is sure of its class (None = no object), or gives it probability `score`, and its
    mask has logit HIGH where the 0/1 mask is 1 and -HIGH elsewhere (floats are taken as probabilities)."""
    class_logits = torch.full((len(classes), num_labels + 1), -HIGH)
    for query, label in enumerate(classes):
        if score is None:
            class_logits[query, num_labels if label is None else label] = HIGH
        else:
            class_logits[query] = torch.tensor((1 - score) / num_labels).log()
            class_logits[query, num_labels if label is None else label] = torch.tensor(score).log()
    mask_array = np.array(masks)
    if mask_array.dtype.kind == "f":
        mask_logits = torch.logit(torch.from_numpy(mask_array).float())
    else:
        mask_logits = torch.from_numpy(np.where(mask_array > 0, HIGH, -HIGH)).float()
    return {"class_queries_logits": class_logits[None], "masks_queries_logits": mask_logits[None]}


def outputs_of(*args, **kwargs) -> ModelOutput:
    return ModelOutput(**logits_of(*args, **kwargs))


def random_outputs(seed: int, batch: int = 2, queries: int = 12, num_labels: int = 5, size=(13, 17), scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return ModelOutput(
        class_queries_logits=scale * torch.randn(batch, queries, num_labels + 1, generator=generator),
        masks_queries_logits=scale * torch.randn(batch, queries, *size, generator=generator),
    )


def make_chunks_tiny(monkeypatch) -> None:
    monkeypatch.setattr(cell_grid, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(resampling, "CHUNK_BYTES", 1)


class TestSemantic:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("target", [None, (37, 29), (7, 50)])
    def test_unpadded_result_is_that_of_transformers(self, seed, target):
        outputs = random_outputs(seed)
        sizes = None if target is None else [target, target]
        expected = MaskFormerImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=sizes)
        actual = HfMaskFormerImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=sizes)
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)

    def test_scores(self):
        outputs = random_outputs(0)
        result = HfMaskFormerImageProcessor().post_process_semantic_segmentation(
            outputs, target_sizes=[(20, 30)] * 2, return_segmentation_scores=True
        )[0]
        theirs = MaskFormerImageProcessor().post_process_semantic_segmentation(
            outputs, target_sizes=[(20, 30)] * 2, return_segmentation_scores=True
        )[0]
        torch.testing.assert_close(result.segmentation_scores, theirs.segmentation_scores)
        assert torch.equal(result.segmentation, theirs.segmentation)

    def test_chunks_do_not_change_the_result(self, monkeypatch):
        outputs = random_outputs(1, num_labels=7)
        processor = HfMaskFormerImageProcessor()
        whole = processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 40)] * 2)
        make_chunks_tiny(monkeypatch)
        assert all(map(torch.equal, whole, processor.post_process_semantic_segmentation(outputs, [(40, 40)] * 2)))

    def test_perfect_logits_on_a_padded_canvas_give_the_perfect_map(self):
        """64 x 64 image on a 64 x 128 canvas, left half class 0, right half class 1."""
        masks = np.zeros((2, 16, 32), dtype=int)
        masks[0, :, :8], masks[1, :, 8:] = 1, 1
        outputs = outputs_of([0, 1], masks, num_labels=2)
        outputs["valid_extent"] = torch.tensor([[1.0, 0.5]])
        result = HfMaskFormerImageProcessor().post_process_semantic_segmentation(outputs, [(64, 64)])[0]
        expected = (torch.arange(64) >= 32).long().expand(64, 64)
        assert torch.equal(result, expected)
        assert HfMaskFormerImageProcessor().post_process_semantic_segmentation(outputs)[0].shape == (16, 16)

    def test_sigmoid_classes_ignore_the_last_column(self):
        outputs = outputs_of([1, 0], [[[1, 0]], [[0, 1]]], num_labels=2)
        outputs.class_queries_logits[..., -1] = 100.0
        processor = HfMaskFormerImageProcessor(class_activation="sigmoid")
        assert processor.post_process_semantic_segmentation(outputs)[0].tolist() == [[1, 0]]
        assert len(processor.post_process_panoptic_segmentation(outputs)[0]["segments_info"]) == 2


def reference_panoptic(class_logits, mask_logits, size, threshold, mask_threshold, overlap, fuse):
    """The merge written as one plain loop over dense float64 masks."""
    probabilities = class_logits.double().softmax(-1)
    scores, labels = probabilities.max(-1)
    keep = [q for q in range(len(labels)) if labels[q] != class_logits.shape[-1] - 1 and scores[q] > threshold]
    masks = F.interpolate(mask_logits[None].double(), size=size, mode="bilinear", align_corners=False)[0].sigmoid()
    segmentation, segments, by_label = torch.zeros(size, dtype=torch.int32), [], {}
    if not keep:
        return segmentation, segments
    winner = (masks[keep] * scores[keep][:, None, None]).argmax(0)
    for position, query in enumerate(keep):
        own = masks[query] >= mask_threshold
        visible = own & (winner == position)
        if visible.sum() == 0 or visible.sum() / own.sum() < overlap:
            continue
        label = int(labels[query])
        if label in by_label:
            segmentation[visible] = by_label[label]
            continue
        segments.append((len(segments) + 1, label))
        segmentation[visible] = len(segments)
        if label in fuse:
            by_label[label] = len(segments)
    return segmentation, segments


class TestPanoptic:
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("overlap", [0.0, 0.3, 0.8])
    def test_equals_the_plain_loop(self, seed, overlap, monkeypatch):
        outputs = random_outputs(seed, batch=1, queries=20)
        make_chunks_tiny(monkeypatch)
        result = HfMaskFormerImageProcessor(thing_label_ids=(0, 3)).post_process_panoptic_segmentation(
            outputs, 0.4, 0.55, overlap, target_sizes=[(40, 44)]
        )[0]
        segmentation, segments = reference_panoptic(
            outputs.class_queries_logits[0], outputs.masks_queries_logits[0], (40, 44), 0.4, 0.55, overlap, {1, 2, 4}
        )
        assert torch.equal(result["segmentation"], segmentation)
        assert [(segment["id"], segment["label_id"]) for segment in result["segments_info"]] == segments
        assert sorted({s["id"] for s in result["segments_info"]}) == list(range(1, len(segments) + 1))

    def test_ids_are_not_reused_after_fusion(self):
        """Stuff A, thing B, stuff A, thing C; transformers gives B and C the id 2."""
        masks = np.eye(4, dtype=int).reshape(4, 1, 4)
        outputs = outputs_of([0, 1, 0, 1], masks, num_labels=2)
        processor = HfMaskFormerImageProcessor(thing_label_ids=[1])
        result = processor.post_process_panoptic_segmentation(outputs)[0]
        assert result["segmentation"].tolist() == [[1, 2, 1, 3]]
        assert result["segmentation"].dtype == torch.int32
        assert [(s["id"], s["label_id"], s["was_fused"]) for s in result["segments_info"]] == [
            (1, 0, True),
            (2, 1, False),
            (3, 1, False),
        ]

    def test_nothing_is_fused_when_things_are_unknown(self):
        outputs = outputs_of([0, 0], [[[1, 0]], [[0, 1]]], num_labels=2)
        unknown = HfMaskFormerImageProcessor().post_process_panoptic_segmentation(outputs)[0]
        assert unknown["segmentation"].tolist() == [[1, 2]]
        told = HfMaskFormerImageProcessor().post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0})[0]
        assert told["segmentation"].tolist() == [[1, 1]]

    def test_area_rule_reads_the_raw_mask_not_score_times_mask(self):
        """One mask of probability 0.8 and score 0.6: 0.48 is below 0.5, the mask is not."""
        outputs = outputs_of([0], [[[0.8, 0.2]]], num_labels=2, score=0.6)
        result = HfMaskFormerImageProcessor().post_process_panoptic_segmentation(outputs)[0]
        assert result["segmentation"].tolist() == [[1, 0]]
        assert result["segments_info"][0]["score"] == pytest.approx(0.6, abs=1e-6)

    def test_only_pixels_of_the_mask_are_painted(self):
        """The only segment wins every pixel of the argmax, but owns half of them."""
        outputs = outputs_of([1], [[[1, 1, 0, 0]]], num_labels=2)
        result = HfMaskFormerImageProcessor().post_process_panoptic_segmentation(outputs)[0]
        assert result["segmentation"].tolist() == [[1, 1, 0, 0]]

    def test_covered_segment_is_dropped_by_the_overlap_threshold(self):
        masks = [[[0.9, 0.9, 0.9, 0.1]], [[0.1, 0.8, 0.8, 0.8]]]  # query 1 keeps one pixel of three
        outputs = outputs_of([0, 1], masks, num_labels=2)
        processor = HfMaskFormerImageProcessor()
        assert processor.post_process_panoptic_segmentation(outputs)[0]["segmentation"].tolist() == [[1, 1, 1, 0]]
        kept = processor.post_process_panoptic_segmentation(outputs, overlap_mask_area_threshold=0.3)[0]
        assert kept["segmentation"].tolist() == [[1, 1, 1, 2]]

    def test_no_segment_gives_zeros(self):
        outputs = outputs_of([None, None], np.ones((2, 4, 5), dtype=int), num_labels=2)
        for sizes, shape in (([(8, 9)], (8, 9)), (None, (4, 5))):
            result = HfMaskFormerImageProcessor().post_process_panoptic_segmentation(outputs, target_sizes=sizes)[0]
            assert result["segments_info"] == []
            assert result["segmentation"].shape == shape
            assert result["segmentation"].dtype == torch.int32
            assert not result["segmentation"].any()

    def test_unknown_merge_is_refused(self):
        outputs = outputs_of([0], [[[1]]], num_labels=1)
        with pytest.raises(ValueError, match="merge must be one of"):
            HfMaskFormerImageProcessor().post_process_panoptic_segmentation(outputs, merge="maskwise")


class TestInstance:
    def test_overlap_is_kept_in_the_rle_and_the_higher_score_is_on_top(self):
        masks = [[[0.6, 0.6, 0.6, 0.6, 0.1]], [[0.1, 0.1, 0.1, 0.9, 0.9]]]
        outputs = outputs_of([0, 1], masks, num_labels=2)
        result = HfMaskFormerImageProcessor().post_process_instance_segmentation(
            outputs, overlap_mask_area_threshold=0.5
        )[0]
        assert result["segmentation"].tolist() == [[2, 2, 2, 1, 1]]
        assert result["segmentation"].dtype == torch.int32
        first, second = result["segments_info"]
        assert (first["id"], first["label_id"], second["id"], second["label_id"]) == (1, 1, 2, 0)
        assert decode_rle(first["rle"]).astype(int).tolist() == [[0, 0, 0, 1, 1]]
        assert coco.decode(second["rle"]).tolist() == [[1, 1, 1, 1, 0]]
        assert first["score"] == pytest.approx(0.9, abs=1e-3)

    def test_all_thresholds_are_live(self):
        masks = [[[0.6, 0.6, 0.6, 0.6, 0.1]], [[0.1, 0.1, 0.1, 0.9, 0.9]]]
        outputs = outputs_of([0, 1], masks, num_labels=2)
        process = HfMaskFormerImageProcessor().post_process_instance_segmentation

        def maps(**kwargs):
            return process(outputs, **{"overlap_mask_area_threshold": 0.5, **kwargs})[0]["segmentation"].tolist()

        assert maps(threshold=0.7) == [[0, 0, 0, 1, 1]]
        assert maps(mask_threshold=0.7) == [[0, 0, 0, 1, 1]]
        assert maps(overlap_mask_area_threshold=0.8) == [[0, 0, 0, 1, 1]]

    def test_one_query_with_two_classes_gives_no_segment_without_pixels(self):
        outputs = outputs_of([0], [[[1, 1, 0]]], num_labels=2)
        outputs.class_queries_logits[0, 0] = torch.tensor([2.0, 1.9, -9.0])
        outputs = ModelOutput(
            class_queries_logits=outputs.class_queries_logits.repeat(1, 3, 1),
            masks_queries_logits=outputs.masks_queries_logits.repeat(1, 3, 1, 1),
        )
        for overlap in (0.0, 0.8):
            result = HfMaskFormerImageProcessor().post_process_instance_segmentation(
                outputs, threshold=0.3, overlap_mask_area_threshold=overlap
            )[0]
            ids = [segment["id"] for segment in result["segments_info"]]
            assert ids == [1]
            assert result["segmentation"].tolist() == [[1, 1, 0]]

    def test_candidates_keep_every_query_and_class(self):
        outputs = outputs_of([0], [[[1, 1, 0]]], num_labels=2)
        outputs.class_queries_logits[0, 0] = torch.tensor([2.0, 1.9, -9.0])
        candidates = postprocess.instance_candidates(
            outputs.class_queries_logits[0], outputs.masks_queries_logits[0], threshold=0.3, max_candidates=2
        )
        assert [(c["label_id"], c["query"], c["area"]) for c in candidates] == [(0, 0, 2), (1, 0, 2)]

    @pytest.mark.parametrize("seed", range(3))
    def test_scores_and_masks_are_those_of_transformers_at_logit_size(self, seed):
        outputs = random_outputs(seed, batch=1)
        theirs = MaskFormerImageProcessor().post_process_instance_segmentation(
            outputs, threshold=0.4, return_binary_maps=True
        )[0]
        ours = postprocess.instance_candidates(
            outputs.class_queries_logits[0], outputs.masks_queries_logits[0], threshold=0.4
        )
        order = sorted(range(len(theirs["segments_info"])), key=lambda i: -theirs["segments_info"][i]["score"])
        expected = [theirs["segments_info"][i] for i in order]
        assert len(expected) > 0
        assert [c["label_id"] for c in ours] == [segment["label_id"] for segment in expected]
        assert [c["score"] for c in ours] == pytest.approx([segment["score"] for segment in expected], abs=2e-6)
        masks = decode_rles([c["rle"] for c in ours], (13, 17))
        np.testing.assert_array_equal(masks, theirs["segmentation"][order].numpy() > 0)

    def test_only_things_are_instances(self):
        outputs = outputs_of([0, 1], [[[1, 0]], [[0, 1]]], num_labels=2)
        result = HfMaskFormerImageProcessor(thing_label_ids=(1,)).post_process_instance_segmentation(outputs)[0]
        assert [segment["label_id"] for segment in result["segments_info"]] == [1]

    def test_forms_of_the_result(self):
        outputs = outputs_of([0, 1], [[[1, 0]], [[0, 1]]], num_labels=2)
        process = HfMaskFormerImageProcessor().post_process_instance_segmentation
        coco_form = process(outputs, return_coco_annotation=True)[0]
        assert coco_form["segmentation"] == [segment["rle"] for segment in coco_form["segments_info"]]
        binary = process(outputs, return_binary_maps=True, target_sizes=[(2, 4)])[0]["segmentation"]
        assert binary.shape == (2, 2, 4)
        assert binary.dtype == torch.bool
        with pytest.raises(ValueError, match="cannot both be True"):
            process(outputs, return_coco_annotation=True, return_binary_maps=True)

    def test_no_instance_gives_stable_shapes(self):
        outputs = outputs_of([None], np.ones((1, 4, 5), dtype=int), num_labels=2)
        process = HfMaskFormerImageProcessor().post_process_instance_segmentation
        result = process(outputs, target_sizes=[(8, 9)])[0]
        assert result["segments_info"] == []
        assert torch.equal(result["segmentation"], torch.zeros(8, 9, dtype=torch.int32))
        assert process(outputs, target_sizes=[(8, 9)], return_binary_maps=True)[0]["segmentation"].shape == (0, 8, 9)
        assert process(outputs, return_coco_annotation=True)[0]["segmentation"] == []

    def test_large_target_is_resized_query_by_query(self, monkeypatch):
        outputs = random_outputs(3, batch=1)
        process = HfMaskFormerImageProcessor().post_process_instance_segmentation
        whole = process(outputs, 0.2, overlap_mask_area_threshold=0.1, target_sizes=[(50, 60)])[0]
        make_chunks_tiny(monkeypatch)
        chunked = process(outputs, 0.2, overlap_mask_area_threshold=0.1, target_sizes=[(50, 60)])[0]
        assert torch.equal(whole["segmentation"], chunked["segmentation"])
        assert whole["segments_info"] == chunked["segments_info"]


def sigmoid_outputs(probabilities: list[list[float]], masks: list) -> ModelOutput:
    """As `outputs_of`, with independent class probabilities (Q, K); the ignored column holds noise."""
    outputs = outputs_of([0] * len(masks), masks, num_labels=len(probabilities[0]))
    outputs.class_queries_logits[0, :, :-1] = torch.tensor(probabilities).logit()
    outputs.class_queries_logits[0, :, -1] = torch.linspace(-50, 50, len(masks))
    return outputs


class TestSigmoidClasses:
    """Independent class scores without "no object"; the last column never counts."""

    processor = HfMaskFormerImageProcessor(class_activation="sigmoid", thing_label_ids=[1], threshold=0.3)
    halves = ([[1, 1, 0, 0]], [[0, 0, 1, 1]])

    def test_semantic_scores(self):
        outputs = sigmoid_outputs([[0.2, 0.7], [0.6, 0.5]], [[[0.9, 0.1]], [[0.5, 0.8]]])
        result = self.processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)[0]
        expected = [[[0.2 * 0.9 + 0.6 * 0.5, 0.2 * 0.1 + 0.6 * 0.8]], [[0.7 * 0.9 + 0.5 * 0.5, 0.7 * 0.1 + 0.5 * 0.8]]]
        torch.testing.assert_close(result.segmentation_scores, torch.tensor(expected))
        assert result.segmentation.tolist() == [[1, 0]]

    @pytest.mark.parametrize("merge", ["argmax", "mask_wise"])
    def test_a_query_with_low_scores_is_dropped_by_the_threshold(self, merge):
        """A softmax over these would call the second query sure of class 0."""
        outputs = sigmoid_outputs([[0.1, 0.9], [0.25, 0.001]], self.halves)
        result = self.processor.post_process_panoptic_segmentation(outputs, merge=merge)[0]
        assert [segment["label_id"] for segment in result["segments_info"]] == [1]
        assert result["segmentation"].tolist() == [[1, 1, 0, 0]]
        low = self.processor.post_process_panoptic_segmentation(outputs, threshold=0.1, merge=merge)[0]
        assert [segment["label_id"] for segment in low["segments_info"]] == [1, 0]

    def test_panoptic_scores_are_the_sigmoids(self):
        outputs = sigmoid_outputs([[0.1, 0.9], [0.75, 0.6]], self.halves)
        result = self.processor.post_process_panoptic_segmentation(outputs)[0]
        assert [segment["score"] for segment in result["segments_info"]] == pytest.approx([0.9, 0.75], abs=1e-6)

    def test_instances_rank_queries_times_classes(self):
        """One query passes with both of its classes, the other with none."""
        outputs = sigmoid_outputs([[0.8, 0.9], [0.2, 0.1]], self.halves)
        candidates = postprocess.instance_candidates(
            outputs.class_queries_logits[0], outputs.masks_queries_logits[0], activation="sigmoid", threshold=0.3
        )
        quality = float(torch.tensor(HIGH).sigmoid())
        assert [(one["query"], one["label_id"]) for one in candidates] == [(0, 1), (0, 0)]
        assert [one["score"] for one in candidates] == pytest.approx([0.9 * quality, 0.8 * quality], abs=1e-6)
        result = self.processor.post_process_instance_segmentation(outputs)[0]
        assert [segment["label_id"] for segment in result["segments_info"]] == [1]

    def test_the_last_column_never_counts(self):
        outputs = sigmoid_outputs([[0.1, 0.9], [0.75, 0.6]], self.halves)
        before = [self.processor.post_process_panoptic_segmentation(outputs, merge=m) for m in ("argmax", "mask_wise")]
        instances = self.processor.post_process_instance_segmentation(outputs)
        outputs.class_queries_logits[..., -1] = 0
        after = [self.processor.post_process_panoptic_segmentation(outputs, merge=m) for m in ("argmax", "mask_wise")]
        after.append(self.processor.post_process_instance_segmentation(outputs))
        for one, other in zip([*before, instances], after, strict=True):
            assert one[0]["segments_info"] == other[0]["segments_info"]
            assert torch.equal(one[0]["segmentation"], other[0]["segmentation"])


class TestThresholdsAndTask:
    def test_stored_thresholds_count_when_none_is_given(self):
        outputs = outputs_of([0], [[[1, 1]]], num_labels=2, score=0.6)
        for method in ("post_process_panoptic_segmentation", "post_process_instance_segmentation"):
            assert len(getattr(HfMaskFormerImageProcessor(), method)(outputs)[0]["segments_info"]) == 1
            strict = HfMaskFormerImageProcessor(threshold=0.7)
            assert getattr(strict, method)(outputs)[0]["segments_info"] == []
            assert len(getattr(strict, method)(outputs, threshold=0.5)[0]["segments_info"]) == 1

    def test_the_constants_of_the_pipeline_count_as_not_given(self):
        """The pipeline always passes 0.9 / 0.5 / 0.5 and `[]` came back for weak scores."""
        outputs = outputs_of([0], [[[1, 1]]], num_labels=2, score=0.6)
        processor = HfMaskFormerImageProcessor()
        assert processor.post_process_panoptic_segmentation(outputs, 0.9, 0.5, 0.5)[0]["segments_info"] == []
        outputs["target_size"] = [(1, 2)]
        assert len(processor.post_process_panoptic_segmentation(outputs, 0.9, 0.5, 0.5)[0]["segments_info"]) == 1
        assert processor.post_process_panoptic_segmentation(outputs, 0.8, 0.5, 0.5)[0]["segments_info"] == []

    @pytest.mark.parametrize(
        ("task", "instance", "panoptic"),
        [(None, True, True), ("panoptic", True, True), ("instance", True, False), ("semantic", False, False)],
    )
    def test_task_hides_methods(self, task, instance, panoptic):
        processor = HfMaskFormerImageProcessor(task=task)
        assert hasattr(processor, "post_process_instance_segmentation") == instance
        assert hasattr(processor, "post_process_panoptic_segmentation") == panoptic
        assert hasattr(processor, "post_process_semantic_segmentation")
        if not panoptic:
            with pytest.raises(AttributeError, match=f"processor.task is '{task}'"):
                processor.post_process_panoptic_segmentation(None)
            processor.task = "panoptic"
            assert hasattr(processor, "post_process_panoptic_segmentation")

    def test_number_of_target_sizes_is_checked(self):
        with pytest.raises(ValueError, match="target_sizes has 1 entries for 2 images"):
            HfMaskFormerImageProcessor().post_process_semantic_segmentation(random_outputs(0), [(4, 4)])

    def test_outputs_with_other_labels_are_refused(self):
        processor = HfMaskFormerImageProcessor(id2label={0: "a", 1: "b"})
        with pytest.raises(ValueError, match="outputs have 5 labels, the processor's id2label 2"):
            processor.post_process_semantic_segmentation(random_outputs(0))

    @pytest.mark.parametrize("sizes", [[(4, 0), (4, 4)], [(4, 4, 3), (4, 4)]])
    def test_wrong_target_sizes_are_refused(self, sizes):
        with pytest.raises(ValueError, match="target_sizes must hold"):
            HfMaskFormerImageProcessor().post_process_semantic_segmentation(random_outputs(0), sizes)

    def test_target_sizes_may_be_a_tensor(self):
        sizes = torch.tensor([[4, 5], [6, 7]])
        maps = HfMaskFormerImageProcessor().post_process_semantic_segmentation(random_outputs(0), sizes)
        assert [tuple(result.shape) for result in maps] == [(4, 5), (6, 7)]

    def test_bfloat16_logits(self):
        outputs = random_outputs(0)
        halved = ModelOutput(**{name: value.bfloat16() for name, value in outputs.items()})
        processor = HfMaskFormerImageProcessor()
        assert processor.post_process_semantic_segmentation(halved, [(9, 9)] * 2)[0].shape == (9, 9)
        assert processor.post_process_panoptic_segmentation(halved, target_sizes=[(9, 9)] * 2)
        assert processor.post_process_instance_segmentation(halved, target_sizes=[(9, 9)] * 2)
