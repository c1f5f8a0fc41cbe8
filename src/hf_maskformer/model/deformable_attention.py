"""Multi-scale deformable attention in plain torch (Zhu et al., ICLR 2021, sec. 4.1, equation 3).

A query looks at a few points of every feature map, at learned distances from its reference point, and sums what it
reads bilinearly there with learned weights. Two formulations give the same numbers:

- gathered: the sum over points and over the four cells around each is one weighted bag of rows of the value table,
  `F.embedding_bag`. Nothing of the size queries x points x channels is ever stored.
- sampled: `F.grid_sample` level by level, which graph exporters and accelerators know.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.import_utils import is_scipy_available

if is_scipy_available():
    from scipy.sparse import csc_matrix

Shapes = Sequence[tuple[int, int]]  # height and width of each level
QUERIES_AT_ONCE = 512  # 8 heads with 12 points each: tensors of 200 KB


class DeformableAttention(nn.Module):
    """Every query reads `levels` x `points` places with each of its `heads`."""

    def __init__(self, dim: int, *, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Shapes,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries (B, Q, C) to memory (B, S, C), the levels' cells one after the other, row by row.

        Args:
            references: (B or 1, Q, 2) centres x, y, or (B or 1, Q, 4) boxes x, y, width, height; 0..1 of the padded
                canvas. Offsets are in cells around a centre; of a box, in fractions of half its size (the paper's
                appendix A.4).
            shapes: Height and width of each level.
            padding: (B, S), True where a cell is padding: it counts as zero, as what lies outside of the canvas.

        Returns:
            (B, Q, C).
        """
        values = self.value(memory)  # (B, S, C)
        if padding is not None:
            values = values.masked_fill(padding[..., None], 0.0)
        values = values.unflatten(-1, (self.heads, -1))  # (B, S, heads, C / heads)
        grouped = (self.heads, self.levels, self.points)
        weights = self.attention_weights(queries).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, grouped[1:])  # (B, Q, heads, L, P)
        # Places are finer than half precision can say: a cell of 1/128 of the canvas is a few of its steps wide.
        offsets = self.sampling_offsets(queries)  # (B, Q, heads * L * P * 2)
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        references = references.to(offsets.dtype)
        centres = references[..., :2].repeat(1, 1, self.heads * self.levels * self.points)  # read fast, as written out
        if references.shape[-1] == 2:
            cells = offsets.new_tensor([[1 / width, 1 / height] for height, width in shapes])[:, None]  # (L, 1, 2)
            units = cells.expand(*grouped, 2).flatten()
        else:
            units = references[..., 2:].repeat(1, 1, self.heads * self.levels * self.points) * (0.5 / self.points)
        places = torch.addcmul(centres, offsets, units).unflatten(-1, (*grouped, 2))  # (B, Q, heads, L, P, 2)
        read = read_sampled if _prefers_sampling(values) else read_gathered
        return self.output(read(values, shapes, places, weights.to(offsets.dtype)).to(values.dtype))

    def initial_offsets(self) -> Tensor:
        """The published start: head h looks in the direction 2 pi h / heads, its point p at p + 1 cells; flat."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2.0 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)  # (heads, 2)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * steps[:, None]  # (heads, 1, P, 2)
        return offsets.expand(-1, self.levels, -1, -1).flatten()


def _prefers_sampling(values: Tensor) -> bool:
    return values.device.type != "cpu" or torch.compiler.is_exporting()


def read_gathered(values: Tensor, shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of the values at places, as bags of table rows.

    Args:
        values: (B, S, heads, D).
        places: (B, Q, heads, L, P, 2) x and y, 0..1 over each level; outside is zero.
        weights: (B, Q, heads, L, P), in the dtype of the places.

    Returns:
        (B, Q, heads * D) in the dtype of the places.
    """
    images, _, heads, channels = values.shape
    queries = places.shape[1]
    bordered = _bordered(values, shapes)  # (B, S', heads, D)
    table = bordered.reshape(-1, channels).to(places.dtype)  # (B*S'*heads, D)
    rows = images * queries
    at_once = min(QUERIES_AT_ONCE, rows) if _may_split() else rows
    grid = _Grid.of(shapes, weights, at_once, index_type=torch.int32 if len(table) < 2**31 else torch.int64)
    image = torch.arange(images, device=values.device, dtype=grid.head.dtype).mul_(bordered.shape[1])
    image = image.repeat_interleave(queries)[:, None, None, None]  # (B*Q, 1, 1, 1), the image's first cell
    parts = (whole.split(at_once) for whole in (image, places.flatten(0, 1), weights.flatten(0, 1)))
    summed = [_bag_sums(table, first, there, shares, grid) for first, there, shares in zip(*parts, strict=True)]
    return torch.cat(summed).view(images, queries, heads * channels)


def _may_split() -> bool:
    """Without gradients, queries are taken a few at a time, so that all their numbers stay in the cache."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Grid(NamedTuple):
    """The bordered levels, for N queries at a time: everything is written out, as broadcasting would read it slowly.

    All are (N, heads, L, P); sizes and first cells in the dtype of the places, heads as integers.
    """

    width: Tensor
    height: Tensor
    start: Tensor  # first cell of the level in the table
    head: Tensor

    @classmethod
    def of(cls, shapes: Shapes, weights: Tensor, rows: int, *, index_type: torch.dtype) -> "_Grid":
        """`weights` (B, Q, heads, L, P)."""
        sizes = (rows, *weights.shape[2:])
        starts = [0]
        for height, width in shapes:
            starts.append(starts[-1] + (height + 2) * (width + 2))
        levels = weights.new_tensor([(*shape, start) for shape, start in zip(shapes, starts[:-1], strict=True)])
        heights, widths, firsts = (column[:, None].expand(sizes).contiguous() for column in levels.unbind(1))
        head = torch.arange(sizes[1], device=weights.device, dtype=index_type)[:, None, None]
        return cls(widths, heights, firsts, head.expand(sizes).contiguous())

    def first(self, rows: int) -> "_Grid":
        return self if rows == len(self.head) else _Grid(*(part[:rows] for part in self))


def _bag_sums(table: Tensor, image: Tensor, places: Tensor, weights: Tensor, grid: _Grid) -> Tensor:
    """Of n queries what each head reads: (n * heads, D).

    `table` (rows, D) has a row for each image, cell and head, the head running fastest; `image` (n, 1, 1, 1),
    `places` (n, heads, L, P, 2), `weights` (n, heads, L, P).
    """
    grid = grid.first(len(places))
    width, height = grid.width, grid.height
    # In cells of the bordered level, whose first cell's centre is 0: what lies further out reads the border, zero.
    x = (places[..., 0] * width + 0.5).clamp(min=0).minimum(width + 1)  # (n, heads, L, P)
    y = (places[..., 1] * height + 0.5).clamp(min=0).minimum(height + 1)
    left, top = x.detach().floor().minimum(width), y.detach().floor().minimum(height)
    right_part, lower_part = x - left, y - top
    stride = width + 2
    heads = grid.head.shape[1]
    cell = (top * stride + left + grid.start).to(grid.head.dtype) + image  # exact in float32 below 2**24 cells
    first = cell * heads + grid.head
    below = first + (stride * heads).to(first.dtype)
    lower = weights * lower_part
    upper = weights - lower
    lower_right, upper_right = lower * right_part, upper * right_part
    bags = torch.stack([first, first + heads, below, below + heads], -1)  # (n, heads, L, P, 4)
    shares = torch.stack([upper - upper_right, upper_right, lower - lower_right, lower_right], -1)
    return _weighted_rows(table, bags.flatten(2).flatten(0, 1), shares.flatten(2).flatten(0, 1))


def _weighted_rows(table: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """Sums (N, D) of the rows of a table (R, D) that each bag (N, K) names, by their weights (N, K)."""
    by_scipy = not torch.compiler.is_compiling() and is_scipy_available() and table.device.type == "cpu"
    if not (by_scipy and table.requires_grad):
        return F.embedding_bag(bags, table, per_sample_weights=weights, mode="sum")
    summed = F.embedding_bag(bags, table.detach(), per_sample_weights=weights, mode="sum")
    return _TableGradient.apply(summed, table, bags, weights)


class _TableGradient(torch.autograd.Function):
    """The gradient of the table of `_weighted_rows` as a sparse matrix product, 9 times as fast as torch's on a CPU.

    Torch sorts all rows and adds them one by one; the bags as columns of a sparse matrix need neither.
    """

    @staticmethod
    def forward(ctx: Any, summed: Tensor, table: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(bags, weights)
        ctx.rows = len(table)
        return summed.view_as(summed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        bags, weights = ctx.saved_tensors
        rows = bags.numpy().ravel()
        ends = np.arange(0, len(rows) + 1, bags.shape[1], dtype=rows.dtype)
        matrix = csc_matrix((weights.detach().numpy().ravel(), rows, ends), shape=(ctx.rows, len(bags)))
        return gradients[0], torch.from_numpy(matrix @ gradients[0].contiguous().numpy()), None, None


def _bordered(values: Tensor, shapes: Shapes) -> Tensor:
    """The levels (B, S, heads, D) with a border of one zero cell each, so that no reader has to ask where it ends."""
    levels = values.flatten(2).split([height * width for height, width in shapes], dim=1)
    padded = [
        F.pad(level.unflatten(1, shape), (0, 0, 1, 1, 1, 1)).flatten(1, 2)
        for level, shape in zip(levels, shapes, strict=True)
    ]
    return torch.cat(padded, 1).unflatten(2, values.shape[2:])


def read_sampled(values: Tensor, shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    """As `read_gathered`, by bilinear sampling of each level."""
    images, _, heads, channels = values.shape
    queries = places.shape[1]
    grids = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # (B*heads, Q, L, P, 2)
    weights = weights.transpose(1, 2).flatten(0, 1)  # (B*heads, Q, L, P)
    maps = values.to(places.dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B*heads, D, S)
    total = None
    for level, cells in enumerate(maps.split([height * width for height, width in shapes], dim=-1)):
        sampled = F.grid_sample(cells.unflatten(-1, shapes[level]), grids[:, :, level], align_corners=False)
        read = (sampled * weights[:, None, :, level]).sum(-1)  # (B*heads, D, Q)
        total = read if total is None else total + read
    assert total is not None
    return total.view(images, heads * channels, queries).transpose(1, 2)


def cell_centres(shapes: Shapes, *, device: torch.device) -> Tensor:
    """Centres x, y of all cells of all levels, 0..1 of the canvas: (1, S, 2) float32."""
    levels = []
    for height, width in shapes:
        rows = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        columns = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        levels.append(torch.stack([x.flatten(), y.flatten()], -1))  # (h*w, 2)
    return torch.cat(levels)[None]
