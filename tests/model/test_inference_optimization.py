"""Models optimized for inference predict the same, with fewer modules, and refuse what they cannot do any more."""

import pytest
import torch
from torch import nn

from hf_maskformer.model.inference_optimization import FoldingError, foldable_pairs
from model import variant_tester as tester


def trained_statistics(model):
    """Batch norms away from their start, where folding would change nothing."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
    return model


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    "name",
    ["lite-mobilenetv3-small", "lite-mobilenetv4-small", "lite-swin-tiny", "maskformer-r50", "mask2former-light"],
)
def test_predictions_stay_and_batch_norms_go(name):
    config = tester.tiny(name)
    model = trained_statistics(tester.build(config)).eval()
    inputs = tester.unlabelled(tester.batch(config))
    count = len(norms(model))
    assert count > 3
    with torch.no_grad():
        expected = model(**inputs)
        assert model.optimize_for_inference() is model
        actual = model(**inputs)
    assert norms(model) == []
    scale = expected.masks_queries_logits.abs().max()
    torch.testing.assert_close(actual.class_queries_logits, expected.class_queries_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        actual.masks_queries_logits, expected.masks_queries_logits, rtol=1e-4, atol=1e-4 * float(scale)
    )


def test_bfloat16_and_channels_last():
    config = tester.tiny("lite-mobilenetv4-small")
    model = tester.build(config).eval()
    inputs = tester.unlabelled(tester.batch(config))
    with torch.no_grad():
        expected = model(**inputs)
        model.optimize_for_inference(dtype=torch.bfloat16, channels_last=True)
        actual = model(**inputs)
    assert actual.masks_queries_logits.dtype == torch.bfloat16
    assert all(not parameter.requires_grad for parameter in model.parameters())
    difference = (actual.class_queries_logits.float() - expected.class_queries_logits).abs().max()
    assert difference < 0.1 * expected.class_queries_logits.abs().max()


def test_training_and_saving_are_refused(tmp_path):
    config = tester.tiny("lite-mobilenetv4-small")
    model = tester.build(config).optimize_for_inference()
    assert not model.training
    model.eval()
    for part in (model, model.model):
        with pytest.raises(RuntimeError, match=r"optimized for inference and cannot be trained; load it again"):
            part.train()
    with pytest.raises(RuntimeError, match=r"cannot be saved; save the original"):
        model.save_pretrained(tmp_path)
    assert model.optimize_for_inference() is model
    tester.build(config).train()  # another model is as before


class TwoReaders(nn.Module):
    """A convolution that a norm reads and, where `as_module`, another module, or else the sum."""

    def __init__(self, as_module):
        super().__init__()
        self.convolution, self.norm, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.as_module = as_module

    def forward(self, images):
        made = self.convolution(images)
        return self.norm(made) + (self.relu(made) if self.as_module else made)


def test_a_convolution_with_a_second_reader_is_left_alone():
    assert foldable_pairs(TwoReaders(as_module=True).eval(), torch.ones(1, 3, 4, 4)) == []


def test_a_reader_that_is_no_module_is_noticed():
    config = tester.tiny("lite-mobilenetv4-small")
    model = trained_statistics(tester.build(config)).eval()
    before = model.model.backbone._run_body
    branch = trained_statistics(TwoReaders(as_module=False)).eval()
    model.model.backbone.add_module("branch", branch)
    model.model.backbone._run_body = lambda images: before(branch(images))
    with pytest.raises(FoldingError, match=r"changed the predictions"):
        model.optimize_for_inference()
