"""Which query a pixel belongs to in MaskFormer's panoptic merge: the largest score x mask probability.

By cells of the logits where these leave little open, by rows of the photo where they do not, and by whole resized
masks where the target has hardly more pixels than cells. All give the same.
"""

import math

import torch
from torch import Tensor

from .cell_grid import CellGrid, best_in_cells, chunk_bytes, may_be_highest
from .resampling import resize_columns, resized_chunks

# Of all pairs of a pixel and a mask the part from which on interpolating them by cells is slower than all by rows.
MOST_OPEN = 0.5
ARRAYS_OF_A_BAND = 8  # float32 arrays that are in use at one time for some rows of the photo

# Of the masks' logits (N, h, w) and scores (N,), for a grid and the logit from which on a pixel is in a mask:
# - per pixel 1 + the query with the largest score x probability, 0 where that one's mask is not, (H, W) int32;
# - the number of pixels that each query has there, and those of its own mask, both (N,) float64.
Winning = tuple[Tensor, Tensor, Tensor]


def winning_queries(mask_logits: Tensor, scores: Tensor, grid: CellGrid, border: float) -> Winning:
    """By cells where that is less work than resizing every mask.

    A query whose value at a cell's best corner is below what another has at its worst cannot win in the cell; the mask
    of one that is inside (outside) at all corners has all (none) of its pixels. Only the rest is interpolated.
    """
    if not grid.is_coarse:
        return of_maps(mask_logits, scores, grid, border)
    maps = grid.crop(mask_logits.permute(1, 2, 0)).contiguous()  # (cells high, cells wide, N)
    lowest, highest = (grid.corner_extreme(maps, extreme) for extreme in (torch.minimum, torch.maximum))
    whole, touched = lowest >= border, highest >= border
    bound, leader = (lowest.sigmoid() * scores).max(dim=2)
    contenders = highest.sigmoid() * scores >= bound[..., None]
    owned = (contenders.sum(dim=2) == 1) & whole.gather(2, leader[..., None])[..., 0]  # by its leader
    void = ~(contenders & touched).any(dim=2)
    cell_winner = torch.where(void, 0, leader + 1)  # (cells high, cells wide)
    pixels = grid.pixel_counts()
    contested = ~owned & ~void & (pixels > 0)
    crossed = touched & ~whole & (pixels > 0)[..., None]
    open_pairs = (contenders & contested[..., None]).count_nonzero() + crossed.count_nonzero()
    if int(open_pairs) * grid.patch_size > MOST_OPEN * len(scores) * grid.size[0] * grid.size[1]:
        return by_bands(mask_logits, scores, grid, border)
    visible = torch.bincount(
        cell_winner.view(-1), pixels.masked_fill(contested, 0).view(-1).double(), minlength=len(scores) + 1
    )
    result = grid.spread(cell_winner.int())

    def contenders_in(corners: Tensor) -> Tensor:
        return may_be_highest(corners.sigmoid() * scores)

    def rating(logits: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        return logits.sigmoid() * scores[query], torch.where(logits >= border, query + 1, 0)

    flat = maps.view(-1, len(scores))
    cells = contested.view(-1).nonzero()[:, 0]
    for patches, winner in best_in_cells(grid, flat, cells, contenders_in, rating):
        patches.write(result, winner)
        visible += torch.bincount(winner[patches.occupied()], minlength=len(visible))
    return result, visible[1:], _areas(grid, flat, whole, crossed, border)


def _areas(grid: CellGrid, maps: Tensor, whole: Tensor, crossed: Tensor, border: float) -> Tensor:
    """Pixels of each of N masks (N,) float64: of logits (cells, N), the cells that are all inside, and those that the
    outline crosses (both (cells high, cells wide, N) bool), of which the pixels are interpolated."""
    areas = grid.pixel_sum(whole)
    cells, queries = crossed.view(-1, maps.shape[1]).nonzero().unbind(1)
    start = 0
    for patches in grid.chunks(cells):
        query = queries[start : start + len(patches.cells)]
        start += len(query)
        inside = patches.interpolate(maps[grid.corners(patches.cells), query]) >= border
        areas.index_add_(0, query, (inside & patches.occupied()).sum(dim=(0, 1)).double())
    return areas


def by_bands(mask_logits: Tensor, scores: Tensor, grid: CellGrid, border: float) -> Winning:
    """By resizing every mask, some rows of the photo at a time, where cells can rule out hardly anything."""
    height, width = grid.size
    (top, bottom, row_weights), columns = grid.rows.samples, grid.columns.samples
    winner = torch.zeros((height, width), dtype=torch.int32, device=mask_logits.device)
    areas = torch.zeros(len(scores), dtype=torch.int64, device=mask_logits.device)
    count = max(1, chunk_bytes(mask_logits.device) // (4 * ARRAYS_OF_A_BAND * width))
    for start in range(0, height, count):
        rows = slice(start, min(height, start + count))
        first = int(top[start])
        read = mask_logits[:, first : int(bottom[rows][-1]) + 1]
        above, below, weights = top[rows] - first, bottom[rows] - first, row_weights[rows, None]
        winning = winner[rows]
        best = mask_logits.new_full(winning.shape, -1.0)
        best_logit = mask_logits.new_full(winning.shape, -math.inf)
        logits, value = torch.empty_like(best), torch.empty_like(best)  # written anew by each query
        mark = torch.empty_like(best, dtype=torch.bool)
        for query in range(len(scores)):
            wide = resize_columns(read[query : query + 1], columns)[0]
            torch.index_select(wide, 0, above, out=logits)
            torch.index_select(wide, 0, below, out=value)
            torch.lerp(logits, value, weights, out=logits)
            areas[query] += torch.ge(logits, border, out=mark).count_nonzero()
            torch.sigmoid(logits, out=value).mul_(scores[query])
            better = torch.gt(value, best, out=mark)
            winning.masked_fill_(better, query + 1)
            torch.where(better, logits, best_logit, out=best_logit)
            torch.maximum(best, value, out=best)
        winning.masked_fill_(best_logit < border, 0)
    visible = torch.bincount(winner.flatten(), minlength=len(scores) + 1)[1:]
    return winner, visible.double(), areas.double()


def of_maps(mask_logits: Tensor, scores: Tensor, grid: CellGrid, border: float) -> Winning:
    """By resizing every mask as a whole, for targets that have hardly more pixels than cells."""
    best_value = mask_logits.new_full(grid.size, -1.0)
    winner = torch.zeros(grid.size, dtype=torch.int32, device=mask_logits.device)
    areas = []
    for start, chunk in resized_chunks(mask_logits, grid.size, grid.extent):  # (N, H, W)
        masks = chunk >= border
        areas.append(masks.flatten(1).sum(dim=1, dtype=torch.int32))  # several times faster than to int64
        value, index = (chunk.sigmoid() * scores[start : start + len(chunk), None, None]).max(dim=0)
        inside = masks.gather(0, index[None])[0]
        winner = torch.where(value > best_value, ((index + start + 1) * inside).int(), winner)
        best_value = torch.maximum(best_value, value)
    visible = torch.bincount(winner.flatten(), minlength=len(scores) + 1)[1:]
    return winner, visible.double(), torch.cat(areas).double()
