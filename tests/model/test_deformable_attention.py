"""Deformable attention against equation 3 of Deformable DETR, summed term by term in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_maskformer.model import deformable_attention
from hf_maskformer.model.deformable_attention import (
    DeformableAttention,
    cell_centres,
    read_gathered,
    read_sampled,
)

SHAPES = [(3, 5), (2, 4), (1, 2)]  # of different sizes, none is square
CELLS = sum(height * width for height, width in SHAPES)
IMAGES, QUERIES, HEADS, POINTS, CHANNELS = 2, 5, 4, 3, 2  # channels of each head
DIM = HEADS * CHANNELS
FORMULATIONS = {"gathered": read_gathered, "sampled": read_sampled}
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}


def bilinear(cells: np.ndarray, x: float, y: float) -> np.ndarray:
    """Value (D,) of a (h, w, D) map at x, y in 0..1: every cell weighs by its distance; there are none outside."""
    height, width, channels = cells.shape
    total = np.zeros(channels)
    for row in range(height):
        for column in range(width):
            vertical = max(0.0, 1 - abs(y * height - 0.5 - row))
            total += vertical * max(0.0, 1 - abs(x * width - 0.5 - column)) * cells[row, column]
    return total


def direct_read(values: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The sums over levels and points: (B, S, heads, D), (B, Q, heads, L, P, 2), (B, Q, heads, L, P)."""
    values, places, weights = (part.detach().double().numpy() for part in (values, places, weights))
    images, queries, heads, levels, points = weights.shape
    starts = np.cumsum([0, *(height * width for height, width in SHAPES)])
    read = np.zeros((images, queries, heads, values.shape[-1]))
    for image, query, head, level, point in np.ndindex(images, queries, heads, levels, points):
        cells = values[image, starts[level] : starts[level + 1], head].reshape(*SHAPES[level], -1)
        x, y = places[image, query, head, level, point]
        read[image, query, head] += weights[image, query, head, level, point] * bilinear(cells, x, y)
    return torch.from_numpy(read.reshape(images, queries, -1))


def direct_module(
    module: DeformableAttention, queries: Tensor, references: Tensor, memory: Tensor, padding: Tensor | None
) -> Tensor:
    """The whole layer, one number after the other: (B, Q, C) in float64."""
    numbers = {name: value.detach().double().numpy() for name, value in module.named_parameters()}

    def linear(name: str, row: np.ndarray) -> np.ndarray:
        return numbers[f"{name}.weight"] @ row + numbers[f"{name}.bias"]

    images, count = queries.shape[:2]
    references = references.double().expand(images, -1, -1).numpy()
    values = np.zeros((images, CELLS, HEADS, CHANNELS))
    for image, cell in np.ndindex(images, CELLS):
        if padding is None or not padding[image, cell]:
            values[image, cell] = linear("value", memory[image, cell].double().numpy()).reshape(HEADS, CHANNELS)
    places = np.zeros((images, count, HEADS, len(SHAPES), POINTS, 2))
    weights = np.zeros(places.shape[:-1])
    for image, query in np.ndindex(images, count):
        state, reference = queries[image, query].double().numpy(), references[image, query]
        for head, scores in enumerate(linear("attention_weights", state).reshape(HEADS, -1)):
            shares = [math.exp(score) for score in scores]
            weights[image, query, head] = np.array(shares).reshape(len(SHAPES), POINTS) / sum(shares)
        offsets = linear("sampling_offsets", state).reshape(places.shape[2:])
        for head, level, point, axis in np.ndindex(offsets.shape):
            unit = 1 / SHAPES[level][1 - axis]  # a cell: axis 0 is x, along the width
            if len(reference) == 4:
                unit = reference[2 + axis] / 2 / POINTS
            place = reference[axis] + offsets[head, level, point, axis] * unit
            places[image, query, head, level, point, axis] = place
    read = direct_read(*(torch.from_numpy(part) for part in (values, places, weights)))
    return torch.from_numpy(np.apply_along_axis(lambda row: linear("output", row), -1, read.numpy()))


def inputs(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Values, places and weights; places lie inside and outside, on cells' centres and borders, and far away."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(IMAGES, CELLS, HEADS, CHANNELS, generator=generator) * 2 - 1
    places = torch.rand(IMAGES, QUERIES, HEADS, len(SHAPES), POINTS, 2, generator=generator) * 1.8 - 0.4
    for level, (height, width) in enumerate(SHAPES):
        size = torch.tensor([width, height])
        cells = (torch.rand(IMAGES, HEADS, POINTS, 2, generator=generator) * size).floor()
        places[:, 0, :, level] = (cells + 0.5) / size  # centres
        places[:, 1, :, level] = cells / size  # corners of cells, the canvas's among them
        places[:, 2, :, level, 0] = places.new_tensor([1.0, 0.0])  # corners of the canvas
        places[:, 2, :, level, 1] = places.new_tensor([-0.5 / width, 1 + 0.5 / height])  # nothing left to read
    places[:, 3, :, 0, 0] = places.new_tensor([-3.0, 1e4])
    weights = torch.rand(IMAGES, QUERIES, HEADS, len(SHAPES), POINTS, generator=generator)
    weights = weights / weights.sum((-1, -2), keepdim=True)
    return values.to(dtype), places.to(dtype), weights.to(dtype)


def attention(dtype: torch.dtype = torch.float64) -> DeformableAttention:
    torch.manual_seed(0)
    module = DeformableAttention(DIM, heads=HEADS, levels=len(SHAPES), points=POINTS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.7, 0.7)
    return module.to(dtype)


def layer_inputs(dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, references of a kind, memory and padding; the points of the outer queries leave the canvas."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(IMAGES, QUERIES, DIM, generator=generator)
    references = torch.rand(IMAGES if kind == "boxes" else 1, QUERIES, 2, generator=generator)
    references[0, :2] = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    if kind == "boxes":
        sizes = torch.rand(IMAGES, QUERIES, 2, generator=generator) * 0.9 + 0.1
        references = torch.cat([references, sizes], -1)
    memory = torch.randn(IMAGES, CELLS, DIM, generator=generator)
    padding = torch.zeros(IMAGES, CELLS, dtype=torch.bool)
    for start, (height, width) in zip((0, 15, 23), SHAPES, strict=True):
        padding[1, start : start + height * width].view(height, width)[:, width // 2 :] = True
    return *(part.to(dtype) for part in (queries, references, memory)), padding


# --- the two readings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", FORMULATIONS)
def test_reading_is_the_sum_of_the_formula(name, dtype):
    values, places, weights = inputs(dtype)
    read = FORMULATIONS[name](values, SHAPES, places, weights)
    assert read.dtype == dtype
    torch.testing.assert_close(read.double(), direct_read(*inputs(dtype)), atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gradient_of_the_table_is_that_of_torch(dtype, monkeypatch):
    values, places, weights = inputs(dtype)
    found = []
    for available in (True, False):
        monkeypatch.setattr(deformable_attention, "is_scipy_available", lambda available=available: available)
        leaves = [part.clone().requires_grad_() for part in (values, places, weights)]
        read = deformable_attention.read_gathered(leaves[0], SHAPES, *leaves[1:])
        assert ("_TableGradient" in str(read.grad_fn.next_functions[0][0].next_functions[0][0])) == available
        found.append(torch.autograd.grad((read * torch.arange(read.shape[-1])).sum(), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=100 * TOLERANCES[dtype], rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 3, IMAGES * QUERIES])
def test_queries_read_a_few_at_a_time(monkeypatch, at_once):
    monkeypatch.setattr(deformable_attention, "QUERIES_AT_ONCE", at_once)
    values, places, weights = inputs(torch.float64)
    with torch.no_grad():
        read = deformable_attention.read_gathered(values, SHAPES, places, weights)
    torch.testing.assert_close(read, direct_read(values, places, weights), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_reading_by_hand(name):
    # Of a 2 x 2 map: its middle, the centre of its first cell, the middle of its upper border, its first corner,
    # a quarter of a cell right of a centre, and half a cell outside.
    places = [(0.5, 0.5), (0.25, 0.25), (0.5, 0.0), (0.0, 0.0), (0.375, 0.25), (-0.25, 0.25)]
    expected = [2.5, 1.0, 0.5 * 1.5, 0.25 * 1.0, 0.75 * 1 + 0.25 * 2, 0.0]
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0]).view(1, 5, 1, 1)  # then a level of one cell
    shapes = [(2, 2), (1, 1)]
    at_places = torch.tensor(places)[None, :, None, None, None].repeat(1, 1, 1, 2, 1, 1)
    at_places[..., 1, :, :] = 0.5  # the second level is read at its only cell
    for shares in ((1.0, 0.0), (0.25, 0.75)):
        weights = torch.tensor(shares).view(1, 1, 1, 2, 1).expand(1, 6, 1, 2, 1)
        read = FORMULATIONS[name](values, shapes, at_places, weights)
        wanted = [shares[0] * value + shares[1] * 8 for value in expected]
        torch.testing.assert_close(read, torch.tensor(wanted).view(1, 6, 1), atol=1e-6, rtol=0)


def off_grid_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs at whose places the reading is smooth: between 0.2 and 0.8 of the way from centre to centre."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(IMAGES, CELLS, 2, 2, generator=generator, dtype=torch.float64)
    between = torch.rand(IMAGES, 3, 2, len(SHAPES), 2, 2, generator=generator, dtype=torch.float64) * 0.6 + 0.2
    size = torch.tensor([[width, height] for height, width in SHAPES])[:, None]  # (L, 1, 2)
    # From a cell left of the canvas, which shares the border with it, to the last one in it.
    left = torch.rand(between.shape, generator=generator).mul(size + 1).floor() - 1
    places = (left + between + 0.5) / size
    places[0, 0, 0, 0, 0] = -2.0  # a place at which there is nothing
    weights = torch.rand(IMAGES, 3, 2, len(SHAPES), 2, generator=generator, dtype=torch.float64)
    return values, places, weights


@pytest.mark.parametrize("name", FORMULATIONS)
def test_gradients_of_values_places_and_weights(name):
    parts = tuple(part.requires_grad_() for part in off_grid_inputs())
    assert torch.autograd.gradcheck(lambda *parts: FORMULATIONS[name](parts[0], SHAPES, *parts[1:]), parts)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_half_precision_values_are_summed_in_the_dtype_of_the_places(name):
    values, places, weights = inputs(torch.float32)
    values = values.to(torch.bfloat16)
    read = FORMULATIONS[name](values, SHAPES, places, weights)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read.double(), direct_read(values, places, weights), atol=1e-6, rtol=0)


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=FORMULATIONS)
def formulation(request, monkeypatch) -> str:
    """Makes the layer read in one of the two ways."""
    sampled = request.param == "sampled"
    monkeypatch.setattr(deformable_attention, "_prefers_sampling", lambda values: sampled)
    other = "read_gathered" if sampled else "read_sampled"
    monkeypatch.setattr(deformable_attention, other, None)
    return request.param


@pytest.mark.usefixtures("formulation")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["centres", "boxes"])
def test_the_layer_is_the_formula(kind, padded, dtype):
    module = attention(dtype)
    queries, references, memory, padding = layer_inputs(dtype, kind)
    padding = padding if padded else None
    with torch.no_grad():
        output = module(queries, references, memory, SHAPES, padding)
    assert output.dtype == dtype
    expected = direct_module(module, queries, references, memory, padding)
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.usefixtures("formulation")
@pytest.mark.parametrize("kind", ["centres", "boxes"])
def test_gradients_of_the_layer(kind):
    module = attention()
    queries, references, memory, padding = layer_inputs(torch.float64, kind)
    references = references * 0.7 + 0.11
    offsets = module.sampling_offsets(queries).view(IMAGES, QUERIES, HEADS, len(SHAPES), POINTS, 2)
    sizes = torch.tensor([[width, height] for height, width in SHAPES])[:, None]
    centres = references[:, :, None, None, None]
    step = 1 / sizes if kind == "centres" else centres[..., 2:] / 2 / POINTS
    place = (centres[..., :2] + offsets * step) * sizes - 0.5
    assert (place - place.round()).abs().min() > 2e-5  # away from the kinks at cells' centres; the step is 1e-6
    parameters = [parameter.requires_grad_() for parameter in (queries, references, memory)]
    # Along random directions: the readings themselves are checked number by number.
    assert torch.autograd.gradcheck(lambda *parts: module(*parts, SHAPES, padding), parameters, fast_mode=True)


@pytest.mark.usefixtures("formulation")
def test_a_padded_image_is_read_as_the_unpadded_one():
    """On a canvas of twice the size, noise beside it; offsets are in cells."""
    module = attention()
    queries, references, memory, _ = layer_inputs(torch.float64, "centres")
    alone = module(queries, references, memory, SHAPES)
    larger, masks = [], []
    for level, (height, width) in zip(memory.split([15, 8, 2], 1), SHAPES, strict=True):
        canvas = 100 * torch.randn(IMAGES, 2 * height, 2 * width, DIM, dtype=torch.float64)
        padding = torch.ones(IMAGES, 2 * height, 2 * width, dtype=torch.bool)
        canvas[:, :height, :width] = level.unflatten(1, (height, width))
        padding[:, :height, :width] = False
        larger.append(canvas.flatten(1, 2))
        masks.append(padding.flatten(1))
    shapes = [(2 * height, 2 * width) for height, width in SHAPES]
    canvas, padding = torch.cat(larger, 1), torch.cat(masks, 1)
    padded = module(queries, references / 2, canvas, shapes, padding)
    torch.testing.assert_close(padded, alone, atol=1e-12, rtol=0)
    assert (module(queries, references / 2, canvas, shapes) - alone).abs().max() > 1  # the mask is what protects


def test_places_of_a_half_precision_layer_are_in_float32():
    module = attention(torch.bfloat16)
    queries, references, memory, padding = layer_inputs(torch.float32, "centres")
    halves = [part.to(torch.bfloat16) for part in (queries, references, memory)]
    references = references + 1 / 512  # which bfloat16 cannot say
    with torch.no_grad():
        output = module(halves[0], references, halves[2], SHAPES, padding)
        offsets = module.sampling_offsets(halves[0]).double()
    assert output.dtype == torch.bfloat16
    expected = direct_module(module, halves[0], references, halves[2], padding)
    assert offsets.abs().max() > 1
    torch.testing.assert_close(output.double(), expected, atol=0.03, rtol=0)


def test_other_devices_and_exported_graphs_sample(monkeypatch):
    module = attention(torch.float32).eval()
    queries, references, memory, padding = layer_inputs(torch.float32, "centres")

    class Exported(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, queries, references, memory, padding):
            return self.attention(queries, references, memory, SHAPES, padding)

    arguments = (queries, references, memory, padding)
    program = torch.export.export(Exported(), arguments)
    operators = {str(node.target) for node in program.graph.nodes}
    assert any("grid_sampler" in name for name in operators)
    assert not any("embedding_bag" in name for name in operators)
    torch.testing.assert_close(program.module()(*arguments), Exported()(*arguments), atol=1e-6, rtol=0)
    monkeypatch.setattr(deformable_attention, "read_gathered", None)
    on_meta = (part.to("meta") for part in arguments)
    assert Exported().to("meta")(*on_meta).shape == queries.shape


def test_published_start_and_centres_of_cells():
    offsets = DeformableAttention(8, heads=8, levels=2, points=3).initial_offsets().view(8, 2, 3, 2)
    directions = torch.tensor([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
    expected = directions[:, None, None] * torch.tensor([1, 2, 3])[:, None]
    torch.testing.assert_close(offsets, expected.float().expand(8, 2, 3, 2), atol=1e-5, rtol=0)
    centres = cell_centres([(2, 1), (1, 2)], device=torch.device("cpu"))
    assert centres.tolist() == [[[0.5, 0.25], [0.5, 0.75], [0.25, 0.5], [0.75, 0.5]]]
