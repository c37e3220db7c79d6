import math

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from jaxscape.report import figures


def layer_rows(n_layers=6, conditions=("0shot", "sft")):
    rng = np.random.default_rng(0)
    floats = [name for name in figures.QUANTITIES if not name.startswith("n_")]
    return [
        {
            "condition": c,
            "layer": layer,
            "n_points": 90,
            "n_duplicates": 0,
            "n_peaks": int(rng.integers(1, 9)),
        }
        | {name: float(rng.random()) for name in floats}
        for layer in range(n_layers, 0, -1)
        for c in conditions
    ]


@pytest.mark.parametrize("quantity", figures.QUANTITIES)
def test_lines_hold_the_table(quantity):
    rows = layer_rows()
    rows[3][quantity] = None
    (axes,) = figures.curve(rows, quantity).axes
    assert [line.get_label() for line in axes.lines] == ["0shot", "sft"]
    low, high = axes.get_ylim()
    for line in axes.lines:
        own = sorted((r for r in rows if r["condition"] == line.get_label()), key=lambda r: r["layer"])
        np.testing.assert_array_equal(line.get_xdata(), [r["layer"] for r in own])
        expected = [math.nan if r[quantity] is None else r[quantity] for r in own]
        np.testing.assert_array_equal(line.get_ydata(), expected)
        assert low < np.nanmin(expected) and np.nanmax(expected) < high
    assert axes.get_xlabel() == "layer" and axes.get_ylabel() == figures.QUANTITIES[quantity].label


def test_intrinsic_dimension_has_its_error_band():
    rows = layer_rows(conditions=("0shot",))
    (axes,) = figures.curve(rows, "intrinsic_dim").axes
    (band,) = [c for c in axes.collections if isinstance(c, PolyCollection)]
    own = sorted(rows, key=lambda r: r["layer"])
    edges = {(r["layer"], r["intrinsic_dim"] + s * r["intrinsic_dim_error"]) for r in own for s in (-1, 1)}
    drawn = {tuple(vertex) for path in band.get_paths() for vertex in path.vertices.tolist()}
    assert edges <= drawn


def test_a_condition_keeps_its_style_when_others_are_absent():
    rows, names = layer_rows(), ["0shot", "5shot", "sft"]
    whole = figures.curve(layer_rows(conditions=names), "n_peaks").axes[0].lines
    part = figures.curve(rows, "n_peaks", conditions=names).axes[0].lines
    for line, twin in ((part[0], whole[0]), (part[1], whole[2])):
        assert (line.get_color(), line.get_marker()) == (twin.get_color(), twin.get_marker())
    with pytest.raises(ValueError, match="5shot"):
        figures.curve(layer_rows(conditions=names), "n_peaks", conditions=["0shot", "sft"])


def test_a_value_between_gaps_is_marked():
    values = np.array([np.nan, 1.0, np.nan, *range(60)])
    assert 1 in figures._marked(values, 0, 2) and len(figures._marked(values, 0, 2)) < 20


def test_overview_shows_six_panels_and_shares_the_scale_of_a_pair():
    fig = figures.overview(layer_rows())
    expected = [figures.QUANTITIES[name].label for row in figures.OVERVIEW for name in row]
    assert [axes.get_ylabel() for axes in fig.axes] == expected
    for first, second in ((0, 1), (3, 4)):
        assert fig.axes[first].get_ylim() == fig.axes[second].get_ylim()
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["0shot", "sft"]


def test_curve_refuses():
    rows = layer_rows()
    with pytest.raises(ValueError, match="quantity must be one of.*'ari'"):
        figures.curve(rows, "ari")
    with pytest.raises(ValueError, match="layer of condition 'sft' twice"):
        figures.curve([*rows, rows[-1]], "n_peaks")
    with pytest.raises(ValueError, match="lack column 'n_peaks'"):
        figures.curve([{"condition": "a", "layer": 1}], "n_peaks")
    with pytest.raises(ValueError, match="empty"):
        figures.overview([])


def test_checkpoints_are_shades_of_one_colour_the_last_one_marked():
    names = ["0shot", "sft@2", "sft@10", "sft@30", "sft@60", "sft"]
    fig = figures.curve(layer_rows(conditions=names), "n_peaks")
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    plain = {line.get_label(): line for line in figures.curve(layer_rows(), "n_peaks").axes[0].lines}
    assert lines["sft"].get_color() == plain["sft"].get_color() != lines["0shot"].get_color()
    assert lines["sft"].get_marker() == plain["sft"].get_marker()
    brightness = [sum(int(lines[name].get_color()[i : i + 2], 16) for i in (1, 3, 5)) for name in names[1:]]
    assert sorted(brightness, reverse=True) == brightness and len(set(brightness)) == 5
    assert {lines[name].get_marker() for name in names[1:-1]} == {""}
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["0shot", "sft@2", "sft@30", "sft"]
    # in whatever order they are named
    turned = figures.curve(layer_rows(conditions=names), "n_peaks", conditions=["0shot", "sft", *names[4:0:-1]])
    assert {line.get_label(): line.get_color() for line in turned.axes[0].lines} == {
        name: line.get_color() for name, line in lines.items()
    }
