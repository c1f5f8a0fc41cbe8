"""Procedural pictures with exact panoptic truth: things that cover each other, standing on textured stuff.

A scene is a small landscape (sky, grass, water, sand, with wavy borders) and two to seven things (balloons, crates,
stars). The colours of all thing classes come from one range, so a class is told by its shape and texture. Everything
is a function of one random generator; all lengths are fractions of the shorter image side.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

STUFF_NAMES = ("sky", "grass", "water", "sand")
THING_NAMES = ("balloon", "crate", "star")
SKY, GRASS, WATER, SAND = range(4)
BALLOON, CRATE, STAR = range(4, 7)

MIN_VISIBLE_FRACTION = 0.35  # a thing stays recognisable: at least this much of it is seen
MIN_STUFF_FRACTION = 0.02  # a stuff class that would get less of the picture goes to the largest one
SHADOW_STRENGTH = 0.4
SENSOR_NOISE = 0.02


@dataclass(frozen=True)
class Scene:
    """One drawn picture and its truth.

    Attributes:
        image: (H, W, 3) uint8.
        segment_map: (H, W) int32, k + 1 where segment k is seen; every pixel belongs to one segment.
        label_ids: (N,) int64, the class of each segment; stuff first, then things from back to front.
        amodal_masks: (N, H, W) bool, the whole shape of each thing inside the picture, also where it is covered;
            for stuff the visible part.
    """

    image: np.ndarray
    segment_map: np.ndarray
    label_ids: np.ndarray
    amodal_masks: np.ndarray


def draw_scene(rng: np.random.Generator, height: int = 128, width: int = 128) -> Scene:
    """Draws one scene; the same state of `rng` gives the same scene."""
    canvas, stuff = _draw_stuff(rng, height, width)
    light = np.deg2rad(rng.uniform(200, 340))  # where the light comes from; up is negative y
    owner = np.zeros((height, width), dtype=np.int32)  # 0 = stuff, k + 1 = thing k on top
    shapes: list[np.ndarray] = []
    labels: list[int] = []
    wanted = int(rng.integers(2, 8))
    for _ in range(3 * wanted):
        if len(shapes) == wanted:
            break
        thing = _Thing.random(rng, height, width)
        whole = _whole_mask(thing, height, width)
        if not _leaves_others_visible(whole, owner, shapes):
            continue
        _paint_thing(canvas, thing, light, rng)
        owner[whole] = len(shapes) + 1
        shapes.append(whole)
        labels.append(thing.label_id)
    image = _finish(canvas, rng)
    return _with_truth(image, stuff, owner, shapes, labels)


def _with_truth(
    image: np.ndarray, stuff: np.ndarray, owner: np.ndarray, shapes: list[np.ndarray], labels: list[int]
) -> Scene:
    """Numbers the stuff classes that are seen and the things."""
    stuff_labels = np.unique(stuff[owner == 0])
    numbers = np.zeros(len(STUFF_NAMES), dtype=np.int32)
    numbers[stuff_labels] = np.arange(1, len(stuff_labels) + 1)
    segment_map = np.where(owner == 0, numbers[stuff], owner + len(stuff_labels)).astype(np.int32)
    stuff_masks = [segment_map == number for number in range(1, len(stuff_labels) + 1)]
    return Scene(
        image=image,
        segment_map=segment_map,
        label_ids=np.array([*stuff_labels.tolist(), *labels], dtype=np.int64),
        amodal_masks=np.array([*stuff_masks, *shapes], dtype=bool),
    )


def _finish(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uneven light over the whole picture, sensor noise, 8 bits."""
    height, width = canvas.shape[:2]
    light = 1.0 + 0.2 * (_noise(rng, height, width, 2, 2) - 0.5)
    canvas = canvas * light[..., None]
    canvas += rng.normal(0.0, SENSOR_NOISE, canvas.shape).astype(np.float32)
    return (np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


# --- noise and colour ---


@lru_cache(maxsize=256)
def _smooth_interpolation(length: int, cells: int) -> np.ndarray:
    """(length, cells + 1) matrix that blends neighbouring grid values with a smoothstep."""
    position = (np.arange(length) + 0.5) / length * cells
    left = np.minimum(position.astype(int), cells - 1)
    t = position - left
    t = t * t * (3 - 2 * t)
    matrix = np.zeros((length, cells + 1), dtype=np.float32)
    rows = np.arange(length)
    matrix[rows, left] = 1 - t
    matrix[rows, left + 1] = t
    return matrix


def _noise(rng: np.random.Generator, height: int, width: int, cells_y: int, cells_x: int) -> np.ndarray:
    """(height, width) smooth value noise in 0..1 with the given number of grid cells."""
    grid = rng.random((cells_y + 1, cells_x + 1), dtype=np.float32)
    return _smooth_interpolation(height, cells_y) @ grid @ _smooth_interpolation(width, cells_x).T


def _fractal_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Three octaves of value noise, in 0..1."""
    octaves = [_noise(rng, height, width, cells * 2**k, cells * 2**k) for k in range(3)]
    return (octaves[0] * 4 + octaves[1] * 2 + octaves[2]) / 7


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """(3,) float32 RGB of a hue in turns, a saturation and a value in 0..1."""
    offsets = np.array([5.0, 3.0, 1.0])
    k = (offsets + hue * 6.0) % 6.0
    return (value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)).astype(np.float32)


def _blend(dark: np.ndarray, bright: np.ndarray, t: np.ndarray) -> np.ndarray:
    """(H, W, 3) from `dark` where t = 0 to `bright` where t = 1."""
    return dark + (bright - dark) * t[..., None]


# --- stuff ---


def _draw_stuff(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (H, W, 3) float32 background and its (H, W) int class map."""
    stuff = _layout(rng, height, width)
    canvas = np.zeros((height, width, 3), dtype=np.float32)
    for label_id, texture in STUFF_TEXTURES.items():
        region = stuff == label_id
        if region.any():
            first, last = np.flatnonzero(region.any(axis=1))[[0, -1]]
            rows = slice(first, last + 1)
            np.copyto(canvas[rows], texture(rng, last + 1 - first, width), where=region[rows, :, None])
    return canvas, stuff


def _layout(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W) stuff classes: sky over one to three grounds with wavy borders; one scene in eight has no sky."""
    y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
    x = ((np.arange(width, dtype=np.float32) + 0.5) / width)[None, :]
    grounds = rng.permutation([GRASS, WATER, SAND])
    stuff = np.full((height, width), grounds[0])
    horizon = rng.uniform(0.25, 0.55)
    has_sky = rng.random() > 0.125
    if not has_sky:
        horizon = -0.1
    for label_id in grounds[1 : 1 + int(rng.choice([0, 1, 2], p=[0.15, 0.55, 0.3]))]:
        wave = 0.35 * (_fractal_noise(rng, height, width, 3) - 0.5)
        level = rng.uniform(horizon + 0.15, 0.9)
        tilt = rng.normal(0.0, 0.5)
        stuff[y + wave + tilt * (x - 0.5) > level] = label_id
    if has_sky:
        cells = int(rng.integers(3, 9))
        skyline = horizon + rng.uniform(0.02, 0.2) * (_noise(rng, 1, width, 1, cells) - 0.5)
        stuff[y < skyline] = SKY
    fractions = np.bincount(stuff.reshape(-1), minlength=len(STUFF_NAMES)) / stuff.size
    stuff[fractions[stuff] < MIN_STUFF_FRACTION] = int(fractions.argmax())
    return stuff


def _sky(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A vertical gradient from noon blue to evening rose, with soft clouds."""
    top = _hsv(rng.uniform(0.52, 0.72), rng.uniform(0.25, 0.75), rng.uniform(0.55, 0.95))
    bottom = _hsv(rng.choice([rng.uniform(0.0, 0.14), rng.uniform(0.5, 0.6)]), rng.uniform(0.1, 0.4), 0.95)
    t = np.linspace(0.0, 1.0, height, dtype=np.float32)[:, None]
    canvas = _blend(top, bottom, np.broadcast_to(t, (height, width)))
    clouds = np.clip((_fractal_noise(rng, height, width, 4) - rng.uniform(0.45, 0.62)) * 5, 0.0, 0.85)
    white = np.full(3, rng.uniform(0.85, 1.0), dtype=np.float32)
    return canvas + (white - canvas) * clouds[..., None]


def _grass(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Upright blades on patches, from fresh green to dry yellow."""
    hue, value = rng.uniform(0.13, 0.38), rng.uniform(0.45, 0.75)
    dark = _hsv(hue + 0.03, rng.uniform(0.5, 0.8), 0.45 * value)
    bright = _hsv(hue - 0.02, rng.uniform(0.4, 0.75), 1.15 * value)
    blades = _noise(rng, height, width, max(1, height * 14 // width), 48)
    patches = _fractal_noise(rng, height, width, 3)
    return _blend(dark, bright, 0.75 * blades + 0.6 * patches - 0.15)


def _water(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Horizontal waves that grow towards the viewer, with glints."""
    hue, value = rng.uniform(0.42, 0.68), rng.uniform(0.4, 0.75)
    dark = _hsv(hue, rng.uniform(0.45, 0.85), 0.65 * value)
    bright = _hsv(hue + rng.uniform(-0.05, 0.05), rng.uniform(0.2, 0.5), 1.2 * value)
    depth = np.linspace(0.25, 1.0, height, dtype=np.float32)[:, None]
    warp = _noise(rng, height, width, max(2, height * 10 // width), 5)
    phase = 2 * np.pi * (rng.uniform(9, 14) * np.sqrt(depth) * (height / width + 0.5) + 1.6 * warp)
    waves = 0.5 + 0.5 * np.sin(phase)
    glints = _noise(rng, height, width, max(2, height * 40 // width), 12)
    return _blend(dark, bright, 0.55 * waves + 0.9 * np.clip(glints - 0.6, 0.0, 1.0) + 0.1)


def _sand(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Grains on slanted ripples, from pale beige to red earth."""
    hue, value = rng.uniform(0.04, 0.15), rng.uniform(0.55, 0.95)
    dark = _hsv(hue, rng.uniform(0.3, 0.6), 0.7 * value)
    bright = _hsv(hue + 0.01, rng.uniform(0.15, 0.45), 1.05 * value)
    grains = rng.random((height, width), dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None] / width
    x = np.arange(width, dtype=np.float32)[None, :] / width
    slant = rng.uniform(-0.8, 0.8)
    ripples = np.sin(2 * np.pi * (rng.uniform(5, 8) * (y + slant * x) + 1.5 * _noise(rng, height, width, 3, 3)))
    return _blend(dark, bright, 0.5 + 0.2 * ripples + 0.7 * (grains - 0.5))


STUFF_TEXTURES = {SKY: _sky, GRASS: _grass, WATER: _water, SAND: _sand}


# --- things ---


@dataclass(frozen=True)
class _Thing:
    """A thing before it is painted: lengths in pixels, angle in radians."""

    label_id: int
    x: float
    y: float
    radius: float
    aspect: float
    angle: float
    points: int

    @classmethod
    def random(cls, rng: np.random.Generator, height: int, width: int) -> "_Thing":
        label_id = int(rng.integers(BALLOON, STAR + 1))
        side = min(height, width)
        return cls(
            label_id=label_id,
            x=rng.uniform(0.06, 0.94) * width,
            y=rng.uniform(0.06, 0.94) * height,
            radius=side * rng.uniform(0.08, 0.2) * (1.15 if label_id == STAR else 1.0),
            aspect=rng.uniform(0.7, 1.0) if label_id == BALLOON else rng.uniform(0.6, 1.0),
            angle=rng.uniform(-0.5, 0.5) if label_id == BALLOON else rng.uniform(0.0, 2 * np.pi),
            points=int(rng.integers(5, 7)),
        )

    def window(self, height: int, width: int, margin: float) -> tuple[slice, slice]:
        """The rows and columns within `margin` pixels of the thing, cut at the picture."""
        reach = self.radius * 1.25 + margin
        rows = slice(max(0, int(self.y - reach)), min(height, int(self.y + reach) + 2))
        columns = slice(max(0, int(self.x - reach)), min(width, int(self.x + reach) + 2))
        return rows, columns

    def local(self, rows: slice, columns: slice, dx: float = 0.0, dy: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of pixel centres in the thing's own turned frame, in pixels."""
        x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + 0.5 - self.x - dx
        y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5 - self.y - dy
        cos, sin = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        return cos * x + sin * y, cos * y - sin * x

    def distance(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """About the signed distance to the outline in pixels, negative inside."""
        if self.label_id == BALLOON:
            return (np.hypot(u / self.aspect, v) - self.radius) * self.aspect
        if self.label_id == CRATE:
            return np.maximum(np.abs(u) - self.radius, np.abs(v) - self.radius * self.aspect)
        tip, notch = self.radius, 0.5 * self.radius
        sector = np.pi / self.points
        folded = np.abs((np.arctan2(v, u) + sector) % (2 * sector) - sector)
        length = np.hypot(u, v)
        # The edge runs from (tip, 0) to the notch half a sector further; its outward normal is (a, b).
        edge_x, edge_y = notch * np.cos(sector) - tip, notch * np.sin(sector)
        a, b = edge_y / np.hypot(edge_x, edge_y), -edge_x / np.hypot(edge_x, edge_y)
        return np.asarray(a * (length * np.cos(folded) - tip) + b * length * np.sin(folded))


def _whole_mask(thing: _Thing, height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    rows, columns = thing.window(height, width, margin=1.0)
    mask[rows, columns] = thing.distance(*thing.local(rows, columns)) < 0
    return mask


def _leaves_others_visible(whole: np.ndarray, owner: np.ndarray, shapes: list[np.ndarray]) -> bool:
    """Whether every thing below, and the new one inside the picture, keeps enough visible pixels."""
    if whole.sum() < 0.004 * whole.size:
        return False
    covered = np.bincount(owner[whole], minlength=len(shapes) + 1)[1:]
    visible = np.bincount(owner.reshape(-1), minlength=len(shapes) + 1)[1:]
    areas = np.array([shape.sum() for shape in shapes])
    return bool(np.all(visible - covered >= MIN_VISIBLE_FRACTION * areas))


def _paint_thing(canvas: np.ndarray, thing: _Thing, light: float, rng: np.random.Generator) -> None:
    """Draws the soft shadow and then the thing with a smooth edge, in place."""
    height, width = canvas.shape[:2]
    reach = 0.3 * thing.radius
    dx, dy = -reach * np.cos(light), -reach * np.sin(light)
    rows, columns = thing.window(height, width, margin=2.2 * reach)
    shadow = thing.distance(*thing.local(rows, columns, dx, dy))
    canvas[rows, columns] *= 1.0 - SHADOW_STRENGTH * np.clip(0.5 - shadow / (1.6 * reach), 0.0, 1.0)[..., None]

    rows, columns = thing.window(height, width, margin=1.0)
    u, v = thing.local(rows, columns)
    alpha = np.clip(0.5 - thing.distance(u, v), 0.0, 1.0)[..., None]
    colour = THING_TEXTURES[thing.label_id](thing, u, v, light - thing.angle, rng)
    canvas[rows, columns] += (colour - canvas[rows, columns]) * alpha


def _two_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A main and a second colour; the same range for every thing class."""
    hue = rng.random()
    first = _hsv(hue, rng.uniform(0.35, 0.95), rng.uniform(0.55, 1.0))
    second = _hsv(hue + rng.uniform(0.08, 0.5), rng.uniform(0.1, 0.9), rng.uniform(0.6, 1.0))
    return first, second


def _balloon(thing: _Thing, u: np.ndarray, v: np.ndarray, light: float, rng: np.random.Generator) -> np.ndarray:
    """A ball with upright stripes, shaded as a sphere, with a highlight."""
    first, second = _two_colours(rng)
    nx, ny = u / (thing.radius * thing.aspect), v / thing.radius
    nz = np.sqrt(np.clip(1.0 - nx * nx - ny * ny, 0.0, 1.0))
    longitude = np.arctan2(nx, nz + 1e-3)
    stripes = np.clip(0.5 + 3.0 * np.sin(longitude * rng.integers(3, 6) + rng.uniform(0, 6)), 0.0, 1.0)
    towards = 0.55 * (nx * np.cos(light) + ny * np.sin(light)) + 0.8 * nz
    shade = 0.45 + 0.6 * np.clip(towards, 0.0, 1.0)
    highlight = np.clip(towards - 0.88, 0.0, 1.0) * 4.0
    return _blend(first, second, stripes) * shade[..., None] + highlight[..., None]


def _crate(thing: _Thing, u: np.ndarray, v: np.ndarray, light: float, rng: np.random.Generator) -> np.ndarray:
    """Planks in a frame, with dark joints and grain along the planks."""
    first, second = _two_colours(rng)
    second = 0.75 * first + 0.25 * second
    planks = int(rng.integers(3, 5))
    across = (v / (thing.radius * thing.aspect) + 1.0) * 0.5 * planks
    joint = np.abs(across - np.round(across)) < 0.09
    tone = rng.uniform(0.75, 1.05, planks + 2).astype(np.float32)[np.clip(across.astype(int), 0, planks)]
    rim = 0.2 * thing.radius
    frame = np.maximum(np.abs(u) - thing.radius, np.abs(v) - thing.radius * thing.aspect) > -rim
    grain = 0.9 + 0.1 * np.sin(u * (9.0 / thing.radius) + 4.0 * np.sin(across * 5.0))
    face = np.where(joint, 0.45, tone * grain)
    slope = 0.12 * (u * np.cos(light) + v * np.sin(light)) / thing.radius
    return np.where(frame[..., None], second * 1.05, first * face[..., None]) * (0.9 + slope[..., None])


def _star(thing: _Thing, u: np.ndarray, v: np.ndarray, light: float, rng: np.random.Generator) -> np.ndarray:
    """Bevelled facets that alternate between light and shade around the centre."""
    first, second = _two_colours(rng)
    sector = np.pi / thing.points
    angle = np.arctan2(v, u)
    facet = np.floor(angle / sector)
    facing = np.cos((facet + 0.5) * sector + np.where(facet % 2 == 0, 0.9, -0.9) - light)
    centre = np.clip(1.0 - np.hypot(u, v) / (0.9 * thing.radius), 0.0, 1.0)
    return _blend(first, second, 0.6 * centre) * (0.78 + 0.27 * facing)[..., None]


THING_TEXTURES = {BALLOON: _balloon, CRATE: _crate, STAR: _star}
