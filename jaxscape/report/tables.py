"""Rows of results, written as CSV for people and Parquet for programs, and printed for the terminal.

A table is a sequence of rows; a row maps column names to str, bool, int, float or None (NumPy and JAX
scalars are taken as the number they hold). The study writes four, the last where something was trained:

    layers               condition, layer (1: the first block's), n_points, n_duplicates, intrinsic_dim,
                         intrinsic_dim_error, n_peaks, core_fraction, ari_subject, ari_answer,
                         ari_prediction, neighbors_same_subject, neighbors_same_answer
    accuracy             condition, n_questions, accuracy_micro, accuracy_macro (of the likeliest letter),
                         free_accuracy_micro, free_accuracy_macro (of the likeliest token of all)
    accuracy_by_subject  condition, subject, n_questions, accuracy, free_accuracy
    training             condition, step (0: before training), accuracy_micro, accuracy_macro; of "answer", then of
                         "subject": best_ari_*, ari_*_layer, and over the last third of the layers late_ari_*,
                         late_neighbors_same_*

Both files hold the same values to the last bit, and the same rows always give the same bytes.
"""

import math
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = Mapping[str, Any]

_ARROW_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
# One cell of a CSV file and what ends it: a quoted text with "" for a quote, or anything bare.
_CELL = re.compile(r'(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r?\n|\Z)')
_INTEGER = re.compile(r"-?\d+")


def write_file(path: str | os.PathLike, data: bytes) -> Path:
    """Write `data` beside `path` and rename it into place: a reader meets the old file or the new one.

    Makes missing folders. Returns the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_table(rows: Sequence[Row], path_without_suffix: str | os.PathLike) -> tuple[Path, Path]:
    """Write `rows` to `<path>.csv` and `<path>.parquet`; columns stand in the order of the first row.

    A column that mixes int and float is a float column; None is a missing value, told apart from NaN in
    both files (in CSV an empty cell, against `nan`; an empty text is `""`).

    Returns the two paths. Raises ValueError if there are no rows, if a row's columns differ from the first
    row's (named), or if a column holds values of kinds that do not go together.
    """
    columns = _columns(rows)
    text = _csv_text(columns)
    table = pa.table({name: pa.array(values, _ARROW_TYPES[kind]) for name, (kind, values) in columns.items()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)

    base = os.fspath(path_without_suffix)  # not with_suffix: a name such as `layers-z1.6` keeps its dot
    csv = write_file(base + ".csv", text.encode())
    return csv, write_file(base + ".parquet", sink.getvalue().to_pybytes())


def read_table(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read back a table that `write_table` wrote, from its `.parquet` or its `.csv`, as a list of rows.

    Raises ValueError for another suffix, or a CSV whose rows are not all as long as its header.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        # From bytes, not from the path: a folder named `condition=...` above would add a partition column.
        return pq.read_table(pa.BufferReader(path.read_bytes())).to_pylist()
    if path.suffix != ".csv":
        raise ValueError(f"path must end in .csv or .parquet, got {str(path)!r}")
    header, *records = _csv_records(path.read_bytes().decode(), path)
    for number, record in enumerate(records, start=1):
        if len(record) != len(header):
            raise ValueError(f"{path}: row {number} has {len(record)} cells, the header {len(header)}")
    return [dict(zip(header, record, strict=True)) for record in records]


def format_text(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Lay out `rows` as an aligned plain-text table for the terminal, without a final newline.

    `columns` picks and orders the columns (default: all, as in the first row). Floats show three decimals,
    missing values a dash; numbers stand to the right, text to the left. No rows give "(no rows)".

    Raises ValueError if a row lacks one of the columns.
    """
    if not rows:
        return "(no rows)"
    columns = list(rows[0]) if columns is None else list(columns)
    for number, row in enumerate(rows):
        if missing := [name for name in columns if name not in row]:
            raise ValueError(f"rows[{number}] lacks column(s) {', '.join(missing)}")
    lines = []
    for name in columns:
        values = [plain(row[name]) for row in rows]
        left = any(isinstance(value, str) for value in values)
        cells = [name, *map(format_value, values)]
        width = max(map(len, cells))
        cells.insert(1, "-" * width)
        lines.append([cell.ljust(width) if left else cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*lines, strict=True))


def format_value(value: Any) -> str:
    """One value as short text: floats to three decimals (two digits below 0.0005), None as a dash."""
    value = plain(value)
    if value is None:
        return "-"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"
    return " ".join(str(value).split()) if isinstance(value, str) else str(value)


def plain(value: Any) -> Any:
    """The Python scalar inside a NumPy or JAX scalar; anything else as it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def _columns(rows: Sequence[Row]) -> dict[str, tuple[type, list]]:
    """Column name -> (str, bool, int or float; its values, each None or of that type)."""
    if not rows:
        raise ValueError("rows is empty: a table needs one row at least, for its columns")
    names = list(rows[0])
    for number, row in enumerate(rows):
        missing, extra = [n for n in names if n not in row], [n for n in row if n not in rows[0]]
        if missing or extra:
            raise ValueError(f"rows[{number}] differs from rows[0]: lacks {missing}, adds {extra}")
    columns = {}
    for name in names:
        values = [plain(row[name]) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if kinds <= {int, float}:
            kind = int if kinds == {int} else float  # nothing but None: a float column without a value
        elif len(kinds) == 1 and kinds <= {str, bool}:
            kind = kinds.pop()
        else:
            found = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"column {name!r} must be all str, all bool, or int and float; got {found}")
        columns[name] = kind, [None if value is None else kind(value) for value in values]
    return columns


def _csv_text(columns: Mapping[str, tuple[type, list]]) -> str:
    # Not pyarrow.csv: it writes 1.0 as 1 and -0.0 as -0, so a column of whole floats comes back as integers.
    cells = [[_csv_cell(cell) for cell in (name, *values)] for name, (_, values) in columns.items()]
    return "".join(",".join(line) + "\n" for line in zip(*cells, strict=True))


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return '"' + value.replace('"', '""') + '"'
    return str(value).lower() if isinstance(value, bool) else repr(value)  # repr reads back to the bit


def _csv_records(text: str, path: Path) -> list[list[Any]]:
    records, record, position = [], [], 0
    while position < len(text):
        cell = _CELL.match(text, position)
        if cell is None:
            line = text.count("\n", 0, position) + 1
            raise ValueError(f"{path}: line {line} is not CSV: {text[position : position + 40]!r}")
        quoted, bare, end = cell.groups()
        record.append(_csv_value(bare) if quoted is None else quoted.replace('""', '"'))
        if end != ",":
            records.append(record)
            record = []
        position = cell.end()
    if not records:
        raise ValueError(f"{path}: empty file")
    return records


def _csv_value(bare: str) -> Any:
    if bare == "":
        return None
    if bare in ("true", "false"):
        return bare == "true"
    if _INTEGER.fullmatch(bare):
        return int(bare)
    try:
        return float(bare)
    except ValueError:
        return bare  # text without quotes: the file was edited by other hands
