"""Tables that grow by a row a step, in files that a resumed run continues to the same bytes."""

import csv
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxscape.workspace import write_bytes

_ARROW = {int: pa.int64(), float: pa.float64(), str: pa.string()}


class Log:
    """A CSV file, a row appended at a time and handed to the system at once, so that it can be followed.

    Floats are written so that they read back to the bit. Rows are in the order of their first column, ``step``.

    Attributes:
      path: of the file.
      rows: all of them, as read back or appended.
    """

    def __init__(self, path: Path, columns: Mapping[str, type], upto: int):
        """Opens a log, and drops the rows of steps after ``upto``, and a last line that was torn.

        Args:
          path: of the file; it is made where there is none, or where there is another table.
          columns: name -> int, float or str.
          upto: the last step whose rows stay; below 0: none do.
        """
        self.path, self._columns = path, columns
        kept, self.rows = _read(path, columns, upto)
        if kept:
            os.truncate(path, kept)
        else:
            write_bytes(path, _line(columns))
        self._file = path.open("ab", buffering=0)

    def append(self, row: Mapping) -> None:
        """Adds a row.

        Raises:
          OSError: it cannot be written.
        """
        line = _line([row[name] for name in self._columns])
        if self._file.write(line) != len(line):
            raise OSError("No space left on device")  # a disk that is all but full takes a part
        self.rows.append(dict(row))

    def sync(self) -> None:
        """Waits until all rows are on the disk: a state must never be there before its rows."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def write_parquet(self) -> None:
        """Writes the same rows beside it as Parquet."""
        columns = {name: pa.array([r[name] for r in self.rows], _ARROW[kind]) for name, kind in self._columns.items()}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_bytes(self.path.with_suffix(".parquet"), sink.getvalue().to_pybytes())


def read_rows(path: Path, columns: Mapping[str, type]) -> list[dict]:
    """The rows of a log that are whole; none where there is no such table."""
    return _read(path, columns, sys.maxsize)[1]


def _line(cells: Sequence) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)  # of floats it writes the repr
    return text.getvalue().encode()


def _read(path: Path, columns: Mapping[str, type], upto: int) -> tuple[int, list[dict]]:
    """Bytes of a log that stay, header included (0: not even that), and their rows."""
    if not path.is_file():
        return 0, []
    header, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    if header != _line(columns):
        return 0, []
    size, rows = len(header), []
    for line in lines:
        row = _parse(line, columns)
        if row is None or row["step"] > upto:
            break
        rows.append(row)
        size += len(line)
    return size, rows


def _parse(line: bytes, columns: Mapping[str, type]) -> dict | None:
    """The row of a line; None where it is not whole."""
    try:
        cells = next(csv.reader([line.decode()]))
        row = {name: kind(cell) for (name, kind), cell in zip(columns.items(), cells, strict=True)}
    except (ValueError, StopIteration):
        return None
    return row if line.endswith(b"\n") else None
