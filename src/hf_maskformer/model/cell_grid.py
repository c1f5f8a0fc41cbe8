"""Upsampling cell by cell: which cells of a coarse map need interpolation at all, and interpolation of only these.

A cell lies between four neighbouring centres of the coarse map, its corners. Every pixel in it is interpolated
bilinearly, so its value is a mean of the four corner values, with the same weights for every map: it lies between the
lowest and the highest corner, and a map that is at least as high as another at all corners is so at every pixel.
Most cells are decided by that; the others are interpolated together, as patches of equal size, in chunks.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .resampling import Samples, sample_positions

# Working memory of one chunk. On CPU it should stay in the core's own cache; a GPU needs few large steps.
CPU_CHUNK_BYTES = 2**21
GPU_CHUNK_BYTES = 2**26
# Below so many pixels for a cell, patches are as much work as resizing everything.
MIN_PIXELS_PER_CELL = 2.0

# For patches (P, R, n) of n cells and their candidates (n,): the value that is compared and the index that is noted.
Rating = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def chunk_bytes(device: torch.device) -> int:
    return CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES


class CellAxis:
    """The cells along one axis and the pixels that are read in each: at most P in one, P the size of patches.

    Attributes:
        cells: number of cells, which is that of the coarse rows or columns that hold image; the last has its own
            centre as both corners.
        counts: (cells,) int64 pixels of each.
        pixels: (P, cells) int64 their places in the target; a cell with fewer repeats its last.
        weights: (P, cells) weight of the upper corner at each.
        occupied: (P, cells) bool, False where a pixel is a repetition.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        lower, upper, weights = samples
        self.cells = int(upper[-1]) + 1
        self.counts = torch.bincount(lower, minlength=self.cells)
        place = torch.arange(int(self.counts.max()), device=lower.device)[:, None]
        self.occupied = place < self.counts
        first = self.counts.cumsum(0) - self.counts
        self.pixels = (first + torch.minimum(place, self.counts - 1)).clamp(min=0, max=len(lower) - 1)
        self.weights = weights[self.pixels]


class CellGrid:
    """The cells of (h, w) maps between whose corners the (H, W) pixels of a target lie.

    Cells are numbered row by row over the part of the maps that is image: `rows.cells` x `columns.cells`.
    """

    def __init__(
        self, shape: tuple[int, int], size: tuple[int, int], extent: tuple[float, float], like: Tensor
    ) -> None:
        self.size, self.extent = size, extent
        self.rows = CellAxis(sample_positions(shape[0], size[0], extent[0], like))
        self.columns = CellAxis(sample_positions(shape[1], size[1], extent[1], like))
        self.shape = (self.rows.cells, self.columns.cells)

    @property
    def is_coarse(self) -> bool:
        """Whether cells hold enough pixels for work by cells to pay."""
        cells, pixels = self.shape[0] * self.shape[1], self.size[0] * self.size[1]
        return min(self.size[0] / self.shape[0], self.size[1] / self.shape[1]) >= 1 and (
            pixels >= MIN_PIXELS_PER_CELL * cells
        )

    @property
    def patch_size(self) -> int:
        """Pixels of a patch, which is as large as the largest cell."""
        return self.rows.pixels.shape[0] * self.columns.pixels.shape[0]

    def crop(self, maps: Tensor) -> Tensor:
        """The cells of (h, w, ...) maps that hold image."""
        return maps[: self.shape[0], : self.shape[1]]

    def corner_extreme(self, maps: Tensor, extreme: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Of (cells high, cells wide, N) maps the extreme (torch.maximum or torch.minimum) corner of each cell."""
        tall = torch.cat([extreme(maps[:-1], maps[1:]), maps[-1:]])
        return torch.cat([extreme(tall[:, :-1], tall[:, 1:]), tall[:, -1:]], dim=1)

    def corners(self, cells: Tensor) -> Tensor:
        """(4, n) numbers of the corners of cells (n,): top left, top right, bottom left, bottom right."""
        row, column = cells // self.shape[1], cells % self.shape[1]
        below = (row + 1).clamp(max=self.shape[0] - 1) * self.shape[1]
        right = (column + 1).clamp(max=self.shape[1] - 1)
        above = row * self.shape[1]
        return torch.stack([above + column, above + right, below + column, below + right])

    def spread(self, values: Tensor) -> Tensor:
        """A value for each cell (cells high, cells wide) to all of its pixels (H, W)."""
        return values.index_select(1, self.columns.samples[0]).index_select(0, self.rows.samples[0])

    def pixel_sum(self, cells: Tensor) -> Tensor:
        """Of (cells high, cells wide, N) bool maps the number of pixels in the cells that are True: (N,) float64."""
        wide = torch.einsum("j,ijn->in", self.columns.counts.float(), cells.float())  # exact: below 2^24
        return self.rows.counts.double() @ wide.double()

    def pixel_counts(self) -> Tensor:
        """(cells high, cells wide) int64 pixels of each cell; 0 where a small target skips cells."""
        return self.rows.counts[:, None] * self.columns.counts

    def chunks(self, cells: Tensor, floats_per_cell: int = 0) -> Iterator["CellPatches"]:
        """Cells (n,) in parts whose patches and `floats_per_cell` further float32 stay within the chunk's bytes."""
        count = max(1, chunk_bytes(cells.device) // (4 * (8 * self.patch_size + floats_per_cell)))
        for start in range(0, len(cells), count):  # `split` would give one empty part of none
            yield CellPatches(self, cells[start : start + count])


class CellPatches:
    """Patches of n cells: their pixels as (P, R, n), rows, columns, cells."""

    def __init__(self, grid: CellGrid, cells: Tensor) -> None:
        self.grid, self.cells = grid, cells
        self.row, self.column = cells // grid.shape[1], cells % grid.shape[1]
        self.row_weights = grid.rows.weights.index_select(1, self.row)[:, None]  # (P, 1, n)
        self.column_weights = grid.columns.weights.index_select(1, self.column)  # (R, n)

    def interpolate(self, corners: Tensor) -> Tensor:
        """Corner values (4, m) of the first m cells to their patches (P, R, m)."""
        count = corners.shape[1]
        top_left, top_right, bottom_left, bottom_right = corners
        weights = self.column_weights[:, :count]
        top = torch.lerp(top_left.expand_as(weights), top_right.expand_as(weights), weights)  # (R, m)
        bottom = torch.lerp(bottom_left.expand_as(weights), bottom_right.expand_as(weights), weights)
        row_weights = self.row_weights[..., :count]
        shape = (len(row_weights), *top.shape)
        return torch.lerp(top.expand(shape), bottom.expand(shape), row_weights.expand(shape))

    def occupied(self) -> Tensor:
        """(P, R, n) bool, False where a pixel is a repetition."""
        rows, columns = self.grid.rows.occupied, self.grid.columns.occupied
        return rows.index_select(1, self.row)[:, None] & columns.index_select(1, self.column)

    def write(self, target: Tensor, values: Tensor) -> None:
        """Put the values (P, R, n) at their pixels of the contiguous target (H, W)."""
        row = self.grid.rows.pixels.index_select(1, self.row)[:, None] * self.grid.size[1]
        pixels = row + self.grid.columns.pixels.index_select(1, self.column)  # (P, R, n)
        target.view(-1).scatter_(0, pixels.view(-1), values.reshape(-1).to(target.dtype))


def best_in_cells(
    grid: CellGrid, maps: Tensor, cells: Tensor, candidates_of: Callable[[Tensor], Tensor], rating: Rating
) -> Iterator[tuple[CellPatches, Tensor]]:
    """The best of N maps (cells of the grid, N) at every pixel of cells (n,), a chunk of cells at a time.

    `candidates_of` turns corner values (4, n, N) into what is compared, (n, N) bool with at least one True for each
    cell. Of equal values the first map's counts. Yields patches and what `rating` notes of the best, (P, R, n) int32.
    """
    width = maps.shape[1]
    for part in grid.chunks(cells, 6 * width):
        corners = maps.index_select(0, grid.corners(part.cells).view(-1)).view(4, -1, width)
        candidates = candidates_of(corners)
        counts, order = candidates.sum(dim=1).sort(descending=True, stable=True)
        patches = CellPatches(grid, part.cells[order])
        corners = corners.index_select(1, order)
        chosen = candidates.index_select(0, order).nonzero()[:, 1]  # the candidates of cell after cell
        first = counts.cumsum(0) - counts
        # Cells with many candidates come first, so that the cells which have an r-th one are the first so many.
        cells_with = (counts[:, None] > torch.arange(int(counts[0]), device=counts.device)).sum(dim=0).tolist()
        for rank, count in enumerate(cells_with):
            candidate = chosen.index_select(0, first[:count] + rank)  # (count,)
            values = corners[:, :count].gather(2, candidate.expand(4, -1)[..., None])[..., 0]  # (4, count)
            value, noted = rating(patches.interpolate(values), candidate)
            if rank == 0:
                best, winner = value, noted.int().expand(value.shape).contiguous()
                continue
            better = value > best[..., :count]
            winner[..., :count] = torch.where(better, noted.int(), winner[..., :count])
            best[..., :count] = torch.maximum(best[..., :count], value)
        yield patches, winner


def may_be_highest(corners: Tensor) -> Tensor:
    """Of corner values (4, n, N) which of the N can be the highest somewhere in the cell: (n, N) bool."""
    bound = corners.amin(dim=0).amax(dim=1, keepdim=True)
    return corners.amax(dim=0) >= bound
