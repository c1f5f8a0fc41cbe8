"""The criterion, matching and the normaliser: exact values on hand-sized cases, and bad input."""

import math

import numpy as np
import pytest
import torch

from hf_maskformer.model.criterion import Criterion, loss_normalizer
from hf_maskformer.model.losses import pairwise_mask_costs
from hf_maskformer.model.matcher import match_fixed, match_hungarian
from hf_maskformer.model.targets import average_masks, paint_labels, resize_masks


def criterion(**overrides) -> Criterion:
    settings = {
        "num_labels": 3,
        "matcher": "hungarian",
        "class_weight": 1.0,
        "mask_weight": 20.0,
        "dice_weight": 1.0,
        "pixel_weight": 0.0,
        "no_object_weight": 0.1,
        "class_cost": 1.0,
        "mask_cost": 20.0,
        "dice_cost": 1.0,
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
        "resolution": "target",
    }
    return Criterion(**{**settings, **overrides})


def batch(seed=0, counts=(2, 0), queries=4, layers=2, size=(8, 8), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = len(counts)
    return {
        "class_logits": [torch.randn(images, queries, 4, generator=generator, dtype=dtype) for _ in range(layers)],
        "mask_logits": [torch.randn(images, queries, *size, generator=generator, dtype=dtype) for _ in range(layers)],
        "mask_labels": [torch.rand(n, 4 * size[0], 4 * size[1], generator=generator) > 0.5 for n in counts],
        "class_labels": [torch.randint(0, 3, (n,), generator=generator) for n in counts],
        "pixel_mask": None,
        "pixel_logits": None,
        "normalizer": torch.ones(3),
    }


# --- matching --------------------------------------------------------------------------------------------------------


def test_hungarian_ignores_the_padding_columns():
    costs = np.array([[[[5.0, 1.0, -99.0], [1.0, 5.0, -99.0], [9.0, 9.0, -99.0]]]])
    ((queries, segments),) = match_hungarian(costs, [2])[0]
    assert dict(zip(queries.tolist(), segments.tolist(), strict=True)) == {0: 1, 1: 0}


def test_fixed_matching_gives_query_k_the_class_k():
    matches = match_fixed([np.array([2, 0])], num_layers=2)
    for layer in matches:
        queries, segments = layer[0]
        assert queries.tolist() == [2, 0]
        assert segments.tolist() == [0, 1]


def test_fixed_matching_refuses_a_repeated_class():
    with pytest.raises(ValueError, match=r"class_labels\[1\] repeats \[2\]"):
        match_fixed([np.array([0]), np.array([2, 2])], num_layers=1)


def test_matches_equal_one_scipy_call_per_image_and_layer():
    """All layers and images in one pass give the assignments of a plain loop."""
    from scipy.optimize import linear_sum_assignment

    data = batch(counts=(3, 2), queries=5, layers=3)
    unit = criterion()
    targets_masks = [resize_masks(m[None].float(), (8, 8))[0] for m in data["mask_labels"]]
    seen = []
    original = unit._class_term
    unit._class_term = lambda classes, targets, matches: seen.append(matches) or original(classes, targets, matches)
    unit(**data)
    for layer in range(3):
        for image in range(2):
            logits = data["mask_logits"][layer][image].flatten(1)[None]
            targets = targets_masks[image].flatten(1)[None]
            focal, dice = pairwise_mask_costs(logits, targets, torch.ones(1, 64), alpha=0.25, gamma=2.0)
            probability = data["class_logits"][layer][image].softmax(-1)[:, data["class_labels"][image]]
            expected = linear_sum_assignment((20 * focal[0] + dice[0] - probability).numpy())
            for got, want in zip(seen[0][layer][image], expected, strict=True):
                assert got.tolist() == want.tolist()


# --- criterion -------------------------------------------------------------------------------------------------------


def test_layers_add_up():
    data = batch(layers=2)
    unit = criterion()
    whole = unit(**data)[0]
    single = [
        unit(
            **{**data, "class_logits": data["class_logits"][i : i + 1], "mask_logits": data["mask_logits"][i : i + 1]}
        )
        for i in range(2)
    ]
    torch.testing.assert_close(whole, single[0][0] + single[1][0])


def test_loss_is_the_weighted_sum_of_named_terms():
    data = batch()
    data["pixel_logits"] = torch.randn(2, 3, 8, 8)
    loss, terms, _ = criterion(pixel_weight=3.0)(**data)
    assert set(terms) == {"loss_class", "loss_mask", "loss_dice", "loss_pixel"}
    expected = terms["loss_class"] + 20 * terms["loss_mask"] + terms["loss_dice"] + 3 * terms["loss_pixel"]
    torch.testing.assert_close(loss, expected)


def test_layer_losses_are_the_shares_of_each_layer():
    data = batch()
    _, terms, by_layer = criterion()(**data)
    assert set(by_layer) == {"loss_class", "loss_mask", "loss_dice"}
    for index in range(len(data["class_logits"])):
        alone = {name: data[name][index : index + 1] for name in ("class_logits", "mask_logits")}
        _, one, _ = criterion()(**{**data, **alone})
        assert all(by_layer[name][index].item() == pytest.approx(one[name].item(), rel=1e-5) for name in by_layer)
    assert all(not losses.requires_grad for losses in by_layer.values())
    assert all(terms[name].item() == pytest.approx(by_layer[name].sum().item(), rel=1e-6) for name in by_layer)


def test_all_images_without_targets_train_every_output():
    data = batch(counts=(0, 0))
    for name in ("class_logits", "mask_logits"):
        data[name] = [tensor.requires_grad_() for tensor in data[name]]
    loss, terms, _ = criterion()(**data)
    loss.backward()
    assert terms["loss_mask"].item() == 0
    assert all(tensor.grad is not None for name in ("class_logits", "mask_logits") for tensor in data[name])


def test_more_targets_than_queries_keep_the_best_and_warn(caplog):
    data = batch(counts=(6, 1), queries=4)
    with caplog.at_level("WARNING"):
        loss, *_ = criterion()(**data)
    assert loss.isfinite()
    assert "Image 0 of a batch has 6 targets for 4 queries" in caplog.text


def test_padded_image_has_the_loss_of_the_unpadded_one():
    data = batch(counts=(2,), size=(8, 8))
    padded = {**data, "pixel_mask": torch.zeros(1, 48, 40, dtype=torch.int64)}
    padded["pixel_mask"][:, :32, :32] = 1
    padded["mask_logits"] = [torch.nn.functional.pad(t, (0, 2, 0, 4), value=7.0) for t in data["mask_logits"]]
    padded["mask_labels"] = [torch.nn.functional.pad(m, (0, 8, 0, 16)) for m in data["mask_labels"]]
    for resolution in ("target", "prediction"):
        unit = criterion(resolution=resolution)
        expected, got = unit(**data)[1], unit(**padded)[1]
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], atol=1e-6, rtol=0)


def test_dtype_is_float32_for_half_and_float64_for_double():
    for given, computed in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        data = batch()
        data["class_logits"] = [tensor.to(given) for tensor in data["class_logits"]]
        data["mask_logits"] = [tensor.to(given) for tensor in data["mask_logits"]]
        assert criterion()(**data)[0].dtype == computed


def test_autocast_does_not_reach_the_loss():
    data = batch()
    plain = criterion()(**data)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert criterion()(**data)[0].item() == plain.item()


@pytest.mark.parametrize(("term", "what"), [("class_logits", "class logits"), ("mask_logits", "mask logits")])
def test_non_finite_logits_name_the_image(term, what):
    for bad in (math.nan, math.inf):
        data = batch(counts=(2, 1))
        data[term][1][1].view(-1)[3] = bad
        with pytest.raises(FloatingPointError, match=f"Non-finite {what} for image 1"):
            criterion()(**data)


def test_non_finite_targets_name_the_image():
    data = batch(counts=(2, 1))
    data["mask_labels"] = [mask.float() for mask in data["mask_labels"]]
    data["mask_labels"][0][:] = math.nan
    with pytest.raises(FloatingPointError, match="Non-finite mask_labels for image 0"):
        criterion()(**data)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0, -0.5])
def test_a_wrong_value_in_one_pixel_of_a_target_names_the_image(bad):
    data = batch(counts=(1, 2))
    data["mask_labels"] = [mask.float() for mask in data["mask_labels"]]
    data["mask_labels"][1][0, 1, 1] = bad  # not among the pixels that the coarse masks are made of
    with pytest.raises(ValueError, match=r"mask_labels\[1\] has values outside 0\.\.1, or that are no numbers"):
        criterion()(**data)


def test_class_labels_are_integers():
    data = batch(counts=(1, 2))
    data["class_labels"][1] = torch.tensor([1.9, 0.2])
    with pytest.raises(ValueError, match=r"Image 1: class_labels must be integers, got torch.float32"):
        criterion()(**data)


def test_nothing_to_average_is_a_loss_of_0():
    """No target, and "no object" weighs nothing."""
    data = batch(counts=(0, 0))
    data["class_logits"] = [logits.requires_grad_() for logits in data["class_logits"]]
    data["normalizer"] = loss_normalizer(data["class_labels"], num_queries=4, no_object_weight=0.0)
    loss, terms, _ = criterion(no_object_weight=0.0)(**data)
    loss.backward()
    assert loss.item() == terms["loss_class"].item() == 0
    assert all((logits.grad == 0).all() for logits in data["class_logits"])


def test_wrong_class_id_names_image_and_value():
    data = batch(counts=(2, 1))
    data["class_labels"][1][0] = 3
    with pytest.raises(ValueError, match=r"class_labels\[1\] contains 3, allowed are 0\.\.2 .*1-based"):
        criterion()(**data)
    data["class_labels"][1][0] = -1
    with pytest.raises(ValueError, match=r"class_labels\[1\] contains -1"):
        criterion()(**data)


@pytest.mark.parametrize("value", [255, 2, -1])
def test_mask_values_outside_the_unit_interval_name_the_image(value):
    data = batch(counts=(2, 1))
    data["mask_labels"] = [mask.to(torch.int16) for mask in data["mask_labels"]]
    data["mask_labels"][1][0, -1, -1] = value
    with pytest.raises(ValueError, match=r"mask_labels\[1\] has values outside 0\.\.1"):
        criterion()(**data)


def test_wrong_shapes_are_refused():
    data = batch(counts=(2, 1))
    with pytest.raises(ValueError, match="2 images need as many targets"):
        criterion()(**{**data, "mask_labels": data["mask_labels"][:1]})
    with pytest.raises(ValueError, match="share one canvas"):
        criterion()(**{**data, "mask_labels": [data["mask_labels"][0], data["mask_labels"][1][:, :5]]})
    with pytest.raises(ValueError, match="Image 0"):
        criterion()(**{**data, "class_labels": [torch.tensor([0]), data["class_labels"][1]]})


@pytest.mark.parametrize("resolution", ["target", "prediction"])
def test_padding_has_no_influence(resolution):
    """Invariant 3b: noise in the padded part of logits and targets changes nothing."""
    data = batch(counts=(2, 1), size=(8, 8))
    data["pixel_mask"] = torch.ones(2, 32, 32, dtype=torch.int64)
    data["pixel_mask"][1, 16:] = 0
    data["pixel_logits"] = torch.randn(2, 3, 8, 8)
    unit = criterion(resolution=resolution, pixel_weight=1.0)
    data["mask_labels"][1][:, 16:] = False
    noisy = dict(data)
    noisy["mask_logits"] = [tensor.clone() for tensor in data["mask_logits"]]
    noisy["pixel_logits"] = data["pixel_logits"].clone()
    for tensor in [*noisy["mask_logits"], noisy["pixel_logits"]]:
        tensor[1, :, 4:] = 10 * torch.randn(tensor[1, :, 4:].shape)
    noisy["mask_labels"] = [mask.clone() for mask in data["mask_labels"]]
    noisy["mask_labels"][1][:, 16:] = torch.rand(noisy["mask_labels"][1][:, 16:].shape) > 0.5
    before, after = unit(**data)[1], unit(**noisy)[1]
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)


def test_loss_at_prediction_resolution_equals_the_published_one_for_constant_masks():
    data = batch(counts=(1, 1), layers=1)
    data["mask_logits"] = [torch.full_like(data["mask_logits"][0], 0.7)]
    data["mask_labels"] = [torch.ones(1, 32, 32, dtype=torch.bool)] * 2
    fine = criterion(resolution="target")(**data)[1]
    coarse = criterion(resolution="prediction")(**data)[1]
    torch.testing.assert_close(fine["loss_mask"], coarse["loss_mask"])
    assert fine["loss_dice"].item() == pytest.approx(coarse["loss_dice"].item(), abs=0.01)


# --- helpers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 13), (11, 10), (33, 25), (11, 13), (66, 100)])  # odd, whole steps, one of them
def test_resize_masks_equals_torch_nearest_and_keeps_the_dtype(size):
    masks = torch.rand(1, 3, 33, 50, generator=torch.Generator().manual_seed(0)) > 0.5
    for dtype in (torch.bool, torch.uint8, torch.float32):
        resized = resize_masks(masks.to(dtype), size)
        assert resized.dtype == dtype
        expected = torch.nn.functional.interpolate(masks.float(), size=size, mode="nearest")
        assert torch.equal(resized.float(), expected)


def test_average_masks_gives_coverage():
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., :2, :1] = 1
    shares, weight = average_masks(masks, torch.ones(1, 4, 4), (2, 2))
    assert shares[0, 0].tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert weight[0].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_average_masks_counts_valid_pixels_only():
    """A cell on the border of the image: its target is the covered share of the image in it, its weight that part."""
    valid = torch.zeros(1, 4, 4)
    valid[:, :, :3] = 1
    shares, weight = average_masks(torch.ones(1, 1, 4, 4), valid, (2, 2))
    assert shares[0, 0].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert weight[0].tolist() == [[1.0, 0.5], [1.0, 0.5]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("size", [(6, 5), (7, 5), (6, 7)])  # cells of 4x4, and cells of several sizes
def test_average_masks_of_bytes_are_those_of_floats(dtype, size):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 3, 24, 20, generator=generator) > 0.4
    valid = torch.ones(2, 24, 20)
    valid[0, 17:], valid[0, :, 11:] = 0, 0  # padding ends within a cell
    masks[1, 0] = True  # 16 of 16 in each cell
    shares, weight = average_masks(masks.to(dtype), valid, size)
    expected, expected_weight = average_masks(masks.float(), valid, size)
    torch.testing.assert_close(shares, expected, rtol=0, atol=1e-6)
    assert torch.equal(weight, expected_weight)
    assert shares[1, 0].eq(1).all()


def test_paint_labels_puts_the_smaller_mask_on_top():
    big, small = torch.ones(3, 3), torch.zeros(3, 3)
    big[0], small[1, 1] = 0, 1
    painted = paint_labels(torch.stack([big, small])[None], [torch.tensor([2, 1])])[0]
    assert painted.tolist() == [[-1, -1, -1], [2, 1, 2], [2, 2, 2]]
    assert paint_labels(torch.zeros(1, 0, 2, 2), [torch.zeros(0, dtype=torch.int64)]).tolist() == [
        [[-1, -1], [-1, -1]]
    ]


# --- normaliser ------------------------------------------------------------------------------------------------------


def test_normalizer_counts_by_hand():
    labels = [torch.zeros(3), torch.zeros(0), torch.zeros(7)]  # 7 targets for 5 queries: 5 matched
    masks, classes, images = loss_normalizer(labels, num_queries=5, no_object_weight=0.1, divisor=2.0).tolist()
    assert masks == 10 / 2
    assert classes == pytest.approx((8 + 0.1 * (15 - 8)) / 2)
    assert images == 3 / 2


def test_normalizer_without_masks_clamps_before_dividing():
    masks, classes, _ = loss_normalizer([torch.zeros(0)], num_queries=4, no_object_weight=0.1, divisor=4.0).tolist()
    assert masks == 0.25
    assert classes == pytest.approx(0.1)
