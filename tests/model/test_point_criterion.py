"""The loss on points against a slow one of plain sums, and everything that it must not depend on."""

from functools import partial
from itertools import permutations
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_maskformer.model import point_criterion
from hf_maskformer.model.losses import PairSums
from hf_maskformer.model.mask_head import DotProductMaskHead, LocatedDotProductMaskHead
from hf_maskformer.model.point_criterion import PointCriterion
from hf_maskformer.model.point_sampling import PointSource

LABELS, QUERIES, LAYERS, DIM, MASK_DIM, STRIDE = 3, 4, 2, 6, 5, 4
POINTS = 8
COUNTS = {"matching": POINTS, "candidates": 3 * POINTS, "uncertain": 6, "random": 2}
WEIGHTS = {"loss_class": 2.0, "loss_mask": 5.0, "loss_dice": 4.0}
NO_OBJECT, CLASS_COST, MASK_COST, DICE_COST = 0.1, 2.0, 5.0, 3.0


class Layer(NamedTuple):
    class_logits: Tensor
    states: Tensor


class Batch(NamedTuple):
    classes: Tensor  # (L, B, Q, K + 1)
    states: Tensor  # (L, B, Q, C)
    features: Tensor  # (B, E, h, w)
    masks: list[Tensor]
    labels: list[Tensor]
    pixel_mask: Tensor | None


def criterion(**overrides) -> PointCriterion:
    settings = {
        "num_labels": LABELS,
        "matcher": "hungarian",
        "class_weight": WEIGHTS["loss_class"],
        "mask_weight": WEIGHTS["loss_mask"],
        "dice_weight": WEIGHTS["loss_dice"],
        "pixel_weight": 0.0,
        "no_object_weight": NO_OBJECT,
        "class_cost": CLASS_COST,
        "mask_cost": MASK_COST,
        "dice_cost": DICE_COST,
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
        "points": POINTS,
        "oversample_ratio": 3.0,
        "importance_ratio": 0.75,
    }
    return PointCriterion(**{**settings, **overrides}).train()


def mask_head(kind: type[DotProductMaskHead] = DotProductMaskHead) -> DotProductMaskHead:
    torch.manual_seed(1)
    return kind(DIM, mask_dim=MASK_DIM, layers=2).double()


def batch(counts=(3, 1), *, size=(4, 6), layers=LAYERS, seed=0) -> Batch:
    """Predictions in float64 and rectangles as targets, of images with these numbers of targets."""
    generator = torch.Generator().manual_seed(seed)
    images, (height, width) = len(counts), size
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    masks = []
    for count in counts:
        corners = torch.rand(count, 4, generator=generator)
        drawn = torch.zeros(count, height * STRIDE, width * STRIDE, dtype=torch.bool)
        for mask, (top, left, tall, wide) in zip(drawn, corners.tolist(), strict=True):
            top, left = int(top * height * STRIDE / 2), int(left * width * STRIDE / 2)
            mask[top : top + 3 + int(tall * 9), left : left + 3 + int(wide * 12)] = True
        masks.append(drawn)
    return Batch(
        normal(layers, images, QUERIES, LABELS + 1),
        normal(layers, images, QUERIES, DIM),
        2 * normal(images, MASK_DIM, height, width),
        masks,
        [torch.randint(LABELS, (count,), generator=generator) for count in counts],
        None,
    )


def part(data: Batch, rows: slice) -> Batch:
    mask = None if data.pixel_mask is None else data.pixel_mask[rows]
    levels = data.classes[:, rows], data.states[:, rows], data.features[rows]
    return Batch(*levels, data.masks[rows], data.labels[rows], mask)


def normalizer(masks: float = 3.0, classes: float = 2.5) -> Tensor:
    return torch.tensor([masks, classes, 1.0], dtype=torch.float64)


class Result(NamedTuple):
    loss: float
    terms: dict[str, float]
    layers: dict[str, list[float]]
    gradients: dict[str, Tensor]


def compute(data: Batch, *, seeds=None, loss=None, head=None, own_normalizer=None) -> Result:
    """Loss and gradients of everything that it depends on."""
    loss, head = loss or criterion(), head or mask_head()
    leaves = {name: getattr(data, name).clone().requires_grad_() for name in ("classes", "states", "features")}
    total, terms, layers = loss(
        [Layer(classes, states) for classes, states in zip(leaves["classes"], leaves["states"], strict=True)],
        mask_features=leaves["features"],
        mask_head=head,
        mask_labels=data.masks,
        class_labels=data.labels,
        pixel_mask=data.pixel_mask,
        pixel_logits=None,
        normalizer=normalizer() if own_normalizer is None else own_normalizer,
        point_seeds=seeds,
    )
    leaves |= dict(head.named_parameters())
    found = torch.autograd.grad(total, list(leaves.values()))
    terms = {name: term.item() for name, term in terms.items()}
    by_layer = {name: values.tolist() for name, values in layers.items()}
    return Result(total.item(), terms, by_layer, dict(zip(leaves, found, strict=True)))


def assert_same(one: Result, other: Result, tolerance: float) -> None:
    assert one.loss == pytest.approx(other.loss, abs=tolerance)
    assert one.terms == pytest.approx(other.terms, abs=tolerance)
    for name, values in one.layers.items():
        assert values == pytest.approx(other.layers[name], abs=tolerance)
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[name], atol=tolerance, rtol=0)


def recorded_matches(monkeypatch) -> list:
    """What later calls of the criterion match, a list that fills."""
    found = []
    assign = PointCriterion._assign

    def kept(self, *arguments, **options):
        matches, padded = assign(self, *arguments, **options)
        found.append([[tuple(part.tolist() for part in match) for match in layer] for layer in matches])
        return matches, padded

    monkeypatch.setattr(PointCriterion, "_assign", kept)
    return found


# --- the whole loss --------------------------------------------------------------------------------------------------


def given_points(monkeypatch, images: int) -> dict[tuple[int, int], Tensor]:
    """The criterion's points become rows of tables by image and number, one row for each mask in turn."""
    generator = torch.Generator().manual_seed(6)  # points that tell all targets apart, so that no costs are equal
    tables = {
        (image, COUNTS[name]): torch.rand(40, COUNTS[name], 2, generator=generator)
        for image in range(images)
        for name in ("matching", "candidates", "random")
    }
    given = dict.fromkeys(tables, 0)

    def draw(self, image: int, masks: int, count: int) -> Tensor:
        if count == COUNTS["candidates"] + COUNTS["random"]:  # drawn together
            parts = [draw(self, image, masks, COUNTS[name]) for name in ("candidates", "random")]
            return torch.cat(parts, 1)
        first = given[image, count]
        given[image, count] += masks
        return tables[image, count][first : first + masks].clone()

    monkeypatch.setattr(PointSource, "draw", draw)
    return tables


def read(cells: Tensor, point: Tensor) -> Tensor:
    """Value of (h, w) cells at a point x, y: each weighs by its distance from it; there are none outside."""
    height, width = cells.shape
    x, y = point.double().tolist()
    rows = (1 - (y * height - 0.5 - torch.arange(height).double()).abs()).clamp(min=0)
    columns = (1 - (x * width - 0.5 - torch.arange(width).double()).abs()).clamp(min=0)
    return (cells * rows[:, None] * columns).sum()


def read_all(cells: Tensor, points: Tensor) -> Tensor:
    return torch.stack([read(cells, point) for point in points])


def pair_losses(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    p = logits.sigmoid()
    bce = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()
    return bce, 1 - (2 * (p * wanted).sum() + 1) / (p.sum() + wanted.sum() + 1)


def cheapest(costs: Tensor) -> list[tuple[int, int]]:
    """The best of all assignments of (Q, N) costs, by query."""
    queries, targets = costs.shape
    if queries >= targets:
        choices = [list(zip(chosen, range(targets), strict=True)) for chosen in permutations(range(queries), targets)]
    else:
        choices = [list(zip(range(queries), chosen, strict=True)) for chosen in permutations(range(targets), queries)]
    return sorted(min(choices, key=lambda pairs: sum(costs[pair].item() for pair in pairs)))


def slow_loss(data: Batch, head: nn.Module, tables: dict, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Every mask in full, every point on its own."""
    terms = {name: [] for name in WEIGHTS}
    for classes, states in zip(data.classes, data.states, strict=True):
        masks = head(states, data.features)  # (B, Q, h, w)
        if data.pixel_mask is not None:
            masks = masks * data.pixel_mask[:, None, ::STRIDE, ::STRIDE]
        parts = {name: torch.zeros((), dtype=torch.float64) for name in WEIGHTS}
        for image, (targets, labels) in enumerate(zip(data.masks, data.labels, strict=True)):
            points = tables[image, COUNTS["matching"]][0]
            wanted = [read_all(target.double(), points) for target in targets]
            probabilities = classes[image].softmax(-1)
            costs = torch.zeros(QUERIES, len(targets), dtype=torch.float64)
            for query in range(QUERIES):
                logits = read_all(masks[image, query], points).detach()
                for target, label in enumerate(labels.tolist()):
                    bce, dice = pair_losses(logits, wanted[target])
                    chance = probabilities[query, label].detach()
                    costs[query, target] = MASK_COST * bce + DICE_COST * dice - CLASS_COST * chance
            pairs = cheapest(costs) if len(targets) else []
            assigned = dict(pairs)
            for query in range(QUERIES):
                label = int(labels[assigned[query]]) if query in assigned else LABELS
                weight = 1.0 if query in assigned else NO_OBJECT
                parts["loss_class"] = parts["loss_class"] - weight * probabilities[query, label].log()
            for query, target in pairs:
                candidates, further = (tables[image, COUNTS[name]][0] for name in ("candidates", "random"))
                certainty = read_all(masks[image, query].detach(), candidates).abs().tolist()
                uncertain = sorted(range(len(certainty)), key=certainty.__getitem__)[: COUNTS["uncertain"]]
                chosen = torch.cat([candidates[uncertain], further])
                logits = read_all(masks[image, query], chosen)
                bce, dice = pair_losses(logits, read_all(targets[target].double(), chosen))
                parts["loss_mask"] = parts["loss_mask"] + bce
                parts["loss_dice"] = parts["loss_dice"] + dice
        for name, value in parts.items():
            terms[name].append(value / counts[1 if name == "loss_class" else 0])
    by_layer = {name: torch.stack(values) for name, values in terms.items()}
    return torch.stack([WEIGHTS[name] * values.sum() for name, values in by_layer.items()]).sum(), by_layer


@pytest.mark.parametrize("kind", [DotProductMaskHead, LocatedDotProductMaskHead])
@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (5, 2)], ids=str)  # 5 targets are more than the queries
@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_the_slow_one(padded, counts, kind, monkeypatch):
    head, data = mask_head(kind), batch(counts)
    if padded:  # points lie in the padding too, where masks count as zero
        pixel_mask = torch.ones(2, 16, 24, dtype=torch.int64)
        pixel_mask[0, 12:], pixel_mask[1, :, 8:] = 0, 0
        masks = [masks * (valid > 0) for masks, valid in zip(data.masks, pixel_mask, strict=True)]
        data = data._replace(pixel_mask=pixel_mask, masks=masks)
    tables = given_points(monkeypatch, 2)
    actual = compute(data, head=head)
    leaves = {name: getattr(data, name).clone().requires_grad_() for name in ("classes", "states", "features")}
    expected, by_layer = slow_loss(data._replace(**leaves), head, tables, normalizer())
    leaves |= dict(head.named_parameters())
    gradients = torch.autograd.grad(expected, list(leaves.values()))
    terms = {name: values.sum().item() for name, values in by_layer.items()}
    layers = {name: values.tolist() for name, values in by_layer.items()}
    assert_same(actual, Result(expected.item(), terms, layers, dict(zip(leaves, gradients, strict=True))), 1e-9)
    assert actual.loss == pytest.approx(sum(WEIGHTS[name] * term for name, term in actual.terms.items()), abs=1e-12)


# --- what it does not depend on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 17 * LAYERS * QUERIES, 2**20])
def test_how_many_logits_are_matched_at_once_changes_nothing(at_once, monkeypatch):
    data, loss, matches, chunks = batch((3, 0, 2)), criterion(points=100), recorded_matches(monkeypatch), []
    expected = compute(data, seeds=[4, 5, 6], loss=loss)
    add = PairSums.add

    def counted(self, pixels: Tensor, targets: Tensor) -> None:
        chunks.append(pixels.shape[1])
        add(self, pixels, targets)

    monkeypatch.setattr(PairSums, "add", counted)
    monkeypatch.setitem(point_criterion.MATCHED_AT_ONCE, "cpu", at_once)
    assert_same(compute(data, seeds=[4, 5, 6], loss=loss), expected, 1e-12)
    assert matches[0] == matches[1]
    assert sum(chunks) == 300
    assert max(chunks) == {1: 1, 2**20: 100}.get(at_once, 17)


@pytest.mark.parametrize("at_once", [1, 3 * 3 * POINTS, 2**18])
def test_how_many_candidates_are_looked_at_at_once_changes_nothing(at_once, monkeypatch):
    data, taken = batch((3, 0, 2)), []
    expected = compute(data, seeds=[4, 5, 6])
    choose = point_criterion.most_uncertain

    def counted(logits: Tensor, *arguments) -> Tensor:
        taken.append(len(logits))
        return choose(logits, *arguments)

    monkeypatch.setattr(point_criterion, "most_uncertain", counted)
    monkeypatch.setitem(point_criterion.CANDIDATES_AT_ONCE, "cpu", at_once)
    assert_same(compute(data, seeds=[4, 5, 6]), expected, 1e-12)
    assert sum(taken) == LAYERS * 5
    assert max(taken) == {1: 1, 2**18: LAYERS * 3}.get(at_once, 3)  # masks of one image


@pytest.mark.parametrize("layers", [1, 3])
def test_gradient_checkpointing_changes_nothing(layers):
    data, loss, computed = batch((3, 0, 2), layers=layers), criterion(), []
    expected = compute(data, seeds=[4, 5, 6], loss=loss)

    def counted(function, *arguments):
        def twice(*arguments):
            computed.append(function)
            return function(*arguments)

        return checkpoint(twice, *arguments, use_reentrant=False)

    loss.gradient_checkpointing, loss._gradient_checkpointing_func = True, counted
    assert_same(compute(data, seeds=[4, 5, 6], loss=loss), expected, 1e-9)
    assert len(computed) == 2 * layers


def test_a_batch_is_the_sum_of_its_images():
    data, seeds = batch((3, 0, 2, 1)), [4, 5, 6, 7]
    whole = compute(data, seeds=seeds)
    alone = [compute(part(data, slice(i, i + 1)), seeds=seeds[i : i + 1]) for i in range(4)]
    assert sum(one.loss for one in alone) == pytest.approx(whole.loss, abs=1e-9)
    for name, gradient in whole.gradients.items():
        parts = [one.gradients[name] for one in alone]
        if name in ("classes", "states", "features"):
            total = torch.cat(parts, 0 if name == "features" else 1)
        else:
            total = torch.stack(parts).sum(0)
        torch.testing.assert_close(total, gradient, atol=1e-9, rtol=0)
    other = compute(data, seeds=[4, 5, 6, 8])
    assert abs(other.terms["loss_mask"] - whole.terms["loss_mask"]) > 1e-6  # the points do matter


def on_larger_canvas(data: Batch) -> Batch:
    """The images in the upper left quarter of a canvas, noise in the features beside them."""
    images, channels, height, width = data.features.shape
    features = 50 * torch.randn(images, channels, 2 * height, 2 * width, dtype=torch.float64)
    features[:, :, :height, :width] = data.features
    pixel_mask = torch.zeros(images, 2 * height * STRIDE, 2 * width * STRIDE, dtype=torch.int64)
    pixel_mask[:, : height * STRIDE, : width * STRIDE] = 1
    masks = [F.pad(masks, (0, width * STRIDE, 0, height * STRIDE)) for masks in data.masks]
    return data._replace(features=features, pixel_mask=pixel_mask, masks=masks)


@pytest.mark.parametrize("again", [False, True])
def test_a_padded_image_has_the_loss_of_the_unpadded_one(again):
    data, loss = batch((3, 2)), criterion(points=50)
    # As an image beside a larger one is given: on its own canvas, and a whole one in the batch.
    loss.gradient_checkpointing = again
    loss._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    small, large = (compute(part, seeds=[4, 5], loss=loss) for part in (data, on_larger_canvas(data)))
    height, width = data.features.shape[2:]
    gradient = large.gradients["features"]
    assert not gradient[:, :, height:].any()
    assert not gradient[:, :, :, width:].any()
    within = {**large.gradients, "features": gradient[:, :, :height, :width]}
    assert_same(large._replace(gradients=within), small, 1e-9)
    blind = compute(on_larger_canvas(data)._replace(pixel_mask=None), seeds=[4, 5], loss=loss)
    assert abs(blind.loss - small.loss) > 1e-2  # the mask is what protects


# --- few and many targets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("counts", [(0,), (0, 0), (0, 2), (9, 0)], ids=str)
def test_everything_gets_a_gradient_with_any_number_of_targets(counts, again):
    data, loss = batch(counts), criterion()
    loss.gradient_checkpointing = again
    loss._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    result = compute(data, seeds=list(range(len(counts))), loss=loss)  # raises where something takes no part
    assert np.isfinite(result.loss)
    for name, gradient in result.gradients.items():
        assert gradient.isfinite().all(), name
        assert bool(gradient.any()) == (name == "classes" or sum(counts) > 0), name
    if not sum(counts):
        assert result.terms["loss_mask"] == result.terms["loss_dice"] == 0
        nothing = -NO_OBJECT * data.classes.log_softmax(-1)[..., -1].sum().item() / 2.5
        assert result.terms["loss_class"] == pytest.approx(nothing, abs=1e-9)


def test_more_targets_than_queries_match_every_query_once(monkeypatch):
    matches = recorded_matches(monkeypatch)
    compute(batch((9, 2)), seeds=[0, 1])
    for many, few in matches[0]:
        assert sorted(many[0]) == list(range(QUERIES))
        assert len(set(many[1])) == QUERIES
        assert sorted(few[1]) == [0, 1]


def test_points_are_the_same_in_every_evaluation():
    data, loss, head = batch((2, 1)), criterion(), mask_head()  # making the head seeds the global generator
    training = {compute(data, loss=loss.train(), head=head).loss for _ in range(2)}
    evaluation = {compute(data, loss=loss.eval(), head=head).loss for _ in range(2)}
    assert (len(training), len(evaluation)) == (2, 1)


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
def test_seeds_of_another_number_of_images_are_refused(seeds):
    with pytest.raises(ValueError, match="2 images need as many point_seeds"):
        compute(batch((1, 1)), seeds=seeds)
