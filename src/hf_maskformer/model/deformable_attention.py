"""Multi-scale deformable attention in plain torch (Zhu et al., ICLR 2021, sec. 4.1, equation 3).

A query looks at a few points of every feature map, at learned distances from its reference point, and sums what it
reads bilinearly there with learned weights. Two formulations give the same numbers:

- gathered: the sum over points and over the four cells around each is one weighted bag of rows of the value table,
  `F.embedding_bag`. Nothing of the size queries x points x channels is ever stored.
- sampled: `F.grid_sample` level by level, which graph exporters and accelerators know.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Sequence[tuple[int, int]]  # height and width of each level


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
        offsets = self.sampling_offsets(queries).unflatten(-1, (*grouped, 2))
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))  # (B, Q, heads, L, P, 2)
        references = references.to(offsets.dtype)[:, :, None, None, None]
        if references.shape[-1] == 2:
            extents = offsets.new_tensor([[width, height] for height, width in shapes])[:, None]  # (L, 1, 2)
            places = references + offsets / extents
        else:
            places = references[..., :2] + offsets / self.points * references[..., 2:] * 0.5
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
    table = _bordered(values, shapes)  # (B, S', heads, D)
    heights, widths, starts = _level_tensors(shapes, places)  # (L, 1) each
    # In cells of the bordered level, whose first cell's centre is 0: what lies further out reads the border, zero.
    x = (places[..., 0] * widths + 0.5).clamp(min=0).minimum(widths + 1)  # (B, Q, heads, L, P)
    y = (places[..., 1] * heights + 0.5).clamp(min=0).minimum(heights + 1)
    left, top = x.detach().floor().minimum(widths), y.detach().floor().minimum(heights)
    right_part, lower_part = x - left, y - top
    strides = widths + 2
    head = torch.arange(heads, device=values.device)[:, None, None]
    image = torch.arange(images, device=values.device)[:, None, None, None, None] * table.shape[1]
    # Rows of the table are (image, cell, head) with the head running fastest.
    first = ((top * strides + left + starts).long() + image) * heads + head  # exact in float32 below 2**24 cells
    below = first + strides.long() * heads
    lower, upper = weights * lower_part, weights * (1 - lower_part)
    rows = [first, first + heads, below, below + heads]
    shares = [upper * (1 - right_part), upper * right_part, lower * (1 - right_part), lower * right_part]
    bags = torch.stack(rows, -1).view(images * queries * heads, -1)  # (B*Q*heads, L*P*4)
    bag_weights = torch.stack(shares, -1).view_as(bags)
    flat = table.reshape(-1, channels).to(bag_weights.dtype)  # (B*S'*heads, D)
    summed = F.embedding_bag(bags, flat, per_sample_weights=bag_weights, mode="sum")
    return summed.view(images, queries, heads * channels)


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


def _level_tensors(shapes: Shapes, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Height, width and first cell (of the bordered table) of each level, (L, 1) each, in the dtype of `like`."""
    starts = [0]
    for height, width in shapes:
        starts.append(starts[-1] + (height + 2) * (width + 2))
    table = like.new_tensor([(*shape, start) for shape, start in zip(shapes, starts[:-1], strict=True)])  # (L, 3)
    return table[:, None, 0], table[:, None, 1], table[:, None, 2]


def cell_centres(shapes: Shapes, *, device: torch.device) -> Tensor:
    """Centres x, y of all cells of all levels, 0..1 of the canvas: (1, S, 2) float32."""
    levels = []
    for height, width in shapes:
        rows = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        columns = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        levels.append(torch.stack([x.flatten(), y.flatten()], -1))  # (h*w, 2)
    return torch.cat(levels)[None]
