"""The study's figures of layers: a quantity against the layers, and the overview.

A condition keeps its colour and marker in every figure that is given the same `conditions`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from jaxscape.report import tables
from jaxscape.report.style import COLORS, STEPS, settle, shade, styled


class Quantity(NamedTuple):
    """How a column of the layers table is shown.

    The axis reaches at least from `low` to `high` (None: as far as the data goes) and never cuts data off.
    """

    title: str
    label: str
    low: float | None = 0.0
    high: float | None = None
    error: str | None = None  # the column with its standard error, shown as a band
    whole: bool = False  # a count: ticks at whole numbers only


QUANTITIES = {
    "n_points": Quantity("Points", "points", whole=True),
    "n_duplicates": Quantity("Duplicate points left out", "points", whole=True),
    "intrinsic_dim": Quantity("Intrinsic dimension", "dimension", error="intrinsic_dim_error"),
    "intrinsic_dim_error": Quantity("Error of the intrinsic dimension", "standard error"),
    "n_peaks": Quantity("Density peaks", "number of peaks", whole=True),
    "core_fraction": Quantity("Points in the peaks' cores", "fraction of points", high=1.0),
    "ari_subject": Quantity("Peaks match subjects", "ARI (peaks, subjects)"),
    "ari_answer": Quantity("Peaks match answers", "ARI (peaks, answers)"),
    "ari_prediction": Quantity("Peaks match predictions", "ARI (peaks, predictions)"),
    "neighbors_same_subject": Quantity("Neighbours share the subject", "fraction of neighbours"),
    "neighbors_same_answer": Quantity("Neighbours share the answer", "fraction of neighbours"),
}
# Rows of panels; the first two of a row measure the same thing against two labels and share their scale.
OVERVIEW = (
    ("ari_subject", "ari_answer", "n_peaks"),
    ("neighbors_same_subject", "neighbors_same_answer", "intrinsic_dim"),
)

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":")


@styled
def curve(rows: Sequence[tables.Row], quantity: str, *, conditions: Sequence[str] | None = None) -> Figure:
    """Draw one quantity against the layer, a line per condition, with its error band where it has one.

    Args:
      rows: the layers table, in any order; None and NaN leave a gap.
      quantity: a key of `QUANTITIES`.
      conditions: the conditions in the order that fixes colours and markers (default: as they first appear in
        `rows`); those without rows keep their colour and are not drawn.

    Raises ValueError for no rows, an unknown quantity or condition, a missing column, or a layer met twice.
    """
    styles = _line_styles(rows, conditions)
    fig = Figure(figsize=(6.4, 3.7), layout="constrained")
    axes = fig.add_subplot()
    lines = _draw(axes, rows, quantity, styles)
    axes.set_xlabel("layer")
    return _finish(fig, lines)


@styled
def overview(rows: Sequence[tables.Row], *, conditions: Sequence[str] | None = None) -> Figure:
    """Draw the study in one figure: the panels of `OVERVIEW` (2 x 3), one legend.

    The two ARI panels share their scale, and so do the two neighbour panels. Arguments and errors as in
    `curve`.
    """
    styles = _line_styles(rows, conditions)
    fig = Figure(figsize=(10.2, 5.8), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.05)
    grid = fig.subplots(2, 3, sharex=True)
    letters = iter("abcdef")
    for panels, quantities in zip(grid, OVERVIEW, strict=True):
        for axes, quantity in zip(panels, quantities, strict=True):
            lines = _draw(axes, rows, quantity, styles)
            axes.set_title(f"{next(letters)}  {QUANTITIES[quantity].title}")
        low, high = zip(*(axes.get_ylim() for axes in panels[:2]), strict=True)
        for axes in panels[:2]:
            axes.set_ylim(min(low), max(high))
    for axes in grid[-1]:
        axes.set_xlabel("layer")
    return _finish(fig, lines)


def _line_styles(rows: Sequence[tables.Row], conditions: Sequence[str] | None) -> dict[str, dict]:
    if not rows:
        raise ValueError("rows is empty: nothing to draw")
    present = list(dict.fromkeys(_value(row, "condition") for row in rows))
    conditions = present if conditions is None else list(conditions)
    if unknown := [name for name in present if name not in conditions]:
        raise ValueError(f"rows hold conditions that are not among `conditions`: {unknown}")
    looks = _looks(conditions)
    return {name: looks[name] for name in conditions if name in present}


def _looks(conditions: Sequence[str]) -> dict[str, dict]:
    """Colour, marker and dashes of each condition.

    Checkpoints of a training ("sft@40", and "sft", the last) are shades of one colour, the later the darker, and only
    the last one has markers.
    """
    stems = list(dict.fromkeys(name.partition("@")[0] for name in conditions))
    looks = {}
    for i, stem in enumerate(stems):
        look = {
            "color": COLORS[i % len(COLORS)],
            "marker": _MARKERS[(i + i // len(COLORS)) % len(_MARKERS)],
            "linestyle": _DASHES[i // len(COLORS) % len(_DASHES)],
        }
        own = _checkpoints(stem, conditions)
        for number, name in enumerate(own[:-1]):
            color = shade(look["color"], number / (len(own) - 1))
            looks[name] = look | {"color": color, "marker": "", "linewidth": 1.2}
        looks[own[-1]] = look
    return looks


def _checkpoints(stem: str, conditions: Sequence[str]) -> list[str]:
    """The conditions that are `stem` or "`stem`@<step>", by the step; `stem` itself is the last."""
    own = [name for name in conditions if name.partition("@")[0] == stem]
    return sorted(own, key=lambda name: float(name.partition("@")[2] or math.inf))


def _value(row: tables.Row, column: str):
    if column not in row:
        raise ValueError(f"rows lack column {column!r}: {sorted(row)}")
    return tables.plain(row[column])


def _series(rows: Sequence[tables.Row], condition: str, *columns: str) -> tuple[np.ndarray, ...]:
    """The condition's layers, ascending, and the columns' values there, as float arrays; None becomes NaN."""
    own = sorted((row for row in rows if row["condition"] == condition), key=lambda row: _value(row, "layer"))
    layers = np.array([_value(row, "layer") for row in own], float)
    if len(np.unique(layers)) < len(layers):
        raise ValueError(f"rows hold a layer of condition {condition!r} twice")
    return layers, *(np.array([_value(row, column) for row in own], float) for column in columns)


def _draw(axes, rows: Sequence[tables.Row], quantity: str, styles: dict[str, dict]) -> list[Line2D]:
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity must be one of {', '.join(QUANTITIES)}; got {quantity!r}")
    shown = QUANTITIES[quantity]
    lines = []
    for condition, style in styles.items():
        layers, values = _series(rows, condition, quantity)
        marked = _marked(values, len(lines), len(styles))
        lines += axes.plot(
            layers,
            values,
            label=condition,
            markevery=marked,
            markeredgecolor="white",
            markeredgewidth=0.6,
            **style,
        )
        if shown.error and any(shown.error in row for row in rows):
            _, errors = _series(rows, condition, shown.error)
            color = style["color"]
            axes.fill_between(layers, values - errors, values + errors, color=color, alpha=0.18, linewidth=0)
    axes.set_title(shown.title)
    axes.set_ylabel(shown.label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1, steps=STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=shown.whole, min_n_ticks=2, steps=STEPS))
    axes.margins(x=0.02, y=0.03)
    low, high = axes.dataLim.intervaly if np.isfinite(axes.dataLim.intervaly).all() else (0.0, 1.0)
    low = low if shown.low is None else min(shown.low, low)
    high = high if shown.high is None else max(shown.high, high)
    margin = 0.03 * (high - low or 1.0)  # against the frame a line would be cut in half
    axes.set_ylim(low - margin, high + margin)
    return lines


def _marked(values: np.ndarray, number: int, total: int) -> list[int]:
    """Where a line has its markers: on each of 80 layers they would hide it, so on 16 or so.

    Lines start in turn, so that one upon another shows the markers of both; a value between two gaps has
    its own.
    """
    every = max(1, math.ceil(len(values) / 16))
    gap = np.pad(np.isnan(values), 1, constant_values=True)
    alone = ~gap[1:-1] & gap[:-2] & gap[2:]
    return np.flatnonzero(alone | (np.arange(len(values)) % every == number * every // total)).tolist()


def _finish(fig: Figure, lines: Sequence[Line2D]) -> Figure:
    """Add the legend, in which of many checkpoints the first, one between and the last stand for all."""
    by_name = {line.get_label(): line for line in lines}
    for stem in {name.partition("@")[0] for name in by_name}:
        own = _checkpoints(stem, list(by_name))
        for name in set(own) - {own[0], own[len(own) // 2], own[-1]} if len(own) > 4 else ():
            del by_name[name]
    spacing = {"ncols": min(len(by_name), 6), "handlelength": 2.4, "columnspacing": 1.8}
    fig.legend(by_name.values(), by_name, loc="outside upper center", **spacing)
    return settle(fig)
