"""The tree of one layer's density peaks, and what each of them is made of."""

from collections.abc import Sequence

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from scipy.cluster import hierarchy

from jaxscape.report.style import FAINT, SOFT, STEPS, short, styled, subject_colors


@styled
def dendrogram(
    linkage: np.ndarray | None,
    composition: np.ndarray,
    subject_names: Sequence[str],
    title: str,
    *,
    height_label: str = "height of the merge",
    max_peaks: int = 60,
) -> Figure:
    """Draw the hierarchy of a layer's density peaks, and which subjects each peak is made of.

    Three columns, one line per peak: the tree, its branches coloured by the subject they hold most of (grey
    where the two sides differ); a bar with the shares of the peak's subjects, the largest first; the
    majority subject, with the peak's size and purity. A subject keeps its colour for the same
    `subject_names`.

    Args:
      linkage: [C-1, 4] float, SciPy linkage of the peaks; a height that is not finite (no saddle between
        the two sides) is drawn beyond the highest finite one. With one peak, [0, 4] or None.
      composition: [C, S] counts >= 0, points of each subject in each peak.
      subject_names: [S] names; underscores are shown as spaces.
      title: what is shown, e.g. "5shot, layer 12".
      height_label: what the heights measure, with the unit.
      max_peaks: where there are more, only the largest are shown, and the figure says so.

    Raises ValueError if a shape does not fit, a count or height is negative, or the linkage is not one.
    """
    counts, merges = _checked(linkage, composition, subject_names, max_peaks)
    total = len(counts)
    if total > max_peaks:
        kept = np.sort(np.argsort(-counts.sum(1), kind="stable")[:max_peaks])
        counts, merges = counts[kept], _prune(merges, total, kept)
        title = f"{title} (the {max_peaks} largest of {total} peaks)"
    order = hierarchy.leaves_list(merges) if len(counts) > 1 else np.zeros(1, int)
    names = [str(name).replace("_", " ") for name in subject_names]
    palette = subject_colors(len(names))
    legend = _legend_subjects(counts)
    labels = [_leaf_label(counts[leaf], names) for leaf in order]
    label_width = 0.2 + 0.062 * max(36, *map(len, labels))  # inches

    pitch = 0.23 if len(order) <= 40 else 0.19
    height, width = pitch * len(order), 9.4
    legend_rows = -(-(len(legend) + 1) // 4)
    top, bottom = 0.62, 0.75 + 0.165 * legend_rows
    whole = top + height + bottom
    fig = Figure(figsize=(width, whole))
    left, gap, bar_width = 0.25, 0.18, 2.2
    tree_width = width - left - gap - bar_width - label_width
    box = [left / width, bottom / whole, tree_width / width, height / whole]
    tree = fig.add_axes(box)
    bars = fig.add_axes([(left + tree_width + gap) / width, box[1], bar_width / width, box[3]], sharey=tree)
    _draw_tree(tree, merges, counts, order, palette, height_label)
    _draw_bars(bars, counts[order], labels, legend, palette)
    fig.text(left / width, 1 - 0.13 / whole, short(title, 90), fontsize=11, fontweight="bold", va="top")
    handles = [Patch(color=palette[subject], label=short(names[subject], 30)) for subject in legend]
    if (_others(counts, legend) > 0).any():
        handles.append(Patch(color=FAINT, label="other subjects"))
    corner = (left / width, (bottom - 0.58) / whole)
    compact = {
        "fontsize": 7.5,
        "handlelength": 1,
        "handleheight": 0.9,
        "columnspacing": 1.2,
        "borderaxespad": 0,
    }
    fig.legend(handles=handles, ncols=4, loc="upper left", bbox_to_anchor=corner, **compact)
    return fig


def _checked(linkage, composition, subject_names, max_peaks) -> tuple[np.ndarray, np.ndarray]:
    counts = np.asarray(composition, float)
    if counts.ndim != 2 or not counts.size or counts.shape[1] != len(subject_names):
        raise ValueError(f"composition must be [C >= 1, {len(subject_names)} subjects], got {counts.shape}")
    if not (counts >= 0).all():
        raise ValueError("composition holds a count that is negative or NaN")
    if max_peaks < 1:
        raise ValueError(f"max_peaks must be at least 1, got {max_peaks}")
    merges = np.zeros((0, 4)) if linkage is None else np.array(linkage, float).reshape(-1, 4)
    if len(merges) != len(counts) - 1:
        raise ValueError(
            f"linkage must be [{len(counts) - 1}, 4] with {len(counts)} peaks, got {merges.shape}"
        )
    if len(merges):
        heights = merges[:, 2]
        finite = heights[np.isfinite(heights)]
        heights[~np.isfinite(heights)] = 1.15 * finite.max() if finite.size and finite.max() > 0 else 1.0
        hierarchy.is_valid_linkage(merges, throw=True, name="linkage")
    return counts, merges


def _prune(merges: np.ndarray, total: int, kept: np.ndarray) -> np.ndarray:
    """The linkage of the peaks `kept` only: a merge with a side that has none left is passed over."""
    node = dict.fromkeys(range(total)) | {int(old): new for new, old in enumerate(kept)}
    sizes = dict.fromkeys(range(len(kept)), 1)
    pruned = []
    for step, (a, b, height, _) in enumerate(merges):
        sides = [side for side in (node[int(a)], node[int(b)]) if side is not None]
        if len(sides) == 2:
            new = len(kept) + len(pruned)
            sizes[new] = sizes[sides[0]] + sizes[sides[1]]
            pruned.append([*sorted(sides), height, sizes[new]])
            sides = [new]
        node[total + step] = sides[0] if sides else None
    return np.array(pruned, float).reshape(-1, 4)


def _draw_tree(axes, merges, counts, order, palette, height_label) -> None:
    """Root at the left, leaves at the right; y is the position of a leaf from the top."""
    n = len(counts)
    place = np.empty(n)
    place[order] = np.arange(n)
    place, heights = list(place), [0.0] * n
    subject = [int(row.argmax()) if row.any() else -1 for row in counts]
    segments, colors = [], []

    def segment(x0, y0, x1, y1, who):
        segments.append([(x0, y0), (x1, y1)])
        colors.append("#999999" if who < 0 else palette[who])

    for a, b, height, _ in merges:
        a, b = int(a), int(b)
        subject.append(subject[a] if subject[a] == subject[b] else -1)
        place.append((place[a] + place[b]) / 2)
        heights.append(height)
        middle = place[-1]
        for side in (a, b):
            segment(heights[side], place[side], height, place[side], subject[side])
            segment(height, place[side], height, middle, subject[-1])
    reach = max(heights) or 1.0
    segment(heights[-1], place[-1], 1.04 * reach, place[-1], subject[-1])
    axes.add_collection(LineCollection(segments, colors=colors, linewidths=1.5, capstyle="projecting"))
    axes.set_xlim(1.06 * reach, 0)
    axes.set_ylim(n - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.spines["left"].set_visible(False)
    axes.set_title("Peaks", fontsize=8.5, color=SOFT, fontweight="normal")
    if n > 1:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=STEPS))
        axes.set_xlabel(height_label)
    else:
        axes.tick_params(axis="x", bottom=False, labelbottom=False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(False)


def _legend_subjects(counts: np.ndarray) -> list[int]:
    """Subjects drawn in their own colour: the majority of a peak, or a twentieth of one at least."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return sorted({*np.flatnonzero((shares >= 0.05).any(0)).tolist(), *shares.argmax(1).tolist()})


def _others(counts: np.ndarray, legend: Sequence[int]) -> np.ndarray:
    return counts.sum(1) - counts[:, legend].sum(1)


def _draw_bars(axes, counts, labels, legend, palette) -> None:
    sizes, edge = np.maximum(counts.sum(1), 1), {"edgecolor": "white", "linewidth": 0.4}
    for place, (row, size) in enumerate(zip(counts, sizes, strict=True)):
        start = 0.0
        for subject in sorted(legend, key=lambda s: (-row[s], s)):
            if row[subject]:
                share = row[subject] / size
                axes.barh(place, share, 0.72, start, color=palette[subject], **edge)
                start += share
    others = _others(counts, legend) / sizes
    axes.barh(np.arange(len(counts)), others, 0.72, 1 - others, color=FAINT, **edge)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100 %"])
    for tick, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
        tick.set_horizontalalignment(side)
    axes.set_xlabel("share of the peak's points")
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.set_title("Composition", fontsize=8.5, color=SOFT, fontweight="normal")
    small = 8 if len(labels) <= 40 else 7
    for place, label in enumerate(labels):
        axes.annotate(label, (1, place), (6, 0), textcoords="offset points", va="center", fontsize=small)
    header = {"fontsize": 8.5, "color": SOFT, "textcoords": "offset points"}
    axes.annotate("Majority subject (points, purity)", (1, 1), (6, 6), "axes fraction", **header)


def _leaf_label(row: np.ndarray, names: Sequence[str]) -> str:
    size = row.sum()
    if not size:
        return "no points"
    return f"{short(names[int(row.argmax())], 36)} ({size:.0f}, {100 * row.max() / size:.0f} %)"
