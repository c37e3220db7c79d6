"""One HTML page with everything a study found, in one file that needs nothing else.

No script, no font, no link to anywhere: figures are inlined as data URIs (as images, so that the ids inside
two SVGs cannot clash), and a content policy in the page forbids the browser to fetch anything at all.
"""

import base64
import html
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxscape.report import tables

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_DPI = 150
_WIDE = 640  # CSS pixels: a figure wider than this takes a row of its own
_PEAK_SCORES = {
    "ari_subject": "ARI with subject",
    "ari_answer": "ARI with answer",
    "ari_prediction": "ARI with prediction",
    "neighbors_same_subject": "Neighbours, same subject",
    "neighbors_same_answer": "Neighbours, same answer",
}
_OF_TRAINING = {
    "step": "Step",
    "accuracy_micro": "Accuracy",
    "best_ari_answer": "ARI, answers: best",
    "late_ari_answer": "late",
    "late_neighbors_same_answer": "Neighbours, answers: late",
    "best_ari_subject": "ARI, subjects: best",
    "late_ari_subject": "late",
    "late_neighbors_same_subject": "Neighbours, subjects: late",
}


class Picture(NamedTuple):
    """A figure of the page: SVG text or PNG bytes, a caption that says what to look at, and what it shows.

    `alt` is for readers who cannot see the image; empty: the caption serves.
    """

    image: str | bytes
    caption: str
    alt: str = ""


def render(
    title: str,
    intro_facts: Mapping[str, Any],
    accuracy_rows: Sequence[tables.Row],
    figures: Sequence[Picture | tuple],
    layer_rows: Sequence[tables.Row],
    notes: Sequence[str] | str = (),
    *,
    provenance: Mapping[str, Any] | None = None,
    subject_rows: Sequence[tables.Row] = (),
    training_rows: Sequence[tables.Row] = (),
) -> str:
    """Return the study as one self-contained HTML page.

    Args:
      title: heading and window title.
      intro_facts: the study in a few facts, e.g. {"Model": "...", "Questions": 2850, "Layers": 28}.
      accuracy_rows: the accuracy table (condition, n_questions, accuracy_micro, accuracy_macro,
        free_accuracy_micro, free_accuracy_macro).
      figures: `Picture`s or tuples (SVG text or PNG bytes, caption[, alt]), in the order to be read.
      layer_rows: the layers table; for each condition the page names the best layer of every score found
        in it (ARI of the peaks, label shared by neighbours). Ties go to the lower layer, missing values are
        skipped.
      notes: paragraphs of plain text: caveats, choices, what was left out.
      provenance: what would be needed to run it again: model, hashes, versions, devices, timing.
      subject_rows: the table of accuracy by subject (condition, subject, n_questions, accuracy); folded away.
      training_rows: the table of checkpoints (condition, step, and numbers).

    Everything is escaped; no argument is taken as HTML. An empty section is left out.

    Raises ValueError if a figure is neither SVG text nor PNG bytes, or a row lacks a column.
    """
    pictures = [Picture(*figure) for figure in figures]
    sections = [
        _section("Accuracy", _accuracy(accuracy_rows) + _by_subject(subject_rows)),
        _section("Training", _training(training_rows)),
        _section("Layer by layer", _figures(pictures)),
        _section("Best layers", _best_layers(layer_rows)),
        _section("Notes", _notes(notes)),
        _section("Provenance", _facts_table(provenance or {})),
    ]
    facts = _facts_list(intro_facts)
    return _PAGE.format(title=_text(title), style=_STYLE, facts=facts, body="".join(sections))


def write(html_text: str, path: str | os.PathLike) -> Path:
    """Write the page as UTF-8 by one rename, making missing folders; returns the path."""
    return tables.write_file(path, html_text.encode())


def _text(value: Any) -> str:
    return html.escape(str(tables.plain(value)), quote=True)


def _section(heading: str, content: str) -> str:
    if not content:
        return ""
    name = heading.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{heading}</h2>\n{content}</section>\n'


def _facts_list(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>\n" for k, v in facts.items())
    return f'<dl class="facts">\n{items}</dl>\n' if items else ""


def _facts_table(facts: Mapping[str, Any]) -> str:
    rows = "".join(f'<tr><th scope="row">{_text(k)}</th><td>{_text(v)}</td></tr>\n' for k, v in facts.items())
    if not rows:
        return ""
    return f'<div class="scroll"><table class="long">\n<tbody>\n{rows}</tbody></table></div>\n'


def _table(caption: str, head: str, rows: Sequence[Sequence[str]]) -> str:
    """A table of escaped cells under an escaped head; a row's first cell names it, the others are numbers."""
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>\n"
        for first, *rest in rows
    )
    # Not <caption>: it takes the table's width, so on a phone it would scroll out of sight with the table.
    return (
        f'<p class="what">{caption}</p>\n<div class="scroll"><table class="numbers">\n'
        f"<thead>{head}</thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def _head(names: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<th scope="col">{name}</th>' for name in names) + "</tr>"


def _get(row: tables.Row, column: str, table: str) -> Any:
    if column not in row:
        raise ValueError(f"{table} lack column {column!r}: {sorted(row)}")
    return tables.plain(row[column])


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}&nbsp;%"


def _accuracy(rows: Sequence[tables.Row]) -> str:
    if not rows:
        return ""
    cells = [
        [
            _text(_get(row, "condition", "accuracy_rows")),
            _text(_get(row, "n_questions", "accuracy_rows")),
            *(_percent(_get(row, f"{kind}accuracy_{over}", "accuracy_rows"))
              for kind in ("", "free_") for over in ("micro", "macro")),
        ]
        for row in rows
    ]
    caption = (
        "Questions answered correctly, over all (micro) and as the mean over subjects (macro): by the likeliest of "
        "the letters, with or without a leading space, and by the likeliest of all tokens (free)."
    )
    return _table(caption, _head(["Condition", "Questions", "Micro", "Macro", "Free, micro", "Free, macro"]), cells)


def _training(rows: Sequence[tables.Row]) -> str:
    if not rows:
        return ""
    names = [name for name in _OF_TRAINING if name in rows[0]]
    cells = []
    for row in rows:
        numbers = (_get(row, name, "training_rows") for name in names)
        cells.append([_text(_get(row, "condition", "training_rows")), *map(_text, map(tables.format_value, numbers))])
    caption = (
        "The test questions asked on the way. Late: mean over the last third of the layers; ARI: adjusted Rand index "
        "between density peaks and labels; neighbours: share that has the same label."
    )
    return _table(caption, _head(["Checkpoint", *(_OF_TRAINING[name] for name in names)]), cells)


def _by_subject(rows: Sequence[tables.Row]) -> str:
    if not rows:
        return ""
    conditions = list(dict.fromkeys(_get(row, "condition", "subject_rows") for row in rows))
    found: dict[str, dict] = {}
    for row in rows:
        subject = found.setdefault(_get(row, "subject", "subject_rows"), {})
        subject[row["condition"]] = _get(row, "accuracy", "subject_rows")
        subject[None] = _get(row, "n_questions", "subject_rows")
    cells = [
        [_text(name.replace("_", " ")), _text(scores[None]), *(_percent(scores.get(c)) for c in conditions)]
        for name, scores in found.items()
    ]
    head = _head(["Subject", "Questions", *map(_text, conditions)])
    table = _table("Share of questions answered correctly, by subject.", head, cells)
    return f"<details>\n<summary>Accuracy by subject ({len(found)} subjects)</summary>\n{table}</details>\n"


def _best_layers(rows: Sequence[tables.Row]) -> str:
    if not rows:
        return ""
    by_condition: dict[str, list] = {}
    for row in rows:
        by_condition.setdefault(_get(row, "condition", "layer_rows"), []).append(row)
    scores = [name for name in _PEAK_SCORES if name in rows[0]]
    cells = []
    for condition, own in by_condition.items():
        line = [_text(condition)]
        depth = max(_get(row, "layer", "layer_rows") for row in own)
        for score in scores:
            known = [(_get(row, score, "layer_rows"), -row["layer"]) for row in own]
            known = [pair for pair in known if pair[0] is not None and not math.isnan(pair[0])]
            value, layer = max(known, default=(None, None))
            line += ["–", "–"] if value is None else [f"{value:.3f}", f"{-layer}&nbsp;/&nbsp;{depth}"]
        cells.append(line)
    groups = "".join(f'<th scope="colgroup" colspan="2">{_PEAK_SCORES[name]}</th>' for name in scores)
    head = f'<tr><th scope="col" rowspan="2">Condition</th>{groups}</tr>'
    head += _head(["best", "layer"] * len(scores))
    caption = (
        "For each condition, the highest value that each score reaches and the layer where it does, out of "
        "all layers. ARI: adjusted Rand index between density peaks and labels (1: identical, 0: chance)."
    )
    return _table(caption, head, cells)


def _notes(notes: Sequence[str] | str) -> str:
    return "".join(f"<p>{_text(note)}</p>\n" for note in ([notes] if isinstance(notes, str) else notes))


def _figures(pictures: Sequence[Picture]) -> str:
    items = []
    for number, picture in enumerate(pictures, start=1):
        uri, width, height = _data_uri(picture.image, number)
        size = f' width="{width}" height="{height}"' if width else ""
        wide = ' class="wide"' if not width or width > _WIDE else ""
        items.append(
            f'<figure{wide}>\n<div class="scroll">'
            f'<img src="{uri}" alt="{_text(picture.alt or picture.caption)}"{size}></div>\n'
            f"<figcaption><b>Figure {number}.</b> {_text(picture.caption)}</figcaption>\n</figure>\n"
        )
    return f'<div class="figures">\n{"".join(items)}</div>\n' if items else ""


def _data_uri(image: str | bytes, number: int) -> tuple[str, int, int]:
    """The image as (data URI, width, height in CSS pixels; 0, 0 where the image does not say)."""
    if isinstance(image, str) and "<svg" in image:
        kind, data, scale = "svg+xml", image.encode(), 96 / 72
        tag = image[image.index("<svg") :].partition(">")[0]
        sides = [re.search(rf'\s{side}="([\d.]+)pt"', tag) for side in ("width", "height")]
        width, height = (float(side[1]) for side in sides) if all(sides) else (0, 0)
    elif isinstance(image, bytes) and image.startswith(_PNG_SIGNATURE):
        kind, data, scale = "png", image, 96 / _PNG_DPI
        width, height = int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")
    else:
        found = f"{type(image).__name__} {image[:20]!r}"
        raise ValueError(f"figure {number} must be SVG text or PNG bytes, got {found}")
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return uri, round(width * scale), round(height * scale)


_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c1e21; --soft: #5b6169; --line: #d9dce0; --paper: #fff; --card: #f5f6f8; --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #a3a9b1; --line: #3a3f46; --paper: #16181b; --card: #202327; }
  :root { --accent: #56b4e9; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.2rem); line-height: 1.2; margin: 0 0 1.2rem; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { max-width: 44rem; }
h1, p, td, th, figcaption { overflow-wrap: break-word; }
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 8.5rem), 1fr)); gap: 1rem 1.5rem;
  margin: 0; padding: 1rem 1.2rem; background: var(--card); border-left: 3px solid var(--accent);
}
dt { color: var(--soft); font-size: .82rem; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.what { color: var(--soft); font-size: .92rem; margin: .8rem 0 0; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .38rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { color: var(--soft); vertical-align: bottom; border-bottom: 2px solid var(--line); }
th { font-weight: 600; }
.numbers td, .numbers thead th:not(:first-child), .numbers thead tr + tr th { text-align: right; }
.numbers td { white-space: nowrap; }
.long td { font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.long th { white-space: nowrap; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 2rem 1.5rem;
}
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure .scroll { margin: 0; }
figure img {
  display: block; max-width: 100%; height: auto; padding: .5rem;
  background: #fff; border: 1px solid var(--line); border-radius: 4px;
}
figcaption { color: var(--soft); font-size: .92rem; padding-top: .6rem; max-width: 52rem; }
figcaption b { color: var(--ink); }
@media (max-width: 40rem) {
  .long th { white-space: normal; }
  th, td { padding: .35rem .5rem; }
  figure.wide img { max-width: none; width: 44rem; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --card: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { padding: .2rem .4rem; }
  .figures { display: block; }
  figure { margin-bottom: 1.5rem; }
  figure, tr { break-inside: avoid; }
  h2, .what { break-after: avoid; }
  figure img, figure.wide img { border: 0; width: auto; max-width: 100%; max-height: 22cm; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src
'unsafe-inline'"> <meta name="generator" content="jaxscape"> <title>{title}</title> <style>{style}</style>
</head> <body> <header> <h1>{title}</h1> {facts}</header> <main> {body}</main> </body> </html>
"""
