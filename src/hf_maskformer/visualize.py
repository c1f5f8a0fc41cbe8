"""Pictures of segmentation results: overlays with colours, borders, labels and a legend, and contact sheets.

Only numpy and PIL. A class or a segment has the same colour in every picture, see `palette`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hf_maskformer.palette import id_color

__all__ = [
    "MAX_ROW_SHAPE",
    "AnyImage",
    "contact_sheet",
    "draw_errors",
    "draw_segments",
    "fill_segments",
    "id_color",
    "segment_positions",
    "with_class_legend",
]

MIN_LABEL_AREA = 0.0012  # of the image; smaller segments get no label
LABEL_OVERHANG = 1.8  # a label may be this much wider or higher than its segment's box
MAX_LABEL_SHARE = 0.6  # of the segment's area; a larger label would hide what it names
FONT_FRACTION = 1 / 42  # of the image's shorter side
FONT_RANGE = (9, 28)
INK, PAPER = (24, 24, 27), (255, 255, 255)
LABEL_BACKGROUND = (16, 16, 20, 190)
MAX_LEGEND_SWATCHES = 4
HATCH_DARK, HATCH_LIGHT = (39, 39, 42), (82, 82, 91)
HATCH_PERIOD, HATCH_LINE = 10, 3  # pixels, along a row
MAX_ROW_SHAPE = 2.0  # largest height of a row of a contact sheet / width of its cells
ERROR = (220, 38, 38)
ERROR_BACKGROUND = 0.65  # how far pixels that are right fade to white

AnyImage = Image.Image | np.ndarray


class SegmentRegion(NamedTuple):
    """Where one segment lies in the id map."""

    position: int  # in the list of segments
    top: int
    left: int
    mask: np.ndarray  # (h, w) bool, cropped to the segment's box
    area: int


def fill_segments(segmentation: np.ndarray, ids: Sequence[int], values: Any, fill: Any) -> np.ndarray:
    """Every pixel's segment value.

    Args:
        segmentation: (H, W) integer ids.
        ids: N different segment ids.
        values: (N,) or (N, ...) array, one value per id.
        fill: value of the pixels whose id is not in `ids`.

    Returns:
        (H, W) or (H, W, ...) array of the type of `values`.
    """
    values = np.asarray(values)
    table = np.concatenate([values, np.broadcast_to(np.asarray(fill, values.dtype), (1, *values.shape[1:]))])
    return table[segment_positions(segmentation, ids)]


def segment_positions(segmentation: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """(H, W) int64: the position in `ids` of every pixel's id, len(ids) where it is not among them."""
    known = np.asarray(ids, dtype=np.int64)
    if not known.size:
        return np.zeros(segmentation.shape, dtype=np.int64)
    order = np.argsort(known, kind="stable")
    slots = np.minimum(np.searchsorted(known[order], segmentation), known.size - 1)  # (H, W)
    return np.where(known[order][slots] == segmentation, order[slots], known.size)


def draw_segments(
    image: AnyImage,
    segmentation: np.ndarray,
    segments: Sequence[Mapping[str, Any]],
    id2label: Mapping[int, str] | None = None,
    *,
    color_by: Literal["segment", "label"] = "segment",
    alpha: float = 0.5,
    labels: bool = True,
    scores: bool = True,
    legend: bool = False,
    hatched: np.ndarray | None = None,
) -> Image.Image:
    """The image with its segments painted over it.

    Args:
        image: PIL image or (H, W), (H, W, 3) uint8 array.
        segmentation: (H, W) ids; a pixel whose id is in no segment stays as it is.
        segments: dicts with `id` and `label_id`, optionally `score` and `label` (its name).
        id2label: class names for segments that carry no `label`; without either the number is shown.
        color_by: "segment" tells instances apart, "label" paints a class in one colour.
        alpha: opacity of the colour, 0..1.
        labels: write name (and score) into every segment that has room for it.
        scores: write scores behind the names.
        legend: add a panel with the classes on the right; the result is then wider than the image.
        hatched: (H, W) bool; these pixels are covered by dark stripes: void.

    Raises:
        ValueError: the sizes of image and segmentation differ, or an argument is out of its range.
    """
    picture = _to_rgb(image)
    segmentation = np.asarray(segmentation)
    if segmentation.shape != picture.shape[:2]:
        raise ValueError(f"segmentation must have the image's size {picture.shape[:2]}, got {segmentation.shape}")
    if color_by not in ("segment", "label"):
        raise ValueError(f"color_by must be 'segment' or 'label', got {color_by!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be within 0..1, got {alpha}")
    key = "id" if color_by == "segment" else "label_id"
    colors = np.array([id_color(int(segment[key])) for segment in segments], dtype=np.uint8).reshape(-1, 3)
    positions = segment_positions(segmentation, [int(segment["id"]) for segment in segments])  # (H, W)
    painted = _paint(picture, positions, colors, alpha)
    canvas = Image.fromarray(painted if hatched is None else _hatch(painted, hatched))
    font = _font(canvas.size)
    names = [_name(segment, id2label) for segment in segments]
    if labels:
        texts = [_with_score(name, segment) if scores else name for name, segment in zip(names, segments, strict=True)]
        canvas = _write_labels(canvas, positions, texts, font)
    return _with_legend(canvas, names, colors, font) if legend and segments else canvas


def draw_errors(image: AnyImage, wrong: np.ndarray, hatched: np.ndarray | None = None) -> Image.Image:
    """The image faded, its wrong pixels ((H, W) bool) red, those of `hatched` under dark stripes."""
    picture = _to_rgb(image)
    grey = picture.mean(axis=2, keepdims=True)  # (H, W, 1)
    faded = np.broadcast_to(grey + (255 - grey) * ERROR_BACKGROUND, picture.shape)
    red = 0.35 * grey + 0.65 * np.array(ERROR)  # (H, W, 3); what is seen stays visible
    result = np.rint(np.where(wrong[..., None], red, faded)).astype(np.uint8)
    return Image.fromarray(result if hatched is None else _hatch(result, hatched))


def contact_sheet(
    images: Sequence[AnyImage], columns: int = 4, titles: Sequence[str] | None = None, cell_width: int = 360
) -> Image.Image:
    """One picture of many, row by row, each scaled to fit its cell, with its title above.

    Args:
        images: PIL images or uint8 arrays; they may differ in size.
        columns: pictures in a row.
        titles: one line per image, shortened where it is too long.
        cell_width: width of a cell in pixels; the height of a row follows from the median shape of its images
            and is at most `MAX_ROW_SHAPE` times as large.
    """
    if not images:
        raise ValueError("images must hold at least one image, got none")
    if columns < 1 or cell_width < 1:
        raise ValueError(f"columns and cell_width must be at least 1, got {columns} and {cell_width}")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"titles must have one entry per image ({len(images)}), got {len(titles)}")
    pictures = [Image.fromarray(_to_rgb(image)) for image in images]
    columns = min(columns, len(pictures))
    gap = max(6, cell_width // 36)
    font = ImageFont.load_default(size=max(11, cell_width // 24))
    title_height = 0 if titles is None else _text_size("Ag", font)[1] + gap
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    shapes = [min(float(np.median([one.height / one.width for one in row])), MAX_ROW_SHAPE) for row in rows]
    heights = [max(1, round(cell_width * shape)) for shape in shapes]
    full_height = sum(heights) + len(rows) * (title_height + gap) + gap
    sheet = Image.new("RGB", (columns * (cell_width + gap) + gap, full_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = gap
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for column, picture in enumerate(row):
            left = gap + column * (cell_width + gap)
            if titles is not None:
                title = _shorten(titles[number * columns + column], font, cell_width)
                draw.text((left, top), title, fill=INK, font=font)
            scale = min(cell_width / picture.width, height / picture.height)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            resized = picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
            sheet.paste(resized, (left + (cell_width - size[0]) // 2, top + title_height + (height - size[1]) // 2))
        top += title_height + height + gap
    return sheet


def with_class_legend(sheet: Image.Image, id2label: Mapping[int, str]) -> Image.Image:
    """The sheet with a strip below it: a swatch in the colour of each class, and its name."""
    font: Any = ImageFont.load_default(size=max(12, sheet.width // 90))
    swatch, margin = round(font.size), round(font.size * 0.8)
    line = round(font.size * 1.8)
    places = []
    left, top = margin, margin
    for label_id, name in id2label.items():
        width = swatch + margin // 2 + _text_size(name, font)[0]
        if left > margin and left + width > sheet.width - margin:
            left, top = margin, top + line
        places.append((left, top, label_id, name))
        left += width + 2 * margin
    result = Image.new("RGB", (sheet.width, sheet.height + top + line), PAPER)
    result.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(result)
    for left, top, label_id, name in places:
        top += sheet.height
        box = (left, top, left + swatch - 1, top + swatch - 1)
        draw.rounded_rectangle(box, radius=3, fill=id_color(label_id))
        draw.text((left + swatch + margin // 2, top + swatch / 2), name, fill=INK, font=font, anchor="lm")
    return result


def _hatch(picture: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Dark diagonal stripes over the covered pixels (H, W) bool of a picture (H, W, 3) uint8."""
    rows, columns = np.ogrid[: covered.shape[0], : covered.shape[1]]
    light = (rows + columns) % HATCH_PERIOD < HATCH_LINE  # (H, W)
    stripes = np.where(light[..., None], HATCH_LIGHT, HATCH_DARK).astype(np.uint8)
    return np.where(covered[..., None], stripes, picture)


def _paint(picture: np.ndarray, positions: np.ndarray, colors: np.ndarray, alpha: float) -> np.ndarray:
    """Blends the colours over the picture (H, W, 3) and draws each segment's rim in its full colour."""
    count = len(colors)
    inside = positions < count  # (H, W)
    overlay = np.concatenate([colors, np.zeros((1, 3), np.uint8)])[positions]  # (H, W, 3)
    blended = picture * (1 - alpha) + overlay * alpha
    result = np.where(inside[..., None], blended, picture)
    width = max(1, round(min(positions.shape) / 420))
    rim = _rim(positions, width) & inside
    rim_color = overlay * 0.8 + 255 * 0.2  # a little lighter, so that it also shows on a fill of the same colour
    result = np.where(rim[..., None], rim_color, result)
    return np.clip(np.rint(result), 0, 255).astype(np.uint8)


def _rim(positions: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels within `width` of another segment. The image's edge is no rim."""
    edge = np.zeros(positions.shape, dtype=bool)
    vertical = positions[1:] != positions[:-1]
    horizontal = positions[:, 1:] != positions[:, :-1]
    edge[1:] |= vertical
    edge[:-1] |= vertical
    edge[:, 1:] |= horizontal
    edge[:, :-1] |= horizontal
    for _ in range(width - 1):
        edge = ~_erode(~edge)
    return edge


def _erode(mask: np.ndarray) -> np.ndarray:
    """One step of erosion with the four neighbours; outside of the array counts as set."""
    result = mask.copy()
    result[1:] &= mask[:-1]
    result[:-1] &= mask[1:]
    result[:, 1:] &= mask[:, :-1]
    result[:, :-1] &= mask[:, 1:]
    return result


def _regions(positions: np.ndarray, count: int) -> Iterator[SegmentRegion]:
    """The segments that have pixels, largest first."""
    flat = positions.ravel()
    order = np.argsort(flat, kind="stable")
    areas = np.bincount(flat, minlength=count + 1)[:count]
    ends = np.cumsum(areas)
    for index in np.argsort(-areas, kind="stable").tolist():
        if areas[index] == 0:
            return
        rows, columns = np.divmod(order[ends[index] - areas[index] : ends[index]], positions.shape[1])
        top, left = int(rows.min()), int(columns.min())
        mask = np.zeros((int(rows.max()) - top + 1, int(columns.max()) - left + 1), dtype=bool)
        mask[rows - top, columns - left] = True
        yield SegmentRegion(index, top, left, mask, int(areas[index]))


def _deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """Row and column farthest from the mask's outside: where its thickest part is and a label sits best."""
    step = max(1, max(mask.shape) // 96)  # a coarse grid is exact enough and bounds the work
    remaining = np.pad(mask[::step, ::step], 1)
    if not remaining.any():
        remaining, step = np.pad(mask, 1), 1
    while True:
        smaller = _erode(remaining)
        if not smaller.any():
            break
        remaining = smaller
    rows, columns = np.nonzero(remaining[1:-1, 1:-1])
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return int(rows[nearest]) * step, int(columns[nearest]) * step


def _write_labels(
    canvas: Image.Image, positions: np.ndarray, texts: Sequence[str], font: ImageFont.FreeTypeFont
) -> Image.Image:
    """Writes each text into its segment, larger segments first; one that would cover another text is left out."""
    layer = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    taken: list[tuple[int, int, int, int]] = []
    pad = max(2, round(font.size / 5))
    for region in _regions(positions, len(texts)):
        if region.area < MIN_LABEL_AREA * positions.size:
            break
        text_width, text_height = _text_size(texts[region.position], font)
        width, height = text_width + 2 * pad, text_height + 2 * pad
        region_height, region_width = region.mask.shape
        too_long = width > LABEL_OVERHANG * region_width or height > LABEL_OVERHANG * region_height
        if too_long or width * height > MAX_LABEL_SHARE * region.area:
            continue
        row, column = _deepest_point(region.mask)
        left = min(max(region.left + column - width // 2, 1), canvas.width - width - 1)
        top = min(max(region.top + row - height // 2, 1), canvas.height - height - 1)
        box = (left, top, left + width, top + height)
        if left < 0 or top < 0 or any(_overlap(box, other) for other in taken):
            continue
        taken.append(box)
        draw.rounded_rectangle(box, radius=pad, fill=LABEL_BACKGROUND)
        middle = (left + width / 2, top + height / 2)
        draw.text(middle, texts[region.position], fill=(255, 255, 255, 255), font=font, anchor="mm")
    return Image.alpha_composite(canvas.convert("RGBA"), layer).convert("RGB")


def _with_legend(
    canvas: Image.Image, names: Sequence[str], colors: np.ndarray, font: ImageFont.FreeTypeFont
) -> Image.Image:
    """Adds a panel on the right: each class with its colours (the first few, when segments differ) and its count."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name, color in zip(names, colors.tolist(), strict=True):
        groups.setdefault(name, []).append(tuple(color))
    swatch, line = round(font.size * 0.9), round(font.size * 1.7)
    margin = round(font.size * 0.8)
    rows = []
    for name in sorted(groups, key=lambda key: (-len(groups[key]), key)):
        members = groups[name]
        shown = list(dict.fromkeys(members))[:MAX_LEGEND_SWATCHES]
        rows.append((f"{name}  x{len(members)}" if len(members) > 1 else name, shown))
    fitting = max(1, (canvas.height - 2 * margin) // line)
    if len(rows) > fitting:
        rows = [*rows[: fitting - 1], (f"{len(rows) - fitting + 1} more", [])]
    swatches = max(len(shown) for _, shown in rows)
    text_left = margin + swatches * (swatch + 2) + margin // 2
    panel_width = text_left + max(_text_size(text, font)[0] for text, _ in rows) + margin
    result = Image.new("RGB", (canvas.width + panel_width, canvas.height), PAPER)
    result.paste(canvas, (0, 0))
    draw = ImageDraw.Draw(result)
    for index, (text, shown) in enumerate(rows):
        top = margin + index * line
        for position, color in enumerate(shown):
            left = canvas.width + margin + position * (swatch + 2)
            draw.rounded_rectangle((left, top, left + swatch - 1, top + swatch - 1), radius=2, fill=color)
        draw.text((canvas.width + text_left, top + swatch / 2), text, fill=INK, font=font, anchor="lm")
    return result


def _name(segment: Mapping[str, Any], id2label: Mapping[int, str] | None) -> str:
    label_id = int(segment["label_id"])
    return str(segment.get("label") or (id2label or {}).get(label_id, label_id))


def _with_score(name: str, segment: Mapping[str, Any]) -> str:
    score = segment.get("score")
    return name if score is None else f"{name} {score:.2f}"


def _font(size: tuple[int, int]) -> Any:
    low, high = FONT_RANGE
    return ImageFont.load_default(size=min(max(round(min(size) * FONT_FRACTION), low), high))


def _text_size(text: str, font: Any) -> tuple[int, int]:
    """Width of the text and height of a line, the same for all texts."""
    ascent, descent = font.getmetrics()
    return math.ceil(font.getlength(text)), ascent + descent


def _shorten(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _to_rgb(image: AnyImage) -> np.ndarray:
    """(H, W, 3) uint8."""
    array = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else np.asarray(image)
    if array.dtype != np.uint8:
        raise ValueError(f"image must be a PIL image or a uint8 array, got {array.dtype}")
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"image must have shape (H, W) or (H, W, 3), got {array.shape}")
    return array
