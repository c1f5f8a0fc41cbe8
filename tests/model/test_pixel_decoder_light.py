"""The light pixel decoder against the formula of its pyramid, written out with torch's functions."""

import torch
import torch.nn.functional as F
from torch import nn

from hf_maskformer.model.pixel_decoder_light import LightPixelDecoder

WIDTHS, STRIDES = (4, 6, 8, 10), (4, 8, 16, 32)


def decoder(**further):
    torch.manual_seed(0)
    sizes = {"dim": 8, "mask_dim": 5, "layers": 1, "heads": 2, "ffn_dim": 16, "dropout": 0.0, **further}
    part = LightPixelDecoder(list(WIDTHS), **sizes).double().eval()
    for module in part.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2.0)
    return part


def feature_maps():
    """Four maps of a 64x96 image."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(1, width, 64 // stride, 96 // stride, generator=generator).double()
        for width, stride in zip(WIDTHS, STRIDES, strict=True)
    ]


def normed(features, norm):
    """Batch norm of trained statistics, by its formula."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (features - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def test_pyramid_is_the_formula():
    part, features = decoder(layers=0), feature_maps()
    with torch.no_grad():
        embedding, memory = part(features, None)
        map_32 = normed(F.conv2d(features[3], part.input_projection.conv.weight), part.input_projection.norm)
        merged, expected = map_32, [map_32]
        for index, feature in enumerate((features[2], features[1])):
            lateral, output = part.laterals[index], part.outputs[index]
            lifted = merged.repeat_interleave(2, 2).repeat_interleave(2, 3)
            total = normed(F.conv2d(feature, lateral.conv.weight), lateral.norm) + lifted
            deep = F.relu(normed(F.conv2d(total, output.depthwise.weight, padding=1, groups=8), output.depthwise_norm))
            merged = F.relu(normed(F.conv2d(deep, output.pointwise.weight), output.pointwise_norm))
            expected.insert(0, merged)
        last, lateral = part.mask_projection, part.laterals[2]
        total = normed(F.conv2d(features[0], lateral.conv.weight), lateral.norm)
        total = total + merged.repeat_interleave(2, 2).repeat_interleave(2, 3)
        deep = F.relu(normed(F.conv2d(total, last.depthwise.weight, padding=1, groups=8), last.depthwise_norm))
        expected_embedding = F.conv2d(deep, last.pointwise.weight, last.pointwise.bias)
    torch.testing.assert_close(embedding, expected_embedding)
    assert len(memory) == len(part.memory_channels) == 3
    for actual, wanted, width in zip(memory, expected, part.memory_channels, strict=True):
        assert actual.shape[1] == width
        torch.testing.assert_close(actual, wanted)


def test_context_reaches_the_far_corner():
    """One changed cell of the coarsest map changes every pixel's embedding only through attention."""
    features = feature_maps()
    changed = [feature.clone() for feature in features]
    changed[3][0, :, 0, 0] += 1.0
    for layers, seen in ((0, False), (1, True)):
        part = decoder(layers=layers)
        with torch.no_grad():
            difference = (part(changed, None)[0] - part(features, None)[0]).abs()
        assert bool(difference[..., -1, -1].max() > 1e-6) is seen
