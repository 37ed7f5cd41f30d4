"""The heat map's cells have the colours and its size the room that its values ask for."""

import numpy as np
import pytest

from recsys.training.heatmap import cell_text, draw_heat_map


def colours(image: np.ndarray) -> set[tuple[int, ...]]:
    """Those that fill some area, not only the edges of letters."""
    found, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(map(int, colour)) for colour, count in zip(found, counts, strict=True) if count > 300}


WHITE, MIDDLE, LOWEST, HIGHEST, NO_DATA = (255,) * 3, (247,) * 3, (33, 78, 138), (158, 30, 42), (217,) * 3


@pytest.mark.parametrize(
    ("value", "colour"), [(0.0, LOWEST), (0.2, LOWEST), (9.0, HIGHEST), (1.0, MIDDLE), (float("nan"), NO_DATA)]
)
def test_values_have_their_colours(value: float, colour: tuple[int, ...]) -> None:
    image = draw_heat_map(np.full((1, 1, 20), value), ["all"], ["layer 1"])
    cells = image[: image.shape[0] // 2 + 8]  # without the legend
    assert colours(cells) == {WHITE, colour}


def test_halves_and_doubles_lie_between() -> None:
    found = colours(draw_heat_map(np.array([[[0.5, 2.0]]]), ["all"], ["layer 1"]))
    assert {(122, 170, 213), (234, 148, 112)} <= found


def test_size_follows_rows_columns_groups_and_labels() -> None:
    def size(rows: int, groups: int, columns: int, label: str = "home") -> tuple[int, ...]:
        image = draw_heat_map(np.ones((rows, groups, columns)), [label] * rows, ["layer"] * groups)
        assert image.dtype == np.uint8
        return image.shape

    height, width, channels = size(2, 2, 8)
    assert channels == 3
    assert size(3, 2, 8)[0] > height
    assert size(2, 3, 8)[1] > width
    assert size(2, 2, 9)[1] > width
    assert size(2, 2, 8, "a surface of a longer name")[1] > width


def test_cells_tell_their_value() -> None:
    assert [cell_text(value) for value in (1.0, 0.126, 12.3, float("nan"))] == ["1.00", "0.13", "12.30", "-"]
