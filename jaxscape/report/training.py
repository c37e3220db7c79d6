"""The figures of a training: loss and accuracy by step, and how the landscape changes with it."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from jaxscape.report import tables
from jaxscape.report.style import COLORS, FAINT, STEPS, settle, styled

_RATIO = 1.25  # steps within this ratio of one another are averaged: as wide everywhere on a logarithmic axis
_AGAINST = {"answer": ("Answers", "the answer"), "subject": ("Subjects", "the subject")}  # title, and in a sentence
_HEAT = {"ari_answer": "Peaks match answers (ARI)", "neighbors_same_answer": "Neighbours share the answer"}


def smoothed(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of the values at steps within a ratio of 1.25, for each of the ascending steps, all [n]."""
    low = np.searchsorted(steps, steps / _RATIO)
    high = np.searchsorted(steps, steps * _RATIO, side="right")
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[high] - sums[low]) / (high - low)


@styled
def training(
    log: Sequence[tables.Row], validation: Sequence[tables.Row], checkpoints: Sequence[tables.Row]
) -> Figure:
    """Draw the training against the step, on a logarithmic axis that begins with step 0, before training.

    Panels: the loss, smoothed; accuracy in training (smoothed), on validation questions and of the checkpoints on the
    test questions; where there are two checkpoints or more, what their peaks and neighbours say of answers, and of
    subjects.

    Args:
      log: step, loss and accuracy of every step.
      validation: step and accuracy_micro; may be empty.
      checkpoints: the table `training`; may be empty.

    Raises ValueError for an empty log.
    """
    if not log:
        raise ValueError("log is empty: nothing to draw")
    followed = len(checkpoints) > 1
    fig = Figure(figsize=(10.2, 6.4 if followed else 3.4), layout="constrained")
    grid = fig.subplots(2 if followed else 1, 2, squeeze=False)
    _loss(grid[0, 0], log)
    _accuracy(grid[0, 1], log, validation, checkpoints)
    if followed:
        for axes, name in zip(grid[1], _AGAINST, strict=True):
            _landscape(axes, name, checkpoints)
        low, high = zip(*(axes.get_ylim() for axes in grid[1]), strict=True)
        for axes in grid[1]:
            axes.set_ylim(min(low), max(high))
    steps = [row["step"] for rows in (log, validation, checkpoints) for row in rows]
    for letter, axes in zip("abcd", grid.flat, strict=False):
        axes.set_title(f"{letter}  {axes.get_title(loc='left')}")
        _step_axis(axes, min(steps), max(steps))
    return settle(fig)


@styled
def training_layers(rows: Sequence[tables.Row], checkpoints: Sequence[tables.Row]) -> Figure:
    """Draw maps of layer x checkpoint: how well the peaks match the answers, and how many neighbours share them.

    Args:
      rows: the layers table; conditions that are no checkpoint are passed over.
      checkpoints: condition and step, in the order to be drawn.

    Raises ValueError if a checkpoint has no row.
    """
    names = [row["condition"] for row in checkpoints]
    layers = sorted({tables.plain(row["layer"]) for row in rows if row["condition"] in names})
    if missing := set(names) - {row["condition"] for row in rows}:
        raise ValueError(f"rows lack the checkpoint(s) {sorted(missing)}")
    fig = Figure(figsize=(10.2, 4.4), layout="constrained")
    for axes, letter, (quantity, title) in zip(fig.subplots(1, 2, sharey=True), "ab", _HEAT.items(), strict=True):
        found = {(row["condition"], row["layer"]): tables.plain(row[quantity]) for row in rows}
        values = np.array([[found.get((name, layer)) for name in names] for layer in layers], float)
        axes.set_facecolor(FAINT)  # where there is no value
        image = axes.pcolormesh(np.ma.masked_invalid(values), cmap="cividis")
        axes.set_xticks(np.arange(len(names)) + 0.5, [str(row["step"]) for row in checkpoints])
        shown = np.arange(len(layers))[:: -(-len(layers) // 12)]
        axes.set_yticks(shown + 0.5, [str(layers[place]) for place in shown])
        axes.set_title(f"{letter}  {title}")
        axes.set_xlabel("step of training")
        axes.grid(False)
        fig.colorbar(image, ax=axes, pad=0.02).outline.set_visible(False)
    fig.axes[0].set_ylabel("layer")
    return settle(fig)


def _column(rows: Sequence[tables.Row], name: str) -> np.ndarray:
    return np.array([tables.plain(row[name]) for row in rows], float)


def _loss(axes, log: Sequence[tables.Row]) -> None:
    steps, losses = _column(log, "step"), _column(log, "loss")
    axes.plot(steps, losses, color=COLORS[0], alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(steps, losses), color=COLORS[0])
    axes.set_title("Loss of the answers")
    axes.set_ylabel("nats")
    axes.set_ylim(0, 1.05 * losses.max())


def _accuracy(axes, log, validation, checkpoints) -> None:
    steps = _column(log, "step")
    shown = smoothed(steps, _column(log, "accuracy"))
    axes.plot(steps, shown, color=COLORS[0], label="training questions, free answer")
    for rows, label, color, marker in ((validation, "validation questions", COLORS[1], "o"),
                                       (checkpoints, "test questions", COLORS[2], "s")):  # fmt: skip
        if rows:
            axes.plot(_column(rows, "step"), _column(rows, "accuracy_micro"), color=color, marker=marker, label=label,
                      linewidth=1.0, markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    axes.set_title("Accuracy")
    axes.set_ylabel("share answered rightly")
    axes.set_ylim(0, 1.02)
    axes.legend(loc="best", fontsize=8)


def _landscape(axes, name: str, checkpoints: Sequence[tables.Row]) -> None:
    title, label = _AGAINST[name]
    for column, text, color, marker, line in (
        (f"best_ari_{name}", f"ARI of peaks and {label}, best layer", COLORS[2], "o", "-"),
        (f"late_ari_{name}", "likewise, mean of the last third of the layers", COLORS[2], "s", "--"),
        (f"late_neighbors_same_{name}", f"neighbours that share {label}, last third", COLORS[4], "^", "-"),
    ):
        axes.plot(_column(checkpoints, "step"), _column(checkpoints, column), color=color, marker=marker,
                  linestyle=line, label=text, markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    axes.set_title(title)
    axes.set_ylabel("ARI, or share of neighbours")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=2, steps=STEPS))
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), max(1.02, axes.get_ylim()[1]))
    axes.legend(loc="best", fontsize=8)


def _step_axis(axes, first: int, last: int) -> None:
    """A logarithmic axis of steps, before which step 0 has a place of its own."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    ticks = [digit * 10**power for power in range(len(str(last))) for digit in (1, 2, 5)]
    if len(ticks) > 10:
        ticks = [10**power for power in range(len(str(last)))]
    axes.xaxis.set_major_locator(FixedLocator([0, *(tick for tick in ticks if tick <= last)] if first == 0 else ticks))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(-0.12 if first == 0 else 0.93 * first, last * 1.08)
    if first == 0:
        axes.axvspan(0.4, 0.6, color="#f1f2f4", zorder=0)  # no step lies between 0 and 1
    axes.set_xlabel("step of training")
