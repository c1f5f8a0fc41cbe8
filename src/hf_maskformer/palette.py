"""The colour of an id: depends on nothing but the id, so a class or a segment looks the same in every picture."""

import math

GOLDEN_RATIO = 0.618033988749895  # multiples of it spread over the hue circle without ever coming close again
LIGHTNESS_CYCLE = (0.70, 0.80, 0.60)  # OKLab; neighbouring ids differ in lightness too
CHROMA = 0.17


def id_color(segment_id: int) -> tuple[int, int, int]:
    """RGB colour of an id: strong, distinct from those of nearby ids, the same in every run."""
    hue = 2 * math.pi * ((segment_id * GOLDEN_RATIO + 0.08) % 1.0)
    lightness = LIGHTNESS_CYCLE[segment_id % len(LIGHTNESS_CYCLE)]
    return _oklab_to_rgb(lightness, CHROMA * math.cos(hue), CHROMA * math.sin(hue))


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
