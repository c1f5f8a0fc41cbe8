"""preprocessor_config.json of transformers, read and written field by field."""

import numpy as np
import pytest
import torch
from transformers import MaskFormerImageProcessor

from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor

LABELS = {0: "road", 1: "car", 2: "sky"}


def photo(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class TestOfficialFiles:
    def test_own_files_of_transformers(self, tmp_path):
        MaskFormerImageProcessor(
            size={"shortest_edge": 64, "longest_edge": 90}, ignore_index=255, do_reduce_labels=True, num_labels=150
        ).save_pretrained(tmp_path)
        processor = HfMaskFormerImageProcessor.from_pretrained(tmp_path)
        theirs = MaskFormerImageProcessor.from_pretrained(tmp_path)
        assert processor.do_reduce_labels is True
        assert processor.task == "panoptic"
        image = photo(40, 70)
        expected = theirs(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(processor(image)["pixel_values"], expected, atol=1e-6, rtol=1e-6)

    def test_file_that_says_nothing_has_the_official_size(self):
        processor = HfMaskFormerImageProcessor.from_dict({"image_processor_type": "Mask2FormerImageProcessor"})
        assert dict(processor.size) == {"shortest_edge": 800, "longest_edge": 1333}

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"size": 640, "max_size": 2560}, {"size": {"shortest_edge": 640, "longest_edge": 2560}}),
            ({"size": 640, "_max_size": 2048}, {"size": {"shortest_edge": 640, "longest_edge": 2048}}),
            ({"size": {"shortest_edge": 8}}, {"size": {"shortest_edge": 8, "longest_edge": 1333}}),
            ({"size": {"height": 384, "width": 380}}, {"size": {"height": 384, "width": 380}}),
            ({"size": [384, 380]}, {"size": {"height": 384, "width": 380}}),
            ({"reduce_labels": True}, {"do_reduce_labels": True}),
            ({"size_divisibility": 16}, {"size_divisor": 16}),
            ({"size_divisor": 0}, {"size_divisor": 0}),
            ({"ignore_index": None, "num_labels": 150}, {"ignore_index": None}),
            ({}, {"ignore_index": None}),
            ({"ignore_index": 254}, {"ignore_index": 254}),
            ({"reduce_labels": True}, {"ignore_index": 255}),  # transformers demands a value then
            ({"pad_size": {"height": 800, "width": 900}}, {"pad_size": {"height": 800, "width": 900}}),
            ({"do_center_crop": False, "crop_size": None, "do_convert_rgb": True}, {}),
        ],
    )
    def test_legacy_fields(self, fields, expected):
        legacy = {"feature_extractor_type": "MaskFormerFeatureExtractor", **fields}
        processor = HfMaskFormerImageProcessor.from_dict(legacy)
        for name, value in expected.items():
            assert getattr(processor, name) == value

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"do_center_crop": True}, "do_center_crop=True has no counterpart"),
            ({"jitter": 3}, "unknown field jitter=3"),
            ({"size": "large"}, "size='large' cannot be read"),
            ({"reduce_labels": True, "do_reduce_labels": False}, "contradicts"),
        ],
    )
    def test_what_cannot_be_translated_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            HfMaskFormerImageProcessor.from_dict({"image_processor_type": "MaskFormerImageProcessor", **fields})

    def test_file_of_another_model_is_refused(self):
        with pytest.raises(ValueError, match="DetrImageProcessor"):
            HfMaskFormerImageProcessor.from_dict({"image_processor_type": "DetrImageProcessor"})

    def test_label_255_of_a_file_without_ignore_index_is_kept(self, tmp_path):
        MaskFormerImageProcessor(num_labels=300).save_pretrained(tmp_path / "theirs")
        label_map = np.full((20, 30), 255, dtype=np.uint8)
        label_map[:10] = 3
        theirs = MaskFormerImageProcessor.from_pretrained(tmp_path / "theirs")
        expected = theirs(photo(), segmentation_maps=label_map, return_tensors="pt")["class_labels"][0]
        ours = HfMaskFormerImageProcessor.from_pretrained(tmp_path / "theirs")
        assert ours(photo(), segmentation_maps=label_map)["class_labels"][0].tolist() == expected.tolist() == [3, 255]
        ours.save_official(tmp_path / "back")
        assert MaskFormerImageProcessor.from_pretrained(tmp_path / "back").ignore_index is None

    @pytest.mark.parametrize(
        "settings",
        [
            {"size": {"max_height": 64, "max_width": 96}, "id2label": LABELS},
            {"size": {"shortest_edge": 50, "longest_edge": 90}, "do_reduce_labels": True},
            {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3},
        ],
    )
    def test_official_file_gives_the_same_pixels(self, settings, tmp_path):
        processor = HfMaskFormerImageProcessor(**settings)
        processor.save_official(tmp_path)
        theirs = MaskFormerImageProcessor.from_pretrained(tmp_path)
        for image in (photo(40, 70), photo(333, 500), photo(90, 31)):
            ours, expected = processor(image), theirs(image, return_tensors="pt")
            torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=1e-6)
            assert torch.equal(ours["pixel_mask"], expected["pixel_mask"])
        assert theirs.do_reduce_labels == processor.do_reduce_labels
        back = HfMaskFormerImageProcessor.from_pretrained(tmp_path)
        torch.testing.assert_close(back(photo())["pixel_values"], processor(photo())["pixel_values"])

    @pytest.mark.parametrize(
        "settings",
        [
            {"intensity_range": (0, 9)},
            {"do_pad": False},
            {"class_activation": "sigmoid"},
            {"panoptic_merge": "mask_wise"},
        ],
    )
    def test_what_the_official_file_cannot_say_is_refused(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            HfMaskFormerImageProcessor(**settings).to_official_dict()
