"""Pictures of segmentation results: overlays with colours, borders, labels and a legend, and contact sheets.

Only numpy and PIL. Colours depend on nothing but the id, so a class or a segment looks the same in every picture.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GOLDEN_RATIO = 0.618033988749895  # multiples of it spread over the hue circle without ever coming close again
LIGHTNESS_CYCLE = (0.70, 0.80, 0.60)  # OKLab; neighbouring ids differ in lightness too
CHROMA = 0.17

MIN_LABEL_AREA = 0.0012  # of the image; smaller segments get no label
LABEL_OVERHANG = 1.8  # a label may be this much wider or higher than its segment's box
MAX_LABEL_SHARE = 0.6  # of the segment's area; a larger label would hide what it names
FONT_FRACTION = 1 / 42  # of the image's shorter side
FONT_RANGE = (9, 28)
INK, PAPER = (24, 24, 27), (255, 255, 255)
LABEL_BACKGROUND = (16, 16, 20, 190)
MAX_LEGEND_SWATCHES = 4

AnyImage = Image.Image | np.ndarray


class SegmentRegion(NamedTuple):
    """Where one segment lies in the id map."""

    position: int  # in the list of segments
    top: int
    left: int
    mask: np.ndarray  # (h, w) bool, cropped to the segment's box
    area: int


def id_color(segment_id: int) -> tuple[int, int, int]:
    """RGB colour of an id: strong, distinct from those of nearby ids, the same in every run."""
    hue = 2 * math.pi * ((segment_id * GOLDEN_RATIO + 0.08) % 1.0)
    lightness = LIGHTNESS_CYCLE[segment_id % len(LIGHTNESS_CYCLE)]
    return _oklab_to_rgb(lightness, CHROMA * math.cos(hue), CHROMA * math.sin(hue))


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
    canvas = Image.fromarray(_paint(picture, positions, colors, alpha))
    font = _font(canvas.size)
    names = [_name(segment, id2label) for segment in segments]
    if labels:
        texts = [_with_score(name, segment) if scores else name for name, segment in zip(names, segments, strict=True)]
        canvas = _write_labels(canvas, positions, texts, font)
    return _with_legend(canvas, names, colors, font) if legend and segments else canvas


def contact_sheet(
    images: Sequence[AnyImage], columns: int = 4, titles: Sequence[str] | None = None, cell_width: int = 360
) -> Image.Image:
    """One picture of many, row by row, each scaled to fit its cell, with its title above.

    Args:
        images: PIL images or uint8 arrays; they may differ in size.
        columns: pictures in a row.
        titles: one line per image, shortened where it is too long.
        cell_width: width of a cell in pixels; its height follows from the median shape of the images.
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
    cell_height = round(cell_width * float(np.median([picture.height / picture.width for picture in pictures])))
    font = ImageFont.load_default(size=max(11, cell_width // 24))
    title_height = 0 if titles is None else _text_size("Ag", font)[1] + gap
    rows = -(-len(pictures) // columns)
    row_height = cell_height + title_height + gap
    sheet = Image.new("RGB", (columns * (cell_width + gap) + gap, rows * row_height + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        left = gap + index % columns * (cell_width + gap)
        top = gap + index // columns * row_height
        if titles is not None:
            draw.text((left, top), _shorten(titles[index], font, cell_width), fill=INK, font=font)
        scale = min(cell_width / picture.width, cell_height / picture.height)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        resized = picture.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(resized, (left + (cell_width - size[0]) // 2, top + title_height + (cell_height - size[1]) // 2))
    return sheet


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


def _oklab_to_rgb(lightness: float, green_red: float, blue_yellow: float) -> tuple[int, int, int]:
    """sRGB bytes of an OKLab colour (Ottosson 2020), clipped to the gamut."""
    long = (lightness + 0.3963377774 * green_red + 0.2158037573 * blue_yellow) ** 3
    medium = (lightness - 0.1055613458 * green_red - 0.0638541728 * blue_yellow) ** 3
    short = (lightness - 0.0894841775 * green_red - 1.2914855480 * blue_yellow) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (round(255 * _gamma(min(max(value, 0.0), 1.0))) for value in linear)
    return red, green, blue


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
