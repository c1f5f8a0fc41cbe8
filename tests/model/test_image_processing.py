"""The image processor as a whole: sizes and padding, settings, code that travels, the stock pipeline."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DetrConfig,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    SwinConfig,
)
from transformers.pipelines import ImageSegmentationPipeline
from transformers.utils import ModelOutput

from hf_maskformer.model import image_processing_hf_maskformer as image_processing
from hf_maskformer.model.configuration_hf_maskformer import HfMaskFormerConfig
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor

LABELS = {0: "road", 1: "car", 2: "sky"}
PLAIN = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_pad": False}


def photo(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def warned(caplog):
    """What the processor's logger says; transformers' loggers do not reach the root logger."""
    image_processing.logger.addHandler(caplog.handler)
    yield caplog
    image_processing.logger.removeHandler(caplog.handler)


def tiny(**kwargs) -> HfMaskFormerImageProcessor:
    """A processor that leaves images as they are, with the three labels."""
    return HfMaskFormerImageProcessor(**{**PLAIN, "id2label": LABELS, **kwargs})


class TestGeometry:
    def test_default_is_one_canvas(self):
        features = HfMaskFormerImageProcessor(size={"max_height": 64, "max_width": 96})(
            [photo(20, 30), photo(200, 100)], return_tensors="pt"
        )
        assert features["pixel_values"].shape == (2, 3, 64, 96)
        assert features["pixel_values"].dtype == torch.float32
        assert features["pixel_mask"].dtype == torch.int64
        # 20x30 grows to 64x96 exactly; 200x100 shrinks to 64x32
        assert features["pixel_mask"].sum(dim=(1, 2)).tolist() == [64 * 96, 64 * 32]
        assert features["pixel_mask"][1, :, :32].all()
        assert not features["pixel_values"][1, :, :, 32:].any()

    def test_extreme_aspect_ratio_keeps_a_pixel(self):
        features = HfMaskFormerImageProcessor(size={"max_height": 32, "max_width": 32})(photo(300, 2))
        assert features["pixel_mask"].sum() == 32

    @pytest.mark.parametrize(("divisor", "shape"), [(0, (1, 90)), (32, (32, 96))])
    def test_extreme_aspect_ratio_keeps_a_pixel_with_a_shortest_edge_too(self, divisor, shape):
        size = {"shortest_edge": 50, "longest_edge": 90}
        features = HfMaskFormerImageProcessor(size=size, size_divisor=divisor)(photo(1, 4000))
        assert features["pixel_values"].shape[-2:] == shape

    @pytest.mark.parametrize(
        "settings",
        [
            {"size": {"shortest_edge": 64, "longest_edge": 100}},
            {"size": {"shortest_edge": 50, "longest_edge": 64}, "size_divisor": 16},
            {"size": {"shortest_edge": 64, "longest_edge": 100}, "pad_size": {"height": 160, "width": 160}},
            {"size": {"height": 48, "width": 40}, "size_divisor": 16},
            {"size": {"shortest_edge": 64, "longest_edge": 100}, "do_normalize": False},
            {"size": {"shortest_edge": 64, "longest_edge": 100}, "resample": 3},
        ],
    )
    def test_pixel_values_are_those_of_transformers(self, settings):
        images = [photo(40, 61), photo(90, 33, seed=1), Image.fromarray(photo(64, 64, seed=2))]
        ours = HfMaskFormerImageProcessor(**settings)(images)
        theirs = MaskFormerImageProcessor(**settings)(images, return_tensors="pt")
        torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=1e-6, rtol=1e-6)
        assert torch.equal(ours["pixel_mask"], theirs["pixel_mask"])

    def test_targets_are_aligned_with_the_image_and_padding_is_false(self):
        """Transformers fills the padding of binary masks with 255."""
        label_map = np.zeros((40, 30), dtype=np.uint8)
        label_map[:, 15:] = 1
        image = np.stack([label_map * 255] * 3, axis=-1)
        processor = HfMaskFormerImageProcessor(
            size={"max_height": 32, "max_width": 32}, do_normalize=False, resample=0
        )
        features = processor(image, segmentation_maps=label_map)
        masks = features["mask_labels"][0]
        assert masks.dtype == torch.bool
        assert masks.shape == (2, 32, 32)
        assert torch.equal(masks.sum(dim=0), features["pixel_mask"][0])
        assert torch.equal(masks[1], features["pixel_values"][0, 0] > 0.5)
        assert torch.equal(features["pixel_values"][0, :, :, 24:], torch.zeros(3, 32, 8))

    def test_masks_are_those_of_transformers(self):
        label_map = np.random.default_rng(0).integers(0, 3, (37, 53)).astype(np.int64)
        settings = {"size": {"shortest_edge": 64, "longest_edge": 200}, "ignore_index": 255}
        ours = HfMaskFormerImageProcessor(**settings)(photo(37, 53), segmentation_maps=label_map)
        theirs = MaskFormerImageProcessor(**settings)(photo(37, 53), segmentation_maps=label_map, return_tensors="pt")
        assert torch.equal(ours["mask_labels"][0], theirs["mask_labels"][0].bool())
        assert torch.equal(ours["class_labels"][0], theirs["class_labels"][0])

    def test_without_resizing_a_small_image_is_padded_to_the_canvas_and_a_large_one_refused(self):
        processor = HfMaskFormerImageProcessor(size={"max_height": 32, "max_width": 32}, do_resize=False)
        assert processor(photo(20, 30))["pixel_values"].shape == (1, 3, 32, 32)
        with pytest.raises(ValueError, match=r"image 1 has size \[40, 30\], larger than \[32, 32\]"):
            processor([photo(20, 30), photo(40, 30)])
        official = HfMaskFormerImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}, do_resize=False)
        assert official(photo(20, 33))["pixel_values"].shape == (1, 3, 32, 64)

    def test_images_of_different_size_without_padding_are_refused(self):
        with pytest.raises(ValueError, match="do_pad=False needs images of one size"):
            tiny()([photo(4, 5), photo(5, 4)])

    @pytest.mark.parametrize("size", [512, {"shortest_edge": 5}, {"max_height": 0, "max_width": 4}, [3, 4]])
    def test_wrong_sizes_are_refused(self, size):
        with pytest.raises(ValueError, match="size must be a dict"):
            HfMaskFormerImageProcessor(size=size)


class TestSettings:
    def test_save_and_load(self, tmp_path):
        processor = HfMaskFormerImageProcessor(
            id2label=LABELS, thing_label_ids=[1], task="instance", threshold=0.3, intensity_range=[0, 4095]
        )
        processor.save_pretrained(tmp_path)
        loaded = HfMaskFormerImageProcessor.from_pretrained(tmp_path)
        saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_hf_maskformer.HfMaskFormerImageProcessor"}
        assert saved["image_processor_type"] == "HfMaskFormerImageProcessor"
        assert loaded.id2label == LABELS
        assert loaded.thing_label_ids == (1,)
        assert (loaded.task, loaded.threshold, loaded.intensity_range) == ("instance", 0.3, (0.0, 4095.0))
        assert loaded.label_spec.stuff_label_ids == (0, 2)
        assert HfMaskFormerImageProcessor.from_json_file(tmp_path / "preprocessor_config.json").task == "instance"

    def test_the_merge_is_saved_and_loaded(self, tmp_path):
        settings = {"panoptic_merge": "mask_wise", "stuff_overlap_mask_area_threshold": 0.7}
        HfMaskFormerImageProcessor(**settings).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert {name: saved[name] for name in settings} == settings
        loaded = HfMaskFormerImageProcessor.from_pretrained(tmp_path)
        assert {name: getattr(loaded, name) for name in settings} == settings
        changed = HfMaskFormerImageProcessor.from_pretrained(tmp_path, panoptic_merge="argmax")
        assert changed.panoptic_merge == "argmax"

    def test_files_from_before_there_was_a_choice_are_merged_as_before(self):
        fields = HfMaskFormerImageProcessor().to_dict()
        for name in ("panoptic_merge", "stuff_overlap_mask_area_threshold"):
            fields.pop(name, None)
        loaded = HfMaskFormerImageProcessor.from_dict(fields)
        assert (loaded.panoptic_merge, loaded.stuff_overlap_mask_area_threshold) == ("argmax", None)

    def test_overrides_give_no_warning(self, tmp_path, caplog):
        HfMaskFormerImageProcessor().save_pretrained(tmp_path)
        loaded = HfMaskFormerImageProcessor.from_pretrained(tmp_path, task="semantic", threshold=0.1)
        assert (loaded.task, loaded.threshold) == ("semantic", 0.1)
        assert caplog.records == []

    def test_old_names_that_loading_would_ignore_are_refused(self, tmp_path):
        HfMaskFormerImageProcessor().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="unknown image processor setting 'max_size'"):
            HfMaskFormerImageProcessor.from_pretrained(tmp_path, max_size=1333)

    @pytest.mark.parametrize("same", [LABELS, {str(label): name for label, name in LABELS.items()}])
    def test_the_same_labels_keep_the_things(self, tmp_path, warned, same):
        HfMaskFormerImageProcessor(id2label=LABELS, thing_label_ids=[1], task="panoptic").save_pretrained(tmp_path)
        loaded = HfMaskFormerImageProcessor.from_pretrained(tmp_path, id2label=same)
        assert (loaded.id2label, loaded.thing_label_ids) == (LABELS, (1,))
        assert not warned.records

    @pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
    def test_other_labels_reset_the_things_as_the_config_does(self, tmp_path, warned, task):
        names = {0: "w", 1: "x", 2: "y", 3: "z"}
        HfMaskFormerConfig(id2label=LABELS, thing_label_ids=[1], task=task).save_pretrained(tmp_path)
        HfMaskFormerImageProcessor(id2label=LABELS, thing_label_ids=[1], task=task).save_pretrained(tmp_path)
        loaded = HfMaskFormerImageProcessor.from_pretrained(tmp_path, id2label=names)
        assert "thing_label_ids" in warned.text
        config = HfMaskFormerConfig.from_pretrained(tmp_path, id2label=names)
        assert list(loaded.thing_label_ids) == config.thing_label_ids == ([] if task == "semantic" else [0, 1, 2, 3])
        given = HfMaskFormerImageProcessor.from_pretrained(tmp_path, id2label=names, thing_label_ids=[3])
        assert given.thing_label_ids == (3,)

    def test_other_labels_leave_unknown_things_unknown(self, tmp_path, warned):
        HfMaskFormerImageProcessor(id2label=LABELS, task="panoptic").save_pretrained(tmp_path)
        assert HfMaskFormerImageProcessor.from_pretrained(tmp_path, id2label={0: "a"}).thing_label_ids is None
        HfMaskFormerImageProcessor(id2label=LABELS, thing_label_ids=[2]).save_pretrained(tmp_path)
        assert HfMaskFormerImageProcessor.from_pretrained(tmp_path, id2label={0: "a"}).thing_label_ids is None

    def test_a_wrong_task_is_refused_when_assigned(self):
        processor = HfMaskFormerImageProcessor(task="semantic")
        with pytest.raises(ValueError, match=r"task must be one of \['semantic', .*, None\], got 'foo'"):
            processor.task = "foo"
        assert processor.task == "semantic"
        processor.task = None

    def test_nothing_ignored_is_saved_and_loaded(self, tmp_path):
        HfMaskFormerImageProcessor(ignore_index=None).save_pretrained(tmp_path)
        assert HfMaskFormerImageProcessor.from_pretrained(tmp_path).ignore_index is None
        assert HfMaskFormerImageProcessor.from_pretrained(tmp_path, ignore_index=7).ignore_index == 7
        assert HfMaskFormerImageProcessor().ignore_index == 255
        many = {label: str(label) for label in range(300)}
        assert HfMaskFormerImageProcessor(ignore_index=None, id2label=many).label_spec.num_labels == 300

    def test_copies_and_pickles_with_hidden_methods(self):
        processor = HfMaskFormerImageProcessor(task="semantic", id2label=LABELS)
        for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
            assert twin.to_dict() == processor.to_dict()
            assert not hasattr(twin, "post_process_panoptic_segmentation")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"thresold": 0.3}, "unknown image processor setting 'thresold', did you mean 'threshold'"),
            ({"task": "pan"}, "task must be one of"),
            ({"class_activation": "relu"}, "class_activation must be one of"),
            ({"threshold": 1.5}, r"threshold must be in 0..1, got 1.5"),
            ({"stuff_overlap_mask_area_threshold": -1}, r"stuff_overlap_mask_area_threshold must be in 0..1, got -1"),
            ({"panoptic_merge": "topk"}, r"panoptic_merge must be one of \['argmax', 'mask_wise'\], got 'topk'"),
            ({"intensity_range": (5, 5)}, "low < high"),
            ({"id2label": {1: "a"}}, "without a gap"),
            ({"id2label": {0: "a"}, "thing_label_ids": [4]}, r"thing_label_ids \[4\]"),
            ({"thing_label_ids": [-1]}, r"thing_label_ids must be label ids from 0 up, got \(-1,\)"),
            ({"id2label": {}}, r"id2label must name the ids 0\.\.K-1 without a gap, got \[\]"),
        ],
    )
    def test_wrong_settings_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            HfMaskFormerImageProcessor(**settings)
        with pytest.raises(ValueError, match=message):
            HfMaskFormerImageProcessor()(photo(), **settings)
        with pytest.raises(ValueError, match=message):
            HfMaskFormerImageProcessor.from_dict(HfMaskFormerImageProcessor().to_dict(), **settings)

    def test_labels_that_are_no_table_are_refused(self):
        message = r"id2label must be a dict of label id -> name, got \['a', 'b'\]"
        with pytest.raises(ValueError, match=message):
            HfMaskFormerImageProcessor(id2label=["a", "b"])
        with pytest.raises(ValueError, match=message):
            HfMaskFormerImageProcessor.from_dict(tiny(thing_label_ids=[1]).to_dict(), id2label=["a", "b"])

    def test_return_tensors(self):
        assert isinstance(tiny()(photo())["pixel_values"], torch.Tensor)
        assert isinstance(tiny()(photo(), return_tensors="np")["pixel_values"], np.ndarray)


class TestThingsOfInstances:
    @pytest.mark.parametrize(("things", "labels"), [(None, {0, 1}), ([1], {1}), ([], set())])
    def test_none_is_unknown_and_an_empty_list_is_all_stuff(self, things, labels):
        classes = torch.tensor([[[9.0, 0, 0, 0], [0, 9.0, 0, 0]]])  # (1, 2, 3 + 1)
        masks = torch.full((1, 2, 8, 8), -9.0)
        masks[0, 0, :4] = masks[0, 1, 4:] = 9.0
        outputs = ModelOutput(class_queries_logits=classes, masks_queries_logits=masks, valid_extent=None)
        processor = tiny(thing_label_ids=things)
        (result,) = processor.post_process_instance_segmentation(outputs, target_sizes=[(8, 8)])
        assert {segment["label_id"] for segment in result["segments_info"]} == labels
        assert result["segmentation"].shape == (8, 8)
        assert result["segmentation"].max() == len(labels)
        (maps,) = processor.post_process_instance_segmentation(outputs, target_sizes=[(8, 8)], return_binary_maps=True)
        assert maps["segmentation"].shape == (len(labels), 8, 8)


@pytest.mark.parametrize("things", [[3], [-1]])
def test_things_that_the_outputs_do_not_have_are_refused(things):
    outputs = ModelOutput(class_queries_logits=torch.zeros(1, 2, 4), masks_queries_logits=torch.zeros(1, 2, 8, 8))
    processor = HfMaskFormerImageProcessor()
    processor.thing_label_ids = things
    for task in ("instance", "panoptic"):
        with pytest.raises(ValueError, match=rf"thing_label_ids contains {things[0]}, .* 0\.\.2"):
            getattr(processor, f"post_process_{task}_segmentation")(outputs)


REMOTE_SCRIPT = """
import sys
for name in ("hf_maskformer", "scipy", "timm"):
    sys.modules[name] = None
import numpy as np
from transformers import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules"), type(processor).__module__
features = processor(np.zeros((20, 30, 3), np.uint8), segmentation_maps=np.ones((20, 30), int))
assert features["pixel_values"].shape == (1, 3, 32, 32)
assert features["class_labels"][0].tolist() == [1]
assert not hasattr(processor, "post_process_panoptic_segmentation")
processor.save_pretrained(sys.argv[2])
AutoImageProcessor.from_pretrained(sys.argv[2], trust_remote_code=True)
print("loaded")
"""


def test_processor_travels_without_the_package(tmp_path):
    HfMaskFormerImageProcessor(
        size={"max_height": 32, "max_width": 32}, id2label=LABELS, task="semantic"
    ).save_pretrained(tmp_path / "first")
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "HOME": str(tmp_path),
    }
    run = subprocess.run(
        [sys.executable, "-c", REMOTE_SCRIPT, str(tmp_path / "first"), str(tmp_path / "second")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "loaded", run.stderr


@pytest.fixture(scope="module")
def official_model():
    torch.manual_seed(0)
    config = MaskFormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2, image_size=32
        ),
        decoder_config=DetrConfig(
            d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, num_queries=6
        ),
        fpn_feature_size=32,
        mask_feature_size=32,
        id2label={str(label): name for label, name in LABELS.items()},
        num_labels=3,
    )
    return MaskFormerForInstanceSegmentation(config).eval()


class TestStockPipeline:
    @pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
    def test_task_and_stored_thresholds_decide(self, task, official_model):
        """Weak scores gave `[]`, a semantic model was read as panoptic, greyscale crashed."""
        processor = HfMaskFormerImageProcessor(
            size={"max_height": 64, "max_width": 64},
            id2label=LABELS,
            thing_label_ids=(1,),
            task=task,
            threshold=0.0,
            mask_threshold=0.05,
            overlap_mask_area_threshold=0.0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = ImageSegmentationPipeline(official_model, image_processor=processor)
            images = [Image.fromarray(photo(40, 60)), Image.fromarray(photo(50, 20)[..., 0])]
            results = pipe(images, batch_size=2)
        assert len(results) == 2
        for image, segments in zip(images, results, strict=True):
            assert all(segment["mask"].size == image.size for segment in segments)
            if task == "semantic":
                assert [segment["score"] for segment in segments] == [None] * len(segments)
                covered = sum((np.array(segment["mask"]) > 0).astype(int) for segment in segments)
                assert (covered == 1).all()
            else:
                assert all(0 <= segment["score"] < 0.9 for segment in segments)
            if task == "instance":
                assert {segment["label"] for segment in segments} <= {"car"}
        assert any(results)

    @pytest.mark.parametrize(("merge", "found"), [("argmax", 2), ("mask_wise", 1)])
    def test_the_stored_merge_decides(self, merge, found, official_model, monkeypatch):
        """A car hides 4 of 10 columns of label 0: too many for stuff in mask-wise merging only."""
        masks = torch.full((1, 2, 10, 10), -20.0)
        masks[0, 0, :, :4] = masks[0, 1] = 20.0
        classes = torch.log(torch.tensor([[[0.01, 0.98, 0.005, 0.005], [0.8, 0.1, 0.05, 0.05]]]))
        output = {"class_queries_logits": classes, "masks_queries_logits": masks}
        monkeypatch.setattr(official_model, "forward", lambda **inputs: ModelOutput(**output))
        processor = HfMaskFormerImageProcessor(
            size={"max_height": 64, "max_width": 64},
            id2label=LABELS,
            thing_label_ids=(1,),
            task="panoptic",
            overlap_mask_area_threshold=0.6,
            stuff_overlap_mask_area_threshold=0.8,
            panoptic_merge=merge,
        )
        pipe = ImageSegmentationPipeline(official_model, image_processor=processor)
        (segments,) = pipe([Image.fromarray(photo(10, 10))])
        names = [official_model.config.id2label[1], official_model.config.id2label[0]]
        assert [segment["label"] for segment in segments] == names[:found]
