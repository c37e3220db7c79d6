"""What came out: tables of scores and accuracies, figures, and the page."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxscape import atlas, landscape
from jaxscape.collect.store import Store
from jaxscape.compare import scores
from jaxscape.errors import InputError
from jaxscape.report import dendrogram, figures, page, style, tables, training

_CURVES = ("intrinsic_dim", "core_fraction", "ari_prediction", "n_peaks", "ari_subject", "ari_answer",
           "neighbors_same_subject", "neighbors_same_answer")
_SOMETIMES = {"training", "training_layers", "dendrogram"}  # figures that not all conditions have


class Finished(NamedTuple):
    """A condition with its stages done.

    Attributes:
      name: of the condition.
      representations: folder of its store.
      landscape: folder of its layers' landscapes.
      step: of training that it was asked after, 0 before training; None: it is no checkpoint.
    """

    name: str
    representations: Path
    landscape: Path
    step: int | None = None


def predictions(folder: Path) -> np.ndarray:
    """int [N] the constrained prediction: the letter with the highest logit, of a condition's stored ones."""
    return np.argmax(Store.open(folder).answer_logits(), axis=1)


def layer_rows(condition: Finished, subjects: np.ndarray, answers: np.ndarray, neighbors: int) -> list[dict]:
    """One row a layer: every column of the layers table.

    Args:
      condition: whose.
      subjects: int [N].
      answers: int [N].
      neighbors: see ``scores.score_layer``.
    """
    predicted = predictions(condition.representations)
    rows = []
    for layer in Store.open(condition.representations).layers:
        found = atlas.read_layer(condition.landscape, layer)
        n_points, kept = int(found["n_points"]), found["kept"]
        if "peaks_labels" not in found:
            row = scores.degenerate_layer(n_points, len(kept))
        else:
            row = scores.score_layer(
                n_points=n_points,
                kept=kept,
                neighbor_indices=found["neighbors"],
                peak_labels=found["peaks_labels"],
                core=found["peaks_core"],
                intrinsic_dim=found["intrinsic_dim"],
                intrinsic_dim_error=found["intrinsic_dim_error"],
                subjects=subjects,
                answers=answers,
                predictions=predicted,
                neighbors=neighbors,
            )
        rows.append({"condition": condition.name, "layer": layer, **row._asdict()})
    return rows


def accuracy_rows(
    conditions: Sequence[Finished], subjects: np.ndarray, answers: np.ndarray, names: Sequence[str]
) -> tuple[list[dict], list[dict]]:
    """Accuracy of each condition, and of each condition and subject: of the letters compared, and of free answers."""
    overall, by_subject = [], []
    for condition in conditions:
        store = Store.open(condition.representations)
        found = scores.accuracy(np.argmax(store.answer_logits(), axis=1), answers, subjects)
        free = scores.accuracy(store.free_answers(), answers, subjects)
        overall.append({"condition": condition.name, "n_questions": len(answers),
                        "accuracy_micro": found.micro, "accuracy_macro": found.macro,
                        "free_accuracy_micro": free.micro, "free_accuracy_macro": free.macro})
        for number, name in enumerate(names):
            by_subject.append({"condition": condition.name, "subject": name,
                               "n_questions": int(np.sum(subjects == number)),
                               "accuracy": found.by_subject[number], "free_accuracy": free.by_subject[number]})
    return overall, by_subject


def best_layers(rows: Sequence[Mapping[str, Any]]) -> list[dict]:
    """For each condition, the highest agreement of its peaks with subjects and with answers, and where it is."""
    summary = []
    for name in dict.fromkeys(row["condition"] for row in rows):
        line = {"condition": name}
        for quantity in ("ari_subject", "ari_answer"):
            of_condition = [r for r in rows if r["condition"] == name and not np.isnan(r[quantity])]
            best = max(of_condition, key=lambda r: r[quantity], default=None)
            line |= {f"best_{quantity}": best and best[quantity], f"{quantity}_layer": best and best["layer"]}
        summary.append(line)
    return summary


def training_rows(conditions: Sequence[Finished], rows: Sequence[Mapping], overall: Sequence[Mapping]) -> list[dict]:
    """One row a checkpoint, by its step: accuracy, and what peaks and neighbours say of answers and of subjects.

    "best" is the highest of all layers, "late" the mean over the last third of them; None where no layer has a value.

    Args:
      conditions: finished ones; those that are no checkpoint are passed over.
      rows: of the layers table.
      overall: of the accuracy table.
    """
    best = {line["condition"]: line for line in best_layers(rows)}
    accuracy = {line["condition"]: line for line in overall}
    table = []
    for condition in sorted((c for c in conditions if c.step is not None), key=lambda c: c.step):
        own = sorted((r for r in rows if r["condition"] == condition.name), key=lambda r: r["layer"])
        late, line = own[-math.ceil(len(own) / 3) :], {"condition": condition.name, "step": condition.step}
        line |= {name: accuracy[condition.name][name] for name in ("accuracy_micro", "accuracy_macro")}
        for label in ("answer", "subject"):
            line |= {name: best[condition.name][name] for name in (f"best_ari_{label}", f"ari_{label}_layer")}
            for name in (f"ari_{label}", f"neighbors_same_{label}"):
                values = [r[name] for r in late if not np.isnan(r[name])]
                line[f"late_{name}"] = float(np.mean(values)) if values else None
        table.append(line)
    return table


def peak_tree(condition: Finished, layer: int, subjects: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Linkage [C - 1, 4] of a layer's peaks, and how many points of each of ``count`` subjects each peak has [C, S]."""
    found = atlas.read_layer(condition.landscape, layer)
    peaks = landscape.Peaks(**{name: found[f"peaks_{name}"] for name in landscape.Peaks._fields})
    density = landscape.Density(found["log_density"], found["log_density_error"], None)
    composition = np.zeros((len(peaks.centers), count), int)
    np.add.at(composition, (peaks.labels, subjects[found["kept"]]), 1)
    return landscape.peak_hierarchy(peaks, density), composition


def dendrogram_figure(wanted: Finished, layer: int, rows, subjects: np.ndarray, names: Sequence[str]):
    """The tree of the peaks of a condition and the caption; None where there is none.

    Args:
      wanted: the condition.
      layer: from 1; 0 is where the peaks match the subjects best.
      rows: of the layers table.
      subjects: int [N].
      names: of the subjects.

    Raises:
      InputError: the layer has no peaks.
    """
    usable = [r for r in rows if r["condition"] == wanted.name and not np.isnan(r["ari_subject"])]
    if not usable:
        return None
    layer = layer or max(usable, key=lambda r: r["ari_subject"])["layer"]
    if layer not in (r["layer"] for r in usable):
        found = ", ".join(str(r["layer"]) for r in usable)
        raise InputError(f"config.report.dendrogram_layer = {layer}: {wanted.name} has peaks in layers {found} only")
    linkage, composition = peak_tree(wanted, layer, subjects, len(names))
    title = f"Density peaks of {wanted.name}, layer {layer}"
    label = "log density below the highest peak"
    spoken = [name.replace("_", " ") for name in names]
    figure = dendrogram.dendrogram(linkage, composition, spoken, title, height_label=label)
    return figure, f"{title}: peaks that meet at a lower height share a higher pass. Colours are subjects."


def write_results(
    conditions: Sequence[Finished],
    *,
    subjects: np.ndarray,
    answers: np.ndarray,
    names: Sequence[str],
    config,
    tree_of: str,
    facts: Mapping[str, Any],
    provenance: Mapping[str, Any],
    training: Path | None,
    results: Path,
    report: Path,
) -> str:
    """Writes every table, figure and the page; returns the summary for the terminal.

    Args:
      conditions: finished ones, in the order of the figures.
      subjects: int [N] subject of each question.
      answers: int [N] right answers.
      names: of the subjects.
      config: the experiment's.
      tree_of: name of the condition whose peaks are drawn as a tree.
      facts: what the page begins with.
      provenance: what the page ends with.
      training: folder of the stage that trained; None where nothing was.
      results: folder of the tables.
      report: folder of the page and the figures.
    """
    rows = [row for c in conditions for row in layer_rows(c, subjects, answers, config.compare.neighbors)]
    overall, by_subject = accuracy_rows(conditions, subjects, answers, names)
    checkpoints = training_rows(conditions, rows, overall) if training else []
    for name, table in (("layers", rows), ("accuracy", overall), ("accuracy_by_subject", by_subject),
                        ("training", checkpoints)):  # fmt: skip
        if table:
            tables.write_table(table, results / name)
        else:
            _remove(results, name)
    wanted = next(c for c in conditions if c.name == tree_of)
    tree = dendrogram_figure(wanted, config.report.dendrogram_layer, rows, subjects, names)
    drawn = training_figures(training, rows, checkpoints) if training else []
    pictures = _save_figures([c.name for c in conditions], rows, tree, drawn, report / "figures")
    html = page.render("Representation landscape", facts, overall, pictures, rows, provenance=provenance,
                       subject_rows=by_subject, training_rows=checkpoints)
    page.write(html, report / "index.html")
    best = {line["condition"]: line for line in best_layers(rows)}
    summary = [{**{k: v for k, v in line.items() if k != "n_questions"}, **best[line["condition"]]} for line in overall]
    return tables.format_text(summary)


def training_figures(folder: Path, rows: Sequence[Mapping], checkpoints: Sequence[Mapping]) -> list[tuple]:
    """(Name, what draws it, caption) of the figures of a training.

    Args:
      folder: of its stage.
      rows: of the layers table.
      checkpoints: of the training table; what needs two of them is left out where there are fewer.
    """
    log, asked = (tables.read_table(folder / name) if (folder / name).is_file() else []
                  for name in ("log.csv", "validation.csv"))  # fmt: skip
    followed = [row for row in checkpoints if row["step"]]
    shown = checkpoints if len(followed) > 1 else []
    caption = "The training, step by step; the line of training questions is averaged over neighbouring steps."
    if any(row["step"] == 0 for row in (*asked, *shown)):
        caption += " Left of the grey band: before training."
    drawn = [("training", lambda: training.training(log, asked, shown), caption)] if log else []
    if shown:
        drawn.append(("training_layers", lambda: training.training_layers(rows, shown),
                      "Each layer (upwards) at each checkpoint (to the right): where and when the answers come."))
    return drawn


def _save_figures(order: Sequence[str], rows, tree, of_training, folder: Path) -> list[page.Picture]:
    drawn = [("overview", figures.overview(rows, conditions=order), "Each layer's peaks and neighbours against "
              "subjects (left) and answers (middle): where a curve is high, the layer is organised that way.")]
    drawn += [(name, draw(), caption) for name, draw, caption in of_training]
    if tree:
        drawn.append(("dendrogram", *tree))
    for quantity in _CURVES:
        caption = f"{figures.QUANTITIES[quantity].title}, layer by layer."
        drawn.append((quantity, figures.curve(rows, quantity, conditions=order), caption))
    pictures = []
    for name, figure, caption in tqdm(drawn, desc="figures", unit="figure"):
        _, svg = style.save(figure, folder, name)
        pictures.append(page.Picture(svg.read_text(), caption))
    for name in _SOMETIMES - {name for name, *_ in drawn}:
        _remove(folder, name)
    return pictures


def _remove(folder: Path, name: str) -> None:
    """Removes a table or a figure of conditions that were asked before and are not now."""
    for suffix in ("csv", "parquet", "png", "svg"):
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)
