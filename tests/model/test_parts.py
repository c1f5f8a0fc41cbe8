"""Single parts against formulas written out by hand: attention, position codes, FPN, mask heads."""

import math

import pytest
import torch

from hf_maskformer.model import layers
from hf_maskformer.model.layers import MLP, Attention, group_count, resize_padding
from hf_maskformer.model.mask_head import (
    PLACE_FREQUENCIES,
    DotProductMaskHead,
    LocatedDotProductMaskHead,
    mask_products,
    place_codes,
)
from hf_maskformer.model.pixel_decoder_fpn import FpnPixelDecoder, TransformerFpnPixelDecoder
from hf_maskformer.model.position_encoding import SinePositionEncoding2d
from hf_maskformer.model.query_decoder_standard import StandardQueryDecoder
from model import variant_tester as tester


def feature_maps() -> list[torch.Tensor]:
    """Four maps of a 64x96 image."""
    return [torch.randn(1, width, 64 // s, 96 // s) for width, s in ((4, 4), (6, 8), (8, 16), (10, 32))]


def test_attention_with_weights_equals_attention_without():
    attention = Attention(16, heads=4, dropout=0.0).double()
    query, memory = torch.randn(2, 3, 16).double(), torch.randn(2, 5, 16).double()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    fast, none = attention(query, memory, memory, key_padding=padding)
    slow, weights = attention(query, memory, memory, key_padding=padding, need_weights=True)
    assert none is None
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3).double())
    assert weights[1, :, :, 3:].abs().max() == 0


def test_attention_equals_torch():
    ours = Attention(8, heads=2, dropout=0.0)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.weight.copy_(ours.output.weight)
        theirs.out_proj.bias.copy_(ours.output.bias)
    query, key, value = torch.randn(1, 3, 8), torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    torch.testing.assert_close(ours(query, key, value)[0], theirs(query, key, value)[0], atol=1e-6, rtol=1e-5)


def test_position_code_of_the_last_cell_is_a_full_turn():
    codes = SinePositionEncoding2d(8)(3, 5, padding=None, device=torch.device("cpu")).unflatten(1, (3, 5))[0]
    row = 2 / (3 + 1e-6) * 2 * math.pi  # second of three rows, first frequency
    assert codes[1, 0, 0].item() == pytest.approx(math.sin(row), abs=1e-5)
    assert codes[1, 0, 1].item() == pytest.approx(math.cos(row), abs=1e-5)
    column = 4 / (5 + 1e-6) * 2 * math.pi / 10_000 ** (2 / 4)  # fourth of five columns, second frequency
    assert codes[0, 3, 6].item() == pytest.approx(math.sin(column), abs=1e-5)


def test_pyramid_hands_over_maps_at_strides_8_16_32():
    decoder = FpnPixelDecoder([4, 6, 8, 10], dim=8, mask_dim=5)
    features = feature_maps()
    mask_features, memory = decoder(features, None)
    assert mask_features.shape == (1, 5, 16, 24)
    assert [tuple(level.shape[1:]) for level in memory] == [(8, 8, 12), (8, 4, 6), (10, 2, 3)]
    assert decoder.memory_channels == [8, 8, 10]
    assert memory[-1] is features[-1]


def test_transformer_pyramid_replaces_the_coarsest_map():
    decoder = TransformerFpnPixelDecoder(
        [4, 6, 8, 10], dim=8, mask_dim=5, layers=1, heads=2, ffn_dim=8, dropout=0.0
    ).eval()
    features = feature_maps()
    mask_features, memory = decoder(features, None)
    assert mask_features.shape == (1, 5, 16, 24)
    assert memory[-1].shape == (1, 8, 2, 3)


@pytest.mark.parametrize(("stride", "level"), [(8, 0), (16, 1), (32, 2)])
def test_query_decoder_reads_the_map_of_its_stride(stride, level):
    decoder = StandardQueryDecoder(
        [4, 6, 8],
        dim=8,
        layers=1,
        heads=2,
        ffn_dim=8,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        activation="relu",
        num_queries=3,
        memory_stride=stride,
    ).eval()
    memory = [torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4), torch.randn(1, 8, 2, 2)]
    heads = {"class_head": torch.nn.Identity(), "mask_head": lambda states, features: states, "all_layers": True}
    before = decoder(memory, torch.zeros(1), None, **heads)[0].states
    for index, feature_map in enumerate(memory):
        changed = [level_map + 1 if level_map is feature_map else level_map for level_map in memory]
        after = decoder(changed, torch.zeros(1), None, **heads)[0].states
        assert torch.equal(after, before) == (index != level)


def test_mask_is_the_dot_product_of_embedding_and_pixel():
    head = DotProductMaskHead(6, mask_dim=4, layers=3)
    states, features = torch.randn(1, 2, 6), torch.randn(1, 4, 3, 5)
    masks = head(states, features)
    expected = head.embedding(states)[0, 1] @ features[0, :, 2, 3]
    torch.testing.assert_close(masks[0, 1, 2, 3], expected)


@pytest.mark.parametrize("head_class", [DotProductMaskHead, LocatedDotProductMaskHead])
def test_masks_are_products_of_query_and_pixel_factors(head_class):
    head = head_class(6, mask_dim=4, layers=2).double()
    states, features = torch.randn(2, 3, 6).double(), torch.randn(2, 4, 5, 7).double()
    masks = mask_products(head.query_factor(states), head.pixel_factor(features))
    assert masks.std() > 0
    torch.testing.assert_close(masks, head(states, features), rtol=0, atol=1e-12)


def test_located_head_adds_the_place():
    head = LocatedDotProductMaskHead(6, mask_dim=4, layers=2)
    states, features = torch.randn(1, 2, 6), torch.zeros(1, 4, 4, 8)
    masks = head(states, features)  # without features only the place is left
    x = (3 + 0.5) / 8
    codes = place_codes(features)
    assert codes.shape == (4 * PLACE_FREQUENCIES, 4, 8)
    assert codes[2 * PLACE_FREQUENCIES, 1, 3].item() == pytest.approx(math.sin(math.pi * x), abs=1e-6)
    torch.testing.assert_close(masks[0, 1, 1, 3], head.place(states)[0, 1] @ codes[:, 1, 3])


@pytest.mark.parametrize("name", ["maskformer-r50", "maskformer-r50-panoptic"])
def test_masks_by_kernels_equal_those_of_the_embedding(name):
    config = tester.tiny(name, num_queries=5, mask_dim=8)
    model = tester.build(config).double().eval()
    projected = []
    model.model.pixel_decoder.mask_projection.register_forward_hook(lambda *_: projected.append(1))
    inputs = tester.unlabelled(tester.batch(config, size=(64, 96)))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = model(**inputs).masks_queries_logits
    assert len(projected) == 1
    with torch.no_grad():
        found = model(**inputs)
        assert len(projected) == 1
        model(**inputs, output_hidden_states=True)
    assert len(projected) == 2
    torch.testing.assert_close(found.masks_queries_logits, expected, atol=1e-10, rtol=1e-10)


def test_feed_forward_in_rows_equals_the_whole(monkeypatch):
    monkeypatch.setattr(layers, "ROWS_AT_ONCE", 4)
    seen = []
    module = layers.FeedForward(6, hidden_dim=10, dropout=0.0, activation="relu", activation_dropout=0.0).double()
    module.expand.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].numel() // 6))
    states = torch.randn(2, 3, 3, 6).double()
    whole = module(states)
    with torch.no_grad():
        rows = module(states)
    assert seen == [18, 4, 4, 4, 4, 2]
    assert rows.shape == whole.shape
    torch.testing.assert_close(rows, whole)


def test_mlp_has_no_activation_after_the_last_layer():
    mlp = MLP(2, 4, 1, layers=3)
    assert len(mlp.layers) == 3
    with torch.no_grad():
        mlp.layers[-1].bias.fill_(-5.0)
        mlp.layers[-1].weight.zero_()
    assert mlp(torch.zeros(1, 2)).item() == -5.0


def test_group_count_divides():
    assert [group_count(dim) for dim in (256, 64, 40, 24, 7)] == [32, 32, 20, 24, 7]


def test_padding_of_a_cell_is_that_of_its_first_pixel():
    padding = torch.zeros(1, 4, 4, dtype=torch.bool)
    padding[:, :, 3:] = True
    padding[:, 2:] = True
    assert resize_padding(padding, (2, 2)).tolist() == [[[False, False], [True, True]]]
    assert resize_padding(None, (2, 2)) is None
