"""Losses and matching of things by place and stuff by class: exact values, the filter, and sums that can be split."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_maskformer.model.attention_masks import LocationPrediction
from hf_maskformer.model.boxes import boxes_of_masks
from hf_maskformer.model.criterion import loss_normalizer
from hf_maskformer.model.initialization import initialize
from hf_maskformer.model.location_criterion import LocationCriterion, pairwise_squared_dice, squared_dice
from hf_maskformer.model.query_decoder_location import LocationQueryDecoder
from hf_maskformer.model.query_decoder_standard import LayerPrediction

LABELS, THINGS, SIDE = 4, [1, 3], 32  # classes 0 and 2 are stuff


def criterion(**overrides) -> LocationCriterion:
    settings = {
        "num_labels": LABELS,
        "thing_label_ids": THINGS,
        "class_weight": 2.0,
        "box_weight": 5.0,
        "giou_weight": 2.0,
        "dice_weight": 2.0,
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
        "class_cost": 2.0,
        "box_cost": 5.0,
        "giou_cost": 2.0,
        "dice_cost": 2.0,
    }
    return LocationCriterion(**{**settings, **overrides})


def predicted(classes, boxes, masks, stuff_classes, stuff_masks, **parts) -> list[LayerPrediction]:
    """Predictions of one image and one layer, of plain tensors; masks (T, h, w) as the mask decoder says."""
    height, width = masks.shape[-2:]
    location = LocationPrediction(
        thing_class_logits=classes[None, None],
        boxes=boxes[None, None],
        stuff_class_logits=stuff_classes[None, None],
        stuff_masks=stuff_masks[None, None],
        thing_masks=lambda queries: masks[queries][None],
        mask_valid=None,
        mask_size=(2 * height, 2 * width),
        nothing=torch.zeros(()),
    )._replace(**parts)
    nothing = torch.zeros(1)
    return [LayerPrediction(nothing, nothing, nothing, None, location=location)]


def squares(*corners: tuple[int, int, int, int]) -> torch.Tensor:
    masks = torch.zeros(len(corners), SIDE, SIDE)
    for mask, (left, top, right, bottom) in zip(masks, corners, strict=True):
        mask[top:bottom, left:right] = 1
    return masks


def at_an_eighth(masks: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(masks[None], 8)[0]


def loss_of(predictions, masks, labels, count=1.0, pixel_mask=None, **overrides):
    return criterion(**overrides)(
        predictions,
        mask_labels=[masks],
        class_labels=[torch.tensor(labels, dtype=torch.int64)],
        pixel_mask=pixel_mask,
        normalizer=torch.tensor([count, 1.0, 1.0]),
    )


# --- terms by hand ---------------------------------------------------------------------------------------------------


def test_squared_dice_by_hand():
    values, masks = torch.tensor([[0.5, 2.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert squared_dice(values, masks, torch.ones(1, 3)).item() == pytest.approx(1 - 5 / 6.25, abs=1e-6)
    # the second pixel is padding: 1 - 2 * 0.5 / (0.25 + 1)
    weight = torch.tensor([[1.0, 0.0, 1.0]])
    assert squared_dice(values, masks, weight).item() == pytest.approx(0.2, abs=1e-5)
    assert squared_dice(masks, masks, torch.ones(1, 3)).item() == pytest.approx(0, abs=1e-5)


def test_pairwise_dice_equals_the_loss_of_each_pair():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, 3, 10, generator=generator, dtype=torch.float64)
    masks, weight = torch.rand(2, 4, 10, generator=generator, dtype=torch.float64), torch.rand(2, 10).double()
    costs = pairwise_squared_dice(values, masks, weight)
    direct = squared_dice(values[:, :, None], masks[:, None], weight[:, None, None])
    assert torch.allclose(costs, direct, atol=2e-3)  # the cost has an epsilon of 1e-3, the loss of 1e-6
    numerator, v, m, w = 1 - costs[1, 2, 3], values[1, 2], masks[1, 3], weight[1]
    expected = 2 * (v * m * w).sum() / ((v * v * w).sum() + (m * m * w).sum() + 2e-3)
    assert numerator.item() == pytest.approx(expected.item(), abs=1e-12)


def test_all_terms_by_hand():
    target = squares((0, 0, 16, 16))  # box 0.25, 0.25, 0.5, 0.5
    boxes = torch.tensor([[0.75, 0.75, 0.5, 0.5], [0.35, 0.25, 0.5, 0.5]])
    masks = torch.zeros(2, 4, 4)
    stuff_target = squares((0, 16, 32, 32))
    predictions = predicted(
        torch.zeros(2, 2), boxes, masks, torch.zeros(2), torch.stack([torch.zeros(4, 4), torch.full((4, 4), 0.5)])
    )
    loss, terms, layers = loss_of(predictions, torch.cat([target, stuff_target]), [1, 2], count=2.0)
    # p = 0.5: a positive costs 0.25 * 0.25 ln 2, a negative 0.75 * 0.25 ln 2
    positive, negative = 0.0625 * math.log(2), 0.1875 * math.log(2)
    assert terms["loss_class"].item() == pytest.approx((positive + 3 * negative) / 2, abs=1e-6)
    assert terms["loss_stuff_class"].item() == pytest.approx((positive + negative) / 2, abs=1e-6)
    assert terms["loss_box"].item() == pytest.approx(0.1 / 2, abs=1e-6)  # the second query is the nearer one
    overlap, union = 0.4 * 0.5, 0.6 * 0.5
    assert terms["loss_giou"].item() == pytest.approx((1 - overlap / union) / 2, abs=1e-5)
    assert terms["loss_dice"].item() == pytest.approx(1 / 2, abs=1e-5)
    # stuff: 64 cells of 0.5, the lower 32 of them wanted: 1 - 2 * 16 / (16 + 32)
    assert terms["loss_stuff_dice"].item() == pytest.approx((1 - 2 / 3) / 2, abs=1e-5)
    weights = {"class": 2, "box": 5, "giou": 2, "dice": 2, "stuff_class": 4, "stuff_dice": 2}
    assert loss.item() == pytest.approx(sum(w * terms[f"loss_{name}"].item() for name, w in weights.items()), abs=1e-5)
    assert {name: part.shape for name, part in layers.items()} == dict.fromkeys(terms, (1,))


def test_the_sum_is_the_papers_weighing_of_things_and_stuff():
    # n_t = 2, n_s = 1: n_t / 3 * (sum_t / n_t) + n_s / 3 * (sum_s / n_s)
    masks = squares((0, 0, 16, 16), (16, 0, 32, 16), (0, 16, 32, 32))
    generator = torch.Generator().manual_seed(0)
    predictions = predicted(
        torch.randn(3, 2, generator=generator),
        0.2 + 0.3 * torch.rand(3, 4, generator=generator),
        torch.rand(3, 4, 4, generator=generator),
        torch.randn(2, generator=generator),
        torch.rand(2, 4, 4, generator=generator),
    )
    _, sums, _ = loss_of(predictions, masks, [1, 3, 0], count=1.0)
    _, terms, _ = loss_of(predictions, masks, [1, 3, 0], count=3.0)
    for name, term in terms.items():
        positives = 1 if "stuff" in name else 2
        assert term.item() == pytest.approx(positives / 3 * (sums[name].item() / positives), abs=1e-6)


def test_perfect_predictions_have_almost_no_loss():
    masks = squares((0, 0, 16, 16), (16, 8, 32, 24), (0, 24, 32, 32))
    certain = torch.tensor([[-9.0, 9.0], [9.0, -9.0], [-9.0, -9.0]])
    coarse = at_an_eighth(masks)
    stuff = torch.stack([torch.zeros(4, 4), coarse[2]])
    boxes = torch.cat([boxes_of_masks(masks[[1, 0]]), torch.tensor([[0.1, 0.1, 0.1, 0.1]])])
    predictions = predicted(certain, boxes, coarse[[1, 0, 0]], torch.tensor([-9.0, 9.0]), stuff)
    _, terms, _ = loss_of(predictions, masks, [1, 3, 2])
    assert terms.pop("loss_dice").item() < 0.15  # upsampled edges are not sharp
    assert terms.pop("loss_stuff_dice").item() < 0.1
    for name, term in terms.items():
        assert term.item() == pytest.approx(0, abs=1e-4), name


def test_several_segments_of_one_stuff_are_one_mask():
    left, right, whole = squares((0, 0, 8, 32), (16, 0, 32, 32), (0, 0, 32, 32))
    values = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(2, 2), torch.full((2, 4), 0.5), torch.zeros(2, 4, 4), torch.tensor([1.0, -1.0])
    apart = loss_of(predicted(*none, values), torch.stack([left, right, left]), [0, 0, 0])[1]
    joined = loss_of(predicted(*none, values), (left + right)[None], [0])[1]
    other = loss_of(predicted(*none, values), whole[None], [0])[1]
    for name, term in joined.items():
        assert term.item() == pytest.approx(apart[name].item(), abs=1e-6)
    assert other["loss_stuff_dice"] != joined["loss_stuff_dice"]


def test_what_is_predicted_in_padding_does_not_count():
    pixel_mask = torch.ones(1, SIDE, SIDE)
    pixel_mask[:, :, 16:] = 0
    masks = squares((0, 0, 8, 16), (0, 16, 16, 32))
    valid = torch.tensor([True, True, False, False]).expand(1, 4, 4)
    rest = torch.zeros(2, 2), torch.full((2, 4), 0.5)
    values, stuff = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    terms = []
    for noise in (0.0, 3.0):
        noisy, noisy_stuff = (torch.where(valid, part, noise) for part in (values, stuff))
        predictions = predicted(*rest, noisy, torch.zeros(2), noisy_stuff, mask_valid=valid)
        terms.append(loss_of(predictions, masks, [1, 0], pixel_mask=pixel_mask)[1])
    for name, term in terms[0].items():
        assert term.item() == pytest.approx(terms[1][name].item(), abs=1e-6)


# --- matching --------------------------------------------------------------------------------------------------------


def test_three_queries_of_each_target_go_on():
    costs = np.array([[0.0, 9.0], [1.0, 8.0], [2.0, 7.0], [9.0, 0.0], [9.0, 1.0], [9.0, 2.0], [5.0, 5.0], [6.0, 6.0]])
    things = np.array([0, 1])
    first = np.array([0, 3]), things
    assert criterion()._choose(costs, things, first).tolist() == [0, 1, 2, 3, 4, 5]
    assert criterion(most_per_target=2)._choose(costs, things, first).tolist() == [0, 1, 3, 4]
    assert criterion(most_per_target=1)._choose(costs, things, first).tolist() == [0, 3]
    # five queries are enough for two rounds
    assert criterion()._choose(costs[:5], things, first).tolist() == [0, 1, 3, 4]
    nothing = np.array([], dtype=np.int64)
    assert criterion()._choose(costs, nothing, (nothing, nothing)).tolist() == []
    with pytest.raises(ValueError, match="most_per_target is 0"):
        criterion(most_per_target=0)


def test_the_mask_decides_between_queries_of_equal_class_and_box():
    mask = squares((0, 0, 16, 32))
    coarse = at_an_eighth(mask)[0]
    boxes = boxes_of_masks(mask).repeat(2, 1)
    stuff = torch.zeros(2), torch.zeros(2, 4, 4)
    for good in (0, 1):
        masks = torch.stack([coarse, 1 - coarse] if good == 0 else [1 - coarse, coarse])
        _, terms, _ = loss_of(predicted(torch.zeros(2, 2), boxes, masks, *stuff), mask, [1])
        assert terms["loss_dice"].item() < 0.1
    # with one query for a target there is nothing left to decide
    _, terms, _ = loss_of(predicted(torch.zeros(2, 2), boxes, masks, *stuff), mask, [1], most_per_target=1)
    assert terms["loss_dice"].item() > 0.9


def test_an_image_with_fewer_things_is_matched_among_its_own_queries_only():
    # Image 0 sends two queries to the mask decoder, image 1 only query 1: what fills its row must not be matched.
    first, second = squares((0, 0, 16, 16), (16, 16, 32, 32))
    near = torch.tensor([0.3, 0.25, 0.5, 0.5])
    boxes = torch.stack([boxes_of_masks(torch.stack([first, second])), torch.stack([near, boxes_of_masks(first)])])
    masks = torch.stack([at_an_eighth(first[None])[0], torch.zeros(4, 4)])  # query 0 has the mask of the target
    (prediction,) = predicted(torch.zeros(2, 2), near.expand(2, 4), masks, torch.zeros(2), torch.zeros(2, 4, 4))
    location = prediction.location._replace(
        boxes=boxes[None],
        thing_class_logits=torch.zeros(1, 2, 2, 2),
        stuff_class_logits=torch.zeros(1, 2, 2),
        stuff_masks=torch.zeros(1, 2, 2, 4, 4),
    )
    _, terms, _ = criterion(most_per_target=1, dice_cost=20.0)(
        [prediction._replace(location=location)],
        mask_labels=[torch.stack([first, second]), first[None]],
        class_labels=[torch.tensor([1, 1]), torch.tensor([1])],
        pixel_mask=None,
        normalizer=torch.ones(3),
    )
    assert terms["loss_dice"].item() > 2  # image 0: a good and an empty mask; image 1: the empty one


def test_things_are_matched_by_class_and_box_in_each_layer():
    mask = squares((0, 0, 16, 16))
    right, wrong = boxes_of_masks(mask)[0], torch.tensor([0.8, 0.8, 0.2, 0.2])
    nothing = torch.zeros(2, 4, 4), torch.zeros(2), torch.zeros(2, 4, 4)
    (prediction,) = predicted(torch.zeros(2, 2), right.expand(2, 4), *nothing)
    boxes = torch.stack([torch.stack([right, wrong]), torch.stack([wrong, right])])[:, None]  # two layers
    location = prediction.location._replace(boxes=boxes, thing_class_logits=torch.zeros(2, 1, 2, 2))
    _, _, layers = loss_of([prediction._replace(location=location)], mask, [3])
    assert layers["loss_box"].tolist() == [0.0, 0.0]
    assert layers["loss_class"].shape == (2,)
    predictions = predicted(torch.tensor([[5.0, -5.0], [-5.0, 5.0]]), right.expand(2, 4), *nothing)
    agree, differ = (loss_of(predictions, mask, [label])[1]["loss_class"].item() for label in (1, 3))
    assert agree == pytest.approx(differ, abs=1e-6)  # either class has its query
    assert agree < loss_of(predictions, torch.cat([mask, mask]), [1, 1])[1]["loss_class"].item()


# --- with a decoder --------------------------------------------------------------------------------------------------


def decoder(**overrides) -> LocationQueryDecoder:
    torch.manual_seed(0)
    settings = {"num_thing_queries": 6, "num_labels": LABELS, "thing_label_ids": THINGS, "points": 2, "dim": 16}
    settings |= {"layers": 2, "heads": 4, "ffn_dim": 24, "activation": "relu"}
    settings |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    settings |= {"thing_mask_layers": 1, "stuff_mask_layers": 2}
    built = LocationQueryDecoder([16] * 4, **{**settings, **overrides})
    built.apply(initialize)
    built.reset_published()
    return built.train()


def batch(counts=(3, 0, 2, 1), dtype=torch.float64, labels=LABELS, classes=None, seed=0):
    """Memory, padding and targets of images with these numbers of rectangles."""
    generator = torch.Generator().manual_seed(seed)
    images = len(counts)
    memory = [torch.randn(images, 16, SIDE // s, SIDE // s, generator=generator).to(dtype) for s in (4, 8, 16, 32)]
    pixel_mask = torch.ones(images, SIDE, SIDE, dtype=torch.int64)
    pixel_mask[::2, :, 24:] = 0
    targets = []
    for count, valid in zip(counts, pixel_mask, strict=True):
        masks = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
        for mask in masks:
            left, top, width, height = torch.randint(2, 14, (4,), generator=generator).tolist()
            mask[top : top + height, left : left + width] = True
        targets.append(masks & (valid > 0))
    allowed = torch.tensor(classes if classes is not None else list(range(labels)))
    chosen = [allowed[torch.randint(len(allowed), (count,), generator=generator)] for count in counts]
    return memory, pixel_mask, targets, chosen


def compute(model, loss, data, normalizer, **options):
    memory, pixel_mask, masks, labels = data
    options = {"all_layers": True, "full_masks": False, **options}
    predictions = model(memory, None, pixel_mask == 0, **options)
    return loss(predictions, mask_labels=masks, class_labels=labels, pixel_mask=pixel_mask, normalizer=normalizer)


def part(data, rows: slice):
    memory, pixel_mask, masks, labels = data
    return [level[rows] for level in memory], pixel_mask[rows], masks[rows], labels[rows]


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_can_be_split(parts):
    data, model, loss = batch((3, 0, 2, 1, 5, 0, 0, 4)), decoder().double(), criterion()

    def counts(divisor):
        return loss_normalizer(data[3], num_queries=8, no_object_weight=0.1, divisor=divisor, reduce=False)

    whole, _, _ = compute(model, loss, data, counts(1))
    expected = torch.autograd.grad(whole, list(model.parameters()))
    size = 8 // parts
    losses = [
        compute(model, loss, part(data, slice(i * size, (i + 1) * size)), counts(parts))[0] / parts
        for i in range(parts)
    ]
    assert torch.stack(losses).sum().item() == pytest.approx(whole.item(), abs=1e-9)
    gradients = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))
    for one, other in zip(expected, gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-9, rtol=1e-9)
    wrong = torch.stack(losses[:-1]).sum() + 2 * losses[-1]
    assert abs(wrong.item() - whole.item()) > 1e-3


CASES = {
    "all": ((3, 0, 2, 1), None),
    "none": ((0, 0), None),
    "only stuff": ((2, 1), [0, 2]),
    "only things": ((2, 3), [1, 3]),
    "more than queries": ((9, 1), [1]),
}


@pytest.mark.parametrize("all_layers", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_a_gradient(case, all_layers):
    counts, classes = CASES[case]
    model = decoder()
    data = batch(counts, torch.float32, classes=classes)
    loss, terms, _ = compute(model, criterion(), data, torch.ones(3), all_layers=all_layers)
    assert loss.isfinite()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    has_things = sum(counts) > 0 and case != "only stuff"
    assert bool(terms["loss_box"] > 0) == bool(terms["loss_dice"] > 0) == has_things
    assert bool(terms["loss_stuff_dice"] > 0) == (case in ("all", "only stuff"))
    if has_things:
        unused = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
        assert not [name for name in unused if name.startswith("thing_masks.tail")]


@pytest.mark.parametrize(("things", "labels"), [([], [0, 1]), ([0, 1, 2, 3], [2, 3])])
def test_models_without_things_or_without_stuff(things, labels):
    model = decoder(thing_label_ids=things)
    data = batch((2, 1), torch.float32, classes=labels)
    loss, terms, _ = compute(model, criterion(thing_label_ids=things), data, torch.ones(3))
    loss.backward()
    assert loss.isfinite()
    assert bool(terms["loss_box"] > 0) == bool(things)
    assert bool(terms["loss_stuff_dice"] > 0) != bool(things)


def test_the_loss_is_the_same_however_the_masks_are_handed_over():
    model, data = decoder().double(), batch()
    lean, full = (compute(model, criterion(), data, torch.ones(3), full_masks=full)[0] for full in (False, True))
    evaluated = compute(model.eval(), criterion(), data, torch.ones(3))[0]
    assert lean.item() == pytest.approx(full.item(), abs=1e-9)
    assert lean.item() == pytest.approx(evaluated.item(), abs=1e-9)


@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
def test_half_precision_trains(way):
    model, data = decoder(), batch(dtype=torch.float32)
    exact = compute(decoder(), criterion(), data, torch.ones(3))[0].item()
    if way == "bfloat16":
        model, data = model.to(torch.bfloat16), ([level.to(torch.bfloat16) for level in data[0]], *data[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        loss, _, _ = compute(model, criterion(), data, torch.ones(3))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.05)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_bad_targets_and_predictions_are_named():
    model, data = decoder(), batch(dtype=torch.float32)
    memory, pixel_mask, masks, labels = data
    wrong = [*labels[:2], torch.full_like(labels[2], 4), labels[3]]
    with pytest.raises(ValueError, match=r"class_labels\[2\] contains 4, allowed are 0..3"):
        compute(model, criterion(), (memory, pixel_mask, masks, wrong), torch.ones(3))
    void = [mask.to(torch.uint8) * (255 if image == 3 else 1) for image, mask in enumerate(masks)]
    with pytest.raises(ValueError, match=r"mask_labels\[3\] has values outside 0..1"):
        compute(model, criterion(), (memory, pixel_mask, void, labels), torch.ones(3))
    broken = [level.clone() for level in memory]
    broken[1][1] = float("nan")
    with pytest.raises(FloatingPointError, match="image 1 of the batch"):
        compute(model, criterion(), (broken, pixel_mask, masks, labels), torch.ones(3))
    with pytest.raises(ValueError, match="query_decoder 'location'"):
        loss_of([LayerPrediction(*[torch.zeros(1)] * 3, None)], masks[0], [1])


def test_a_drawn_image_is_learned():
    masks = squares((2, 2, 14, 12), (18, 14, 30, 28), (0, 0, 32, 32)).bool()
    masks[2] &= ~(masks[0] | masks[1])
    torch.manual_seed(0)
    colours = torch.randn(3, 16)
    image = (masks.float()[:, None] * colours[:, :, None, None]).sum(0)[None]  # (1, 16, 32, 32)
    memory = [F.avg_pool2d(image, s) + 0.1 * torch.randn(1, 16, SIDE // s, SIDE // s) for s in (2, 4, 8, 16)]
    model, loss = decoder(), criterion()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    labels, history = torch.tensor([1, 3, 0]), []
    for _ in range(60):
        predictions = model(memory, None, None, all_layers=True, full_masks=False)
        value, terms, _ = loss(
            predictions, mask_labels=[masks], class_labels=[labels], pixel_mask=None, normalizer=torch.full((3,), 3.0)
        )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(value.item())
    assert history[-1] < 0.25 * history[0], (history[0], history[-1], terms)
    with torch.no_grad():
        (prediction,) = model.eval()(memory, None, None, all_layers=False)
    scores = prediction.class_logits[0, :, :-1].sigmoid()
    for label, mask in zip(labels.tolist(), masks, strict=True):
        found = prediction.mask_logits[0, scores[:, label].argmax()] > 0
        assert (found & mask).sum() / (found | mask).sum() > 0.7
