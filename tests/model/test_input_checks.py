"""The models' border: wrong inputs give errors that name argument, value and what is allowed."""

import pytest
import torch
from transformers.utils import ModelOutput

from hf_maskformer.model.input_checks import check_inputs, check_targets, refuse_unknown_arguments
from hf_maskformer.model.postprocess import logits_per_image
from model import variant_tester as tester


def test_images_must_have_the_models_channels():
    with pytest.raises(ValueError, match=r"pixel_values must be \(B, 3, H, W\), got \(1, 1, 8, 8\)"):
        check_inputs(torch.zeros(1, 1, 8, 8), None, num_channels=3)
    with pytest.raises(ValueError, match=r"got \(3, 8, 8\)"):
        check_inputs(torch.zeros(3, 8, 8), None, num_channels=3)


def test_mask_of_pixels_must_have_the_images_size():
    with pytest.raises(ValueError, match=r"pixel_mask must be \(2, 8, 9\) for these pixel_values, got \(2, 9, 8\)"):
        check_inputs(torch.zeros(2, 3, 8, 9), torch.ones(2, 9, 8), num_channels=3)
    check_inputs(torch.zeros(2, 3, 8, 9), torch.ones(2, 8, 9), num_channels=3)


def test_targets_must_have_the_images_size_and_come_with_classes():
    pixels = torch.zeros(2, 3, 8, 9)
    masks = [torch.zeros(1, 8, 9), torch.zeros(0, 8, 8)]
    with pytest.raises(ValueError, match=r"mask_labels\[1\] is \(8, 8\), the canvas of its image \(8, 9\)"):
        check_targets(masks, [torch.zeros(1), torch.zeros(0)], pixels)
    with pytest.raises(ValueError, match="belong together"):
        check_targets(masks, None, pixels)
    check_targets(None, None, pixels)


@pytest.mark.parametrize("shape", ["maskformer-light", "mask2former-r50", "panoptic-segformer-light"])
def test_stacked_targets_are_those_of_the_list(shape):
    model = tester.build(tester.tiny(shape)).eval()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    masks = torch.rand(2, 2, 64, 64, generator=torch.Generator().manual_seed(1)) > 0.5
    labels = torch.tensor([[1, 2], [0, 1]])
    with torch.no_grad():
        stacked = model(pixels, mask_labels=masks, class_labels=labels).loss
        listed = model(pixels, mask_labels=list(masks), class_labels=list(labels)).loss
    assert torch.equal(stacked, listed)
    with pytest.raises(ValueError, match=r"mask_labels\[0\] is \(64, 60\), the canvas of its image \(64, 64\)"):
        model(pixels, mask_labels=masks[..., :60], class_labels=labels)


def test_unknown_arguments_are_named():
    with pytest.raises(TypeError, match="'pixel_values_typo'"):
        refuse_unknown_arguments({"pixel_values_typo": 1})
    refuse_unknown_arguments({"num_items_in_batch": 3})


@pytest.mark.parametrize("field", ["class_queries_logits", "masks_queries_logits"])
def test_post_processing_refuses_logits_that_are_not_finite(field):
    outputs = ModelOutput(class_queries_logits=torch.zeros(2, 3, 4), masks_queries_logits=torch.zeros(2, 3, 5, 5))
    assert len(logits_per_image(outputs, None)) == 2
    outputs[field][1].view(-1)[2] = torch.nan
    with pytest.raises(FloatingPointError, match="logits of image 1 "):
        logits_per_image(outputs, None)
