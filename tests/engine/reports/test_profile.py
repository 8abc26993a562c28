"""`misa profile` runs, names every part, and restores the functions that it instruments."""

import pytest

from misa.cli import main
from misa.engine.reports.profile import PARTS, forms, named_parts, own_times
from misa.errors import UserError
from misa.rows import find_row


def test_the_forms_are_the_rows_of_table_3():
    row = find_row("table3_components:demo_misa")
    every = forms(row)
    assert every["box baseline"] == find_row("table3_components:demo_baseline").but(
        affinity={"local_form": "product", "global_form": "product", "semantic_scale": row.affinity.semantic_scale}
    )
    assert every["+ SEPA"] == find_row("table3_components:demo_sepa")
    assert every["+ FSD + SEPA"] == row
    assert every["mmdet, from masks"].supervision == "mask"
    with pytest.raises(UserError, match="takes a row with FSD and SEPA"):
        forms(find_row("demo:box"))


def test_the_parts_are_put_back():
    before = [getattr(owner, name) for owner, name, _ in PARTS]
    with named_parts():
        inside = [getattr(owner, name) for owner, name, _ in PARTS]
    assert all(one is not other for one, other in zip(before, inside, strict=True))
    assert [getattr(owner, name) for owner, name, _ in PARTS] == before


def test_a_part_within_another_counts_once():
    spent = {"tree": 1.0, "b": 7.0, "tree < b": 2.0, "c < b": 3.0, "tree < c < b": 1.0}
    assert own_times(spent) == {"tree": 4.0, "b": 2.0, "c": 2.0}


@pytest.mark.slow
def test_it_runs(tmp_path, capsys):
    assert main(["profile", "--smoke", "--steps", "1", "--data-root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for part in {part for _, _, part in PARTS} | set(forms(find_row("demo:misa"))):
        assert f"{part} " in out


def test_a_row_without_priors_is_refused(capsys):
    assert main(["profile", "demo:box", "--smoke"]) == 2
    assert "takes a row with FSD and SEPA" in capsys.readouterr().err
