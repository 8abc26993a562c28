"""The hash of every row is unchanged: finished runs are found by it."""

import csv
from pathlib import Path

import pytest

from misa.rows import find_row, table_module, table_names

STORED = Path(__file__).with_name("digests.csv")


@pytest.mark.parametrize("row", list(csv.DictReader(STORED.read_text().splitlines())), ids=lambda row: row["row"])
def test_a_rows_hash_stays(row):
    experiment = find_row(row["row"])
    assert (experiment.digest(), experiment.smoke().digest()) == (row["digest"], row["smoke"])


def test_every_row_has_its_hash_here():
    stored = {row["row"] for row in csv.DictReader(STORED.read_text().splitlines())}
    assert stored == {f"{table}:{name}" for table in table_names() for name in table_module(table).ROWS}
