"""The hash of every row is unchanged: finished runs are found by it."""

import csv
from pathlib import Path

import pytest

from misa.rows import find_row

STORED = Path(__file__).with_name("digests.csv")


@pytest.mark.parametrize("row", list(csv.DictReader(STORED.read_text().splitlines())), ids=lambda row: row["row"])
def test_a_rows_hash_stays(row):
    experiment = find_row(row["row"])
    assert (experiment.digest(), experiment.smoke().digest()) == (row["digest"], row["smoke"])
