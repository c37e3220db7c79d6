"""How every figure looks: its defaults, its colours, and how it is settled and saved.

Figures are made without pyplot, so nothing is left open and no global backend is chosen. The colours of conditions are
those of Okabe and Ito (2008), which readers with any common colour vision deficiency can tell apart.
"""

import functools
import io
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from jaxscape.report import tables

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, SOFT, FAINT = "#1c1e21", "#5b6169", "#d5d8dc"
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib: the same figure on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a `$` in a subject's name is a dollar
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "svg.hashsalt": "jaxscape",
    "svg.fonttype": "path",
}
STEPS = [1, 2, 5, 10]  # ticks at 1, 2, 5, 10, ... and nothing odder


def styled(function):
    """Run under the defaults of Matplotlib and our style, whatever matplotlibrc or the caller has set."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # leaves the backend alone
            matplotlib.rcParams.update(_STYLE)
            return function(*args, **kwargs)

    return run


@styled
def save(fig: Figure, folder: str | os.PathLike, name: str) -> tuple[Path, Path]:
    """Write `<folder>/<name>.png` (150 dpi) and `.svg`, each by one rename, and close the figure.

    The same figure gives the same bytes: no date, no version, no random ids. Returns the two paths.
    """
    paths = []
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        sink = io.BytesIO()
        fig.savefig(sink, format=suffix, dpi=_STYLE["figure.dpi"], metadata=metadata)
        paths.append(tables.write_file(Path(folder) / f"{name}.{suffix}", sink.getvalue()))
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close(fig)  # ours are not pyplot's; a caller's own figure may be
    return paths[0], paths[1]


@functools.lru_cache
def subject_colors(count: int) -> tuple[str, ...]:
    """`count` colours (hex) as unlike each other as they can be; the first ones are the same for every count.

    After the colours of Okabe and Ito, each next one is the farthest from those before it in OKLab,
    counting both what most readers see and what a reader with deuteranopia sees. Too light, too dark and
    too loud ones are left out.
    """
    steps = np.linspace(0, 1, 14)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    start = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLORS[:6]])
    lightness, *chroma = _perceived(grid)[:, :3].T
    grid = grid[(lightness > 0.36) & (lightness < 0.87) & (np.hypot(*chroma) < 0.2)]
    grid_seen, chosen = _perceived(grid), list(start)
    # Neutral grey stands for "mixed" and "other": keep away from it too.
    avoid = np.concatenate([start, [[0.84, 0.85, 0.86], [0.6, 0.6, 0.6]]])
    distance = np.linalg.norm(grid_seen[:, None] - _perceived(avoid), axis=-1).min(1)
    while len(chosen) < count:
        best = int(distance.argmax())
        chosen.append(grid[best])
        distance = np.minimum(distance, np.linalg.norm(grid_seen - grid_seen[best], axis=-1))
    return tuple("#" + "".join(f"{round(255 * float(v)):02x}" for v in color) for color in chosen[:count])


def _perceived(rgb: np.ndarray) -> np.ndarray:
    """Colours as they look: OKLab (Ottosson 2020) as most see them, and with deuteranopia (Machado et al.
    2009).

    [N, 3] sRGB in 0..1 -> [N, 6] (L, a, b, twice).
    """
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    deuteranopia = np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]])
    to_cones = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    to_lab = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    seen = [linear, np.clip(linear @ deuteranopia.T, 0, 1)]
    return np.concatenate([np.cbrt(color @ to_cones.T) @ to_lab.T for color in seen], axis=-1)


def settle(fig: Figure) -> Figure:
    """Settle the layout for good: one found again at each save moves a little."""
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    return fig


def shade(color: str, weight: float) -> str:
    """The colour (hex) mixed with white: 1 is the colour itself, 0 a light tint of it."""
    part = 0.3 + 0.7 * weight
    mixed = (round(255 - part * (255 - int(color[i : i + 2], 16))) for i in (1, 3, 5))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def short(text: str, length: int) -> str:
    """The text, cut where it is longer than `length`."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
