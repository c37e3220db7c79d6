import math
import struct

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscape.finetune.log import Log

COLUMNS = {"step": int, "subject": str, "loss": float}
ROWS = [{"step": step, "subject": f'a, "{step}"', "loss": 1 / (step + 3)} for step in range(4)]


def write(path, rows=ROWS, upto=-1):
    log = Log(path, COLUMNS, upto)
    for row in rows:
        log.append(row)
    log.sync()
    log.close()
    return path


def reopened(path, upto):
    log = Log(path, COLUMNS, upto)
    log.close()
    return log.rows


def test_rows_are_on_disk_as_soon_as_they_are_appended(tmp_path):
    log = Log(tmp_path / "log.csv", COLUMNS, -1)
    for number, row in enumerate(ROWS, 1):
        log.append(row)
        assert len((tmp_path / "log.csv").read_bytes().splitlines()) == number + 1
    log.close()


@given(st.floats(allow_nan=False) | st.floats(width=32, allow_nan=False))
def test_floats_read_back_to_the_bit(tmp_path_factory, number):
    path = tmp_path_factory.mktemp("log") / "log.csv"
    write(path, [{"step": 1, "subject": "a", "loss": number}])
    assert struct.pack("d", reopened(path, 1)[0]["loss"]) == struct.pack("d", number)


def test_log_goes_on_to_the_same_bytes_wherever_it_was_torn(tmp_path):
    whole = write(tmp_path / "whole.csv").read_bytes()
    for size in range(len(whole) + 1):
        torn = tmp_path / "torn.csv"
        torn.write_bytes(whole[:size])
        left = reopened(torn, upto=99)
        assert left == ROWS[: len(left)] and len(left) == max(whole[:size].count(b"\n") - 1, 0)
        write(torn, ROWS[len(left) :], upto=99)
        assert torn.read_bytes() == whole


@pytest.mark.parametrize("upto", [-1, 0, 2, 3, 9])
def test_rows_of_later_steps_are_dropped_from_the_file_too(upto, tmp_path):
    path = write(tmp_path / "log.csv")
    assert reopened(path, upto) == [row for row in ROWS if row["step"] <= upto]
    assert reopened(path, 99) == [row for row in ROWS if row["step"] <= upto]


def test_other_table_is_begun_anew(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,2.0\n")
    assert reopened(path, 9) == [] and path.read_text() == "step,subject,loss\n"


def test_parquet_has_the_same_rows(tmp_path):
    path = write(tmp_path / "log.csv")
    log = Log(path, COLUMNS, 99)
    log.write_parquet()
    log.close()
    assert pq.read_table(tmp_path / "log.parquet").to_pylist() == ROWS
    assert math.isclose(ROWS[0]["loss"], 1 / 3)


def test_disk_that_takes_a_part_of_a_row_says_so(tmp_path):
    log = Log(tmp_path / "log.csv", COLUMNS, -1)
    taken = log._file

    class Full:
        def write(self, line):
            return taken.write(line[:3])

    log._file = Full()
    with pytest.raises(OSError, match="No space left"):
        log.append(ROWS[0])
    taken.close()
    assert reopened(tmp_path / "log.csv", 9) == []
