"""Predictor: what it reads, that its answers are the model's, and what it refuses."""

import copy
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import ModelOutput

from hf_maskformer.inference import Predictor
from hf_maskformer.inference.checkpoint import load_checkpoint
from hf_maskformer.model.masks import decode_rle
from hf_maskformer.presets import image_processor_for


def picture(height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(checkpoint, device="cpu", batch_size=2)


@pytest.fixture
def scripted(checkpoint, monkeypatch):
    """A predictor whose model sees: sky above, grass below, two overlapping crates of different certainty."""

    def build(task, **settings):
        result = Predictor(checkpoint, task=task, device="cpu", **settings)
        masks = torch.full((1, 6, 16, 16), -8.0)
        masks[0, 0, :8] = 8.0
        masks[0, 1, 8:] = 8.0
        masks[0, 2, 2:10, 2:8] = 8.0
        masks[0, 3, 2:10, 6:14] = 8.0
        classes = torch.zeros(1, 6, 4)
        classes[..., 3] = 4.0
        for query, (label, logit) in enumerate([(0, 7.0), (1, 7.0), (2, 12.0), (2, 9.0)]):
            classes[0, query, label] = logit
        output = ModelOutput(class_queries_logits=classes, masks_queries_logits=masks, valid_extent=None)
        monkeypatch.setattr(result.model, "forward", lambda **inputs: output)
        return result

    return build


def test_every_kind_of_input_gives_the_same(predictor, tmp_path):
    array = picture()
    path = tmp_path / "photo.png"
    Image.fromarray(array).save(path)
    results = predictor([array, Image.fromarray(array), path, str(path)])
    assert [result.name for result in results] == ["image-0001", "image-0002", "photo", "photo-2"]
    assert [result.file_name for result in results] == [None, None, str(path), str(path)]
    for result in results:
        np.testing.assert_array_equal(result.segmentation, results[0].segmentation)
        np.testing.assert_array_equal(result.image, array)
    assert len(predictor(path)) == len(predictor(array)) == 1


def test_images_of_many_sizes_and_modes(predictor):
    alpha = Image.fromarray(picture()).convert("RGBA")
    images = [picture(30, 90), picture(81, 17)[..., 0], alpha, alpha.convert("CMYK"), np.zeros((5, 5, 1), np.uint8)]
    results = predictor(images)
    sizes = [result.segmentation.shape for result in results]
    assert sizes == [(30, 90), (81, 17), (40, 60), (40, 60), (5, 5)]
    assert all(result.segmentation.dtype == np.int32 for result in results)


def test_a_result_does_not_depend_on_its_batch(checkpoint):
    images = [picture(40, 60, seed) for seed in range(3)]
    alone = Predictor(checkpoint, task="semantic", device="cpu", batch_size=1)(images)
    together = Predictor(checkpoint, task="semantic", device="cpu", batch_size=3)(images)
    for one, other in zip(alone, together, strict=True):
        assert np.mean(one.segmentation == other.segmentation) > 0.999


def test_no_larger_neighbour_pads_an_image(checkpoint):
    """By the shorter side images have several sizes; those of one canvas go through the model together."""
    model, processor = load_checkpoint(checkpoint)
    by_edge = copy.copy(processor)
    by_edge.size = type(processor.size)(shortest_edge=32, longest_edge=96)
    images = [picture(*size, seed) for seed, size in enumerate([(40, 40), (50, 50), (30, 90), (90, 30), (40, 40)])]
    together = Predictor(model, processor=by_edge, task="semantic", device="cpu", batch_size=5)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["pixel_values"].shape)), with_kwargs=True
    )
    results = together(images)
    hook.remove()
    assert seen == [(2, 3, 32, 32), (1, 3, 32, 96), (1, 3, 96, 32), (1, 3, 32, 32)]
    alone = Predictor(model, processor=by_edge, task="semantic", device="cpu", batch_size=1)
    for image, result in zip(images, results, strict=True):
        np.testing.assert_array_equal(result.image, image)
        assert result.segmentation.shape == image.shape[:2]
        assert np.mean(result.segmentation == alone(image)[0].segmentation) > 0.999
    assert [result.name for result in together.stream(images)] == [result.name for result in results]


def test_stream_reads_no_further_than_its_queues(predictor):
    read = []

    def images():
        for index in range(60):
            read.append(index)
            yield picture(seed=index)

    stream = predictor.stream(images(), queue_size=1)
    next(stream)
    time.sleep(1.0)  # more than the stages need to go as far as they may
    # Batches of 2: one before and one behind each of two stages, one in the hands of source, stages and caller.
    assert len(read) <= 2 * (3 + 4)
    stream.close()


def test_panoptic_result(scripted):
    (result,) = scripted("panoptic", overlap_mask_area_threshold=0.3)(picture(32, 32))
    assert [segment["label"] for segment in result.segments] == ["sky", "grass", "crate", "crate"]
    for segment in result.segments:
        mask = result.segmentation == segment["id"]
        np.testing.assert_array_equal(decode_rle(segment["rle"]), mask)
        assert segment["area"] == mask.sum()
        rows, columns = np.nonzero(mask)
        left, top, width, height = segment["bbox"]
        assert (left, top, left + width, top + height) == (
            columns.min(),
            rows.min(),
            columns.max() + 1,
            rows.max() + 1,
        )
    scores = [segment["score"] for segment in result.segments]
    assert scores[2] == pytest.approx(np.exp(12) / (np.exp(12) + np.exp(4) + 2), abs=1e-5)


def test_instances_keep_their_overlap(scripted):
    (result,) = scripted("instance", overlap_mask_area_threshold=0.3)(picture(32, 32))
    assert [segment["label"] for segment in result.segments] == ["crate", "crate"]
    first, second = (result.mask(segment["id"]) for segment in result.segments)
    assert (first & second).sum() > 0
    assert result.segments[0]["score"] > result.segments[1]["score"]
    assert np.all(result.segmentation[first] == result.segments[0]["id"])  # the better one is on top


def test_semantic_result_has_one_scored_segment_for_each_class(scripted):
    (result,) = scripted("semantic")(picture(32, 32))
    assert [(segment["id"], segment["label_id"]) for segment in result.segments] == [(1, 0), (2, 1), (3, 2)]
    assert all(0.4 < segment["score"] <= 1 for segment in result.segments)
    np.testing.assert_array_equal(result.semantic_map() + 1, result.segmentation)
    assert sum(segment["area"] for segment in result.segments) == 32 * 32


def test_thresholds_replace_the_stored_ones(scripted):
    image = picture(32, 32)
    assert len(scripted("instance", overlap_mask_area_threshold=0.0)(image)[0].segments) == 2
    assert len(scripted("instance", overlap_mask_area_threshold=0.9)(image)[0].segments) == 1
    assert scripted("instance", threshold=1.0)(image)[0].segments == []


def test_merge_replaces_the_stored_one(scripted):
    """Scores tell them apart: those of mask-wise merging hold the quality of the mask."""
    image = picture(32, 32)
    stored = scripted("panoptic", overlap_mask_area_threshold=0.5)(image)[0]
    same = scripted("panoptic", overlap_mask_area_threshold=0.5, merge="argmax")(image)[0]
    assert stored.segments == same.segments
    other = scripted("panoptic", overlap_mask_area_threshold=0.5, merge="mask_wise")
    assert other.processor.panoptic_merge == "mask_wise"
    scores = [segment["score"] for segment in other(image)[0].segments]
    assert scores == sorted(scores, reverse=True)
    assert {segment["score"] for segment in stored.segments}.isdisjoint(scores)


def test_an_overlap_threshold_counts_for_stuff_too(predictor):
    processor = copy.copy(predictor.processor)
    processor.stuff_overlap_mask_area_threshold = 0.8
    made = Predictor(predictor.model, processor=processor, device="cpu", overlap_mask_area_threshold=0.3)
    assert made.processor.stuff_overlap_mask_area_threshold is None
    assert Predictor(predictor.model, processor=processor).processor.stuff_overlap_mask_area_threshold == 0.8


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 99, -1, 1.5])
def test_a_device_that_is_not_there_is_refused(predictor, device):
    with pytest.raises(ValueError, match=rf"device must be one that torch finds here.* got {device!r} with \d+ GPUs"):
        Predictor(predictor.model, processor=predictor.processor, device=device)


def test_device_0_is_the_first_gpu_and_not_the_default(predictor):
    if torch.cuda.is_available():
        model = copy.deepcopy(predictor.model)
        assert Predictor(model, processor=predictor.processor, device=0).device == torch.device("cuda:0")
    else:
        with pytest.raises(ValueError, match="got 0 with 0 GPUs"):
            Predictor(predictor.model, processor=predictor.processor, device=0)


def test_task_defaults_to_the_stored_one(checkpoint, predictor):
    assert predictor.task == "panoptic"
    assert Predictor(checkpoint, task="semantic", device="cpu").task == "semantic"


def test_loaded_model_needs_its_processor(predictor):
    with pytest.raises(ValueError, match="processor is needed"):
        Predictor(predictor.model)
    (expected,) = predictor(picture())
    (result,) = Predictor(predictor.model, processor=predictor.processor, device="cpu")(picture())
    np.testing.assert_array_equal(result.segmentation, expected.segmentation)


def test_more_than_8_bits_need_an_intensity_range(checkpoint, predictor, tmp_path):
    deep = np.linspace(0, 4095, 40 * 60).reshape(40, 60).astype(np.uint16)
    path = tmp_path / "deep.png"
    Image.fromarray(deep).save(path)
    with pytest.raises(ValueError, match=r"deep\.png.*0\.\.4095.*--intensity-range"):
        predictor(path)
    with pytest.raises(ValueError, match=r"image 0.*0\.0\.\.4095\.0"):
        predictor(deep)
    (from_file, from_array) = Predictor(checkpoint, device="cpu", intensity_range=(0, 4095))([path, deep])
    np.testing.assert_array_equal(from_file.image, from_array.image)
    assert (from_file.image.min(), from_file.image.max()) == (0, 255)


def test_the_intensity_range_stored_with_the_model_is_the_default(checkpoint):
    model, processor = load_checkpoint(checkpoint)
    processor = image_processor_for(model.config, intensity_range=(0, 4095))
    deep = np.linspace(0, 4095, 40 * 60).reshape(40, 60).astype(np.uint16)
    (stored,) = Predictor(model, processor=processor, device="cpu")(deep)
    assert (stored.image.min(), stored.image.max()) == (0, 255)
    (given,) = Predictor(model, processor=processor, device="cpu", intensity_range=(0, 8190))(deep)
    assert (given.image.min(), given.image.max()) == (0, 128)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"image 0 must have shape .* got \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), r"image 0 must have shape .* got \(0, 4, 3\)"),
        (np.zeros((4, 4, 3)), r"image 0 has values 0\.0\.\.0\.0 of type float64; allowed: uint8"),
        (17, "image 0 must be a path, a PIL image or an array, got int"),
    ],
)
def test_wrong_images_are_refused(predictor, image, message):
    with pytest.raises(ValueError, match=message):
        predictor([image])


def test_broken_file_is_named(predictor, tmp_path):
    path = tmp_path / "broken.jpg"
    Image.fromarray(picture(200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        predictor(path)
    with pytest.raises(ValueError, match=r"absent\.jpg"):
        predictor(tmp_path / "absent.jpg")


def test_a_folder_is_for_stream(predictor, tmp_path):
    message = f"{tmp_path} is a folder; Predictor.stream and `hf-maskformer predict` take folders"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        predictor(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "depth"}, "task must be one of .* got 'depth'"),
        ({"threshold": 1.5}, r"threshold must be within 0\.\.1, got 1\.5"),
        ({"merge": "topk"}, r"merge must be one of \['argmax', 'mask_wise'\], got 'topk'"),
        ({"merge": "mask_wise", "task": "instance"}, "merge is 'mask_wise' but the task is 'instance'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(predictor, settings, message):
    with pytest.raises(ValueError, match=message):
        Predictor(predictor.model, processor=predictor.processor, **settings)
