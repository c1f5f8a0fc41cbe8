"""Boxes: formats, boxes of masks, overlap and refinement, by hand."""

import math

import pytest
import torch

from hf_maskformer.model.boxes import (
    box_distance,
    boxes_of_corners,
    boxes_of_masks,
    corners_of_boxes,
    generalized_iou,
    refine_boxes,
)


def of_corners(*values: float) -> torch.Tensor:
    return boxes_of_corners(torch.tensor(values, dtype=torch.float64))


def test_corners_and_centres_are_two_ways_to_say_the_same():
    box = torch.tensor([0.5, 0.25, 0.5, 0.25])
    assert corners_of_boxes(box).tolist() == pytest.approx([0.25, 0.125, 0.75, 0.375])
    assert boxes_of_corners(corners_of_boxes(box)).tolist() == pytest.approx(box.tolist())


def test_a_box_encloses_the_pixels_of_its_mask():
    masks = torch.zeros(4, 4, 8)
    masks[0, 1:3, 2:6] = 1
    masks[1, 3, 7] = 1
    masks[2] = 1
    boxes = boxes_of_masks(masks)
    assert boxes.tolist() == [
        [0.5, 0.5, 0.5, 0.5],
        [7.5 / 8, 3.5 / 4, 1 / 8, 1 / 4],
        [0.5, 0.5, 1.0, 1.0],
        [0.0, 0.0, 0.0, 0.0],  # an empty mask
    ]
    assert torch.equal(boxes, boxes_of_masks(masks.bool()))
    assert torch.equal(boxes, boxes_of_masks(masks.to(torch.uint8)))
    assert boxes_of_masks(torch.zeros(2, 0, 4, 8)).shape == (2, 0, 4)


def test_a_box_spans_the_parts_of_a_mask_that_lie_apart():
    mask = torch.zeros(1, 8, 8)
    mask[0, 0, 1] = mask[0, 6, 3] = 1
    assert corners_of_boxes(boxes_of_masks(mask))[0].tolist() == [1 / 8, 0.0, 4 / 8, 7 / 8]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 0.5), 1.0),
        ((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0), -0.5),  # apart: the box around both is half empty
        ((0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0), 1 / 3),  # a quarter of the canvas of three quarters, no gap
        ((0.0, 0.0, 1.0, 1.0), (0.25, 0.25, 0.75, 0.75), 0.25),  # one inside the other
        ((0.0, 0.0, 0.25, 0.25), (0.25, 0.0, 0.75, 0.75), 0.0 - (9 / 16 - 7 / 16) / (9 / 16)),
    ],
)
def test_generalized_iou_by_hand(first, second, expected):
    a, b = of_corners(*first), of_corners(*second)
    assert generalized_iou(a, b).item() == pytest.approx(expected, abs=1e-12)
    assert generalized_iou(b, a).item() == pytest.approx(expected, abs=1e-12)


def test_generalized_iou_does_not_depend_on_the_scale_of_an_axis():
    generator = torch.Generator().manual_seed(0)
    a, b = (0.1 + 0.4 * torch.rand(20, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor([3.0, 0.5, 3.0, 0.5])
    assert torch.allclose(generalized_iou(a, b), generalized_iou(a * scale, b * scale), atol=1e-12)


def test_boxes_without_area_have_finite_overlap_and_gradient():
    point = torch.tensor([[0.5, 0.5, 0.0, 0.0]], requires_grad=True)
    overlap = generalized_iou(point, point.detach())
    overlap.sum().backward()
    assert overlap.item() == 0
    assert point.grad.isfinite().all()


def test_every_pair_by_broadcasting():
    a, b = torch.rand(3, 1, 4), torch.rand(1, 2, 4)
    assert generalized_iou(a, b).shape == (3, 2)
    assert box_distance(a, b)[2, 1].item() == pytest.approx((a[2, 0] - b[0, 1]).abs().sum().item())


def test_a_centre_gets_its_size_from_the_changes_alone():
    centre = torch.tensor([[0.25, 0.75]])
    still = refine_boxes(centre, torch.tensor([[0.0, 0.0, -2.0, -2.0]]))[0]
    size = 1 / (1 + math.exp(2.0))
    assert still.tolist() == pytest.approx([0.25, 0.75, size, size], abs=1e-6)


def test_a_box_moves_from_where_it_is():
    box = torch.tensor([[0.25, 0.75, 0.5, 0.125]])
    assert torch.allclose(refine_boxes(box, torch.zeros(1, 4)), box)
    moved = refine_boxes(box, torch.tensor([[math.log(3.0), 0.0, 0.0, 0.0]]))
    assert moved[0].tolist() == pytest.approx([0.5, 0.75, 0.5, 0.125], abs=1e-6)  # odds 1 : 3 become 3 : 3


def test_references_at_the_very_border_stay_finite():
    border = refine_boxes(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.zeros(1, 4))
    assert border[0].tolist() == pytest.approx([1e-5, 1 - 1e-5, 1e-5, 1 - 1e-5], abs=1e-7)
