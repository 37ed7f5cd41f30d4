"""A heat map of multiples of a uniform share, drawn with its axes' labels and every number in its cell."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_CELL_WIDTH, _CELL_HEIGHT, _GAP, _MARGIN, _FONT_SIZE = 46, 26, 14, 12, 13

_LIMIT = 4.0
"""Where the colours end: a quarter of and four times a uniform share."""

# Diverging, and of like lightness on both sides, so that the eye finds 1 at once: blue below, white, red above.
_ANCHORS = np.array([[33, 78, 138], [122, 170, 213], [247, 247, 247], [234, 148, 112], [158, 30, 42]], np.float64)


def draw_heat_map(values: NDArray[np.float64], rows: Sequence[str], groups: Sequence[str]) -> NDArray[np.uint8]:
    """Draw values on a logarithmic colour scale whose middle is 1.

    Args:
        values: (R, G, C), C columns in each of G groups; NaN is a row without data.
        rows: R labels.
        groups: G labels; the columns of each are numbered from 1.

    Returns:
        An RGB image (height, width, 3).
    """
    font = ImageFont.load_default(_FONT_SIZE)
    num_rows, num_groups, num_columns = values.shape
    left = _MARGIN + math.ceil(max(font.getlength(label) for label in rows)) + _GAP
    top, group_width = _MARGIN + 2 * _CELL_HEIGHT, num_columns * _CELL_WIDTH + _GAP
    # A narrow map still has room for its legend.
    width = max(left + num_groups * group_width - _GAP + _MARGIN, left + 380)
    height = top + num_rows * _CELL_HEIGHT + _GAP + _CELL_HEIGHT + _MARGIN
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)

    def write(x: float, y: float, text: str, anchor: str = "mm", fill: str = "#333333") -> None:
        draw.text((x, y + _CELL_HEIGHT / 2), text, fill=fill, font=font, anchor=anchor)

    def cell(x: int, y: int, value: float) -> None:
        colour = _colour(value)
        draw.rectangle((x, y, x + _CELL_WIDTH - 2, y + _CELL_HEIGHT - 2), fill=colour)
        lightness = np.dot(colour, (0.299, 0.587, 0.114))
        write(x + _CELL_WIDTH / 2 - 1, y - 1, cell_text(value), fill="#ffffff" if lightness < 128 else "#1a1a1a")

    for row, label in enumerate(rows):
        write(left - _GAP / 2, top + row * _CELL_HEIGHT, label, "rm")
    for group, label in enumerate(groups):
        x = left + group * group_width
        write(x + num_columns * _CELL_WIDTH / 2, _MARGIN, label)
        for column in range(num_columns):
            here = x + column * _CELL_WIDTH
            write(here + _CELL_WIDTH / 2, _MARGIN + _CELL_HEIGHT, str(column + 1))
            for row in range(num_rows):
                cell(here, top + row * _CELL_HEIGHT, values[row, group, column])
    legend = top + num_rows * _CELL_HEIGHT + _GAP
    for place, value in enumerate((1 / _LIMIT, 0.5, 1.0, 2.0, _LIMIT)):
        cell(left + place * _CELL_WIDTH, legend, value)
    write(left + 5 * _CELL_WIDTH + _GAP / 2, legend, "times a uniform load", "lm")
    return np.asarray(image)


def cell_text(value: float) -> str:
    """A value as the map and its table show it; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def _colour(value: float) -> tuple[int, int, int]:
    if math.isnan(value):
        return (217, 217, 217)
    place = math.log(min(max(value, 1 / _LIMIT), _LIMIT), _LIMIT)  # -1 .. 1
    anchors = np.linspace(-1, 1, len(_ANCHORS))
    red, green, blue = (round(float(np.interp(place, anchors, channel))) for channel in _ANCHORS.T)
    return red, green, blue
