"""Pruned post-processing against the plain one, and against transformers on random and real-model outputs."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import MaskFormerImageProcessor
from transformers.utils import ModelOutput

from hf_maskformer.model import cell_grid, postprocess, winning_queries
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.model.resampling import FULL_EXTENT
from hf_maskformer.presets import preset

SPEC = importlib.util.spec_from_file_location("plain_postprocess", Path(__file__).with_name("plain_postprocess.py"))
plain = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plain)

NEAR = 1e-6  # relative difference of the two best scores below which a pixel may go to either
QUERIES, LABELS = 12, 6
# logits (h, w), target (H, W), extent: larger, smaller, in one direction only, single pixels and cells, equal
SHAPES = [
    ((13, 17), (61, 83), FULL_EXTENT),
    ((13, 17), (61, 83), (0.77, 0.613)),
    ((16, 12), (64, 48), (0.5, 1.0)),
    ((9, 8), (9, 8), FULL_EXTENT),
    ((9, 8), (7, 8), (0.8, 0.9)),
    ((21, 15), (10, 7), FULL_EXTENT),
    ((12, 14), (3, 90), FULL_EXTENT),
    ((12, 14), (90, 3), (0.9, 0.33)),
    ((6, 7), (1, 1), FULL_EXTENT),
    ((1, 1), (5, 9), FULL_EXTENT),
    ((1, 6), (4, 31), FULL_EXTENT),
    ((10, 10), (16, 15), FULL_EXTENT),
]
KINDS = ["noise", "smooth", "twins", "plateaus"]
SETTINGS = [("softmax", 0.3, 0.5, 0.4, {1, 2}), ("sigmoid", 0.5, 0.6, 0.0, set()), ("softmax", 0.0, 0.4, 0.8, {0, 3})]
CASES = [
    (kind, *shape, *SETTINGS[(number + turn) % len(SETTINGS)])
    for turn, kind in enumerate(KINDS)
    for number, shape in enumerate(SHAPES)
]


def logits_like(kind: str, shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent noise; smooth and sure masks; the same with every query twice; the same in steps, 0 among them."""
    generator = torch.Generator().manual_seed(seed + 100 * shape[0] + shape[1])
    classes = 3 * torch.randn(QUERIES, LABELS + 1, generator=generator)
    if kind == "noise":
        return classes, 3 * torch.randn(QUERIES, *shape, generator=generator)
    coarse = torch.randn(1, QUERIES, 4, 4, generator=generator)
    masks = 8 * F.interpolate(coarse, size=shape, mode="bicubic", align_corners=True)[0]
    if kind == "twins":
        half = QUERIES // 2
        return classes[:half].repeat(2, 1), masks[:half].repeat(2, 1, 1)
    return classes, masks if kind == "smooth" else 8 * (masks / 8).round()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_semantic(case):
    kind, shape, size, extent, activation, *_ = case
    classes, masks = logits_like(kind, shape)
    expected, margin = plain.semantic(classes, masks, size, extent, activation)
    actual = postprocess.semantic_map(postprocess.semantic_scores(classes, masks, activation), size, extent)
    assert actual.dtype == torch.int64
    differs = actual.numpy() != expected
    assert margin[differs].size == 0 or margin[differs].max() < NEAR


# Where all maps are resized, equal ones can differ in the last bit, by their place in `F.interpolate`'s vectors.
@pytest.mark.parametrize("case", [case for case in CASES if case[:2] != ("twins", (21, 15))], ids=str)
def test_panoptic(case):
    kind, shape, size, extent, activation, threshold, mask_threshold, overlap, fuse = case
    classes, masks = logits_like(kind, shape)
    expected, segments = plain.panoptic(classes, masks, size, extent, *case[4:])
    actual = postprocess.panoptic_segments(
        classes,
        masks,
        target_size=size,
        extent=extent,
        activation=activation,
        threshold=threshold,
        mask_threshold=mask_threshold,
        overlap_mask_area_threshold=overlap,
        label_ids_to_fuse=fuse,
    )
    np.testing.assert_array_equal(actual["segmentation"].numpy(), expected)
    found = [[s["id"], s["label_id"], s["was_fused"], s["score"]] for s in actual["segments_info"]]
    assert [one[:3] for one in found] == [one[:3] for one in segments]
    assert [one[3] for one in found] == pytest.approx([one[3] for one in segments], abs=2e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "twins"], ids=str)
def test_instances(case):
    kind, shape, size, extent, activation, threshold, mask_threshold, overlap, labels = case
    classes, masks = logits_like(kind, shape)
    allowed = sorted(labels or range(LABELS))
    expected = plain.candidates(classes, masks, size, extent, activation, threshold, mask_threshold, allowed)
    actual = postprocess.instance_candidates(
        classes,
        masks,
        target_size=size,
        extent=extent,
        activation=activation,
        threshold=threshold,
        mask_threshold=mask_threshold,
        allowed_labels=allowed,
    )
    assert [(one["label_id"], one["query"], one["area"]) for one in actual] == [
        (label, query, mask.sum()) for label, _, mask, query in expected
    ]
    assert [one["score"] for one in actual] == pytest.approx([score for _, score, _, _ in expected], rel=1e-5)
    assert [one["rle"] for one in actual] == [plain.rle_of(mask) for _, _, mask, _ in expected]
    segmentation, kept = plain.painted(expected, size, overlap)
    result = postprocess.instance_segments(actual, size, overlap)
    np.testing.assert_array_equal(result["segmentation"].numpy(), segmentation)
    assert [segment["rle"] for segment in result["segments_info"]] == [actual[number]["rle"] for number in kept]


def test_twins_share_their_mask_and_the_first_is_painted():
    classes, masks = logits_like("twins", (13, 17))
    found = postprocess.instance_candidates(classes, masks, target_size=(61, 83), threshold=0.2)
    assert len(found) > 1
    result = postprocess.instance_segments(found, (61, 83), 0.0)
    assert len(result["segments_info"]) <= len({one["rle"]["counts"] for one in found})


def test_nothing_stays():
    classes, masks = logits_like("smooth", (13, 17))
    settings = {"target_size": (61, 83), "threshold": 1.0}
    assert postprocess.instance_candidates(classes, masks, **settings) == []
    assert postprocess.panoptic_segments(classes, masks, **settings)["segments_info"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_small_chunks_change_nothing(kind, monkeypatch):
    classes, masks = logits_like(kind, (13, 17))

    def results():
        settings = {"target_size": (61, 83), "extent": (0.9, 1.0), "threshold": 0.1}
        scores = postprocess.semantic_scores(classes, masks)
        panoptic = postprocess.panoptic_segments(classes, masks, overlap_mask_area_threshold=0.1, **settings)
        instances = postprocess.instance_candidates(classes, masks, **settings)
        return postprocess.semantic_map(scores, (61, 83), (0.9, 1.0)), panoptic, [one["rle"] for one in instances]

    whole = results()
    monkeypatch.setattr(cell_grid, "CPU_CHUNK_BYTES", 1)
    parts = results()
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1]["segmentation"], parts[1]["segmentation"])
    assert whole[1]["segments_info"] == parts[1]["segments_info"]
    assert whole[2] == parts[2]


@pytest.mark.parametrize("kind", KINDS)
def test_panoptic_segments_are_the_same_by_cells_and_by_rows(kind, monkeypatch):
    classes, masks = logits_like(kind, (13, 17))
    by_rows = []
    real = winning_queries.by_bands
    monkeypatch.setattr(winning_queries, "by_bands", lambda *args: by_rows.append(1) or real(*args))
    settings = {"target_size": (61, 83), "extent": (0.9, 1.0), "threshold": 0.1, "overlap_mask_area_threshold": 0.1}
    results = []
    for most_open in (0.0, float("inf")):
        monkeypatch.setattr(winning_queries, "MOST_OPEN", most_open)
        results.append(postprocess.panoptic_segments(classes, masks, **settings))
    assert len(by_rows) == 1
    assert torch.equal(results[0]["segmentation"], results[1]["segmentation"])
    assert results[0]["segments_info"] == results[1]["segments_info"]
    assert results[0]["segments_info"]


def assert_maps_of_transformers(outputs: ModelOutput, size: tuple[int, int]) -> None:
    """Pixel by pixel, except where the two best scores are nearly equal."""
    sizes = [size] * len(outputs.class_queries_logits)
    theirs = MaskFormerImageProcessor().post_process_semantic_segmentation(
        outputs, target_sizes=sizes, return_segmentation_scores=True
    )
    ours = HfMaskFormerImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=sizes)
    for actual, expected in zip(ours, theirs, strict=True):
        two_best = expected.segmentation_scores.topk(2, dim=0).values
        clear = (two_best[0] - two_best[1]) / two_best[0] > NEAR
        assert clear.float().mean() > 0.99
        assert torch.equal(actual[clear], expected.segmentation[clear])


@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_semantic_maps_of_random_outputs_are_those_of_transformers(kind):
    images = [logits_like(kind, (16, 20), seed) for seed in range(25)]
    classes, masks = (torch.stack(parts) for parts in zip(*images, strict=True))
    assert_maps_of_transformers(ModelOutput(class_queries_logits=classes, masks_queries_logits=masks), (61, 83))


def test_semantic_maps_of_model_outputs_are_those_of_transformers(shared_data):
    """50 photos, unpadded, through a small model with random weights."""
    files = sorted((shared_data / "camvid" / "val" / "images").iterdir())[:50]
    assert len(files) == 50
    photos = [np.asarray(Image.open(file).convert("RGB").resize((96, 64))) for file in files]
    backbone = {
        "model_type": "resnet",
        "layer_type": "basic",
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [16, 24, 32, 40],
        "embedding_size": 8,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    sizes = {"pixel_decoder_dim": 32, "mask_dim": 16, "query_decoder_dim": 32, "query_decoder_ffn_dim": 48}
    labels = {index: f"class {index}" for index in range(LABELS)}
    config = preset(
        "maskformer-light",
        backbone_config=backbone,
        num_queries=QUERIES,
        image_size=[64, 96],
        id2label=labels,
        **sizes,
    )
    torch.manual_seed(0)
    model = HfMaskFormerForUniversalSegmentation(config).eval()
    pixels = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).float() / 128 - 1
    with torch.inference_mode():
        outputs = model(pixel_values=pixels)
    # Random weights give every class almost the same score; sharper logits are nearer to what a trained model gives.
    sharp = ModelOutput(
        class_queries_logits=5 * outputs.class_queries_logits, masks_queries_logits=5 * outputs.masks_queries_logits
    )
    assert_maps_of_transformers(sharp, (90, 120))
