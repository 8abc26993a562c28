"""Errors as their readers see them."""

import pytest
from IPython.core.interactiveshell import InteractiveShell

from misa.cli import main
from misa.commands.rows import Rows
from misa.errors import did_you_mean, option_name, stem


def test_a_notebook_shows_the_sentence_alone(capsys):
    """In IPython's shell, which runs the cells of notebooks and papermill; other errors keep their traceback."""
    shell = InteractiveShell()
    shell.run_cell("from misa.errors import UserError\nraise UserError('no run there; give another.')")
    shown = "".join(capsys.readouterr())
    assert "no run there; give another." in shown
    assert "Traceback" not in shown
    assert "raise" not in shown
    shell.run_cell("raise ValueError('a fault of ours')")
    assert "Traceback" in "".join(capsys.readouterr())


def test_options_are_named_as_the_caller_writes_them(monkeypatch):
    """On the command line until it ends, whatever it raised."""

    def run(options: Rows) -> int:
        raise KeyError(option_name("work_dir"))

    monkeypatch.setattr("misa.commands.rows.run", run)
    assert option_name("work_dir") == "work_dir"
    with pytest.raises(KeyError, match="--work-dir"):
        main(["rows"])
    assert option_name("scale_lr", off=True) == "scale_lr=False"


def test_files_are_alike_by_their_names_and_not_by_their_suffix():
    photos = ["rocket.jpg", "cat.png"]
    assert did_you_mean("nope.jpg", photos, key=stem) == ""
    assert did_you_mean("nope.jpg", photos) != ""  # the result of comparing whole names
    assert did_you_mean("rockt.png", photos, key=stem) == "; did you mean 'rocket.jpg'?"
    assert did_you_mean("Cat.jpg", photos, key=stem) == "; did you mean 'cat.png'?"
    assert did_you_mean("runs", ["run"], key=stem) == "; did you mean 'run'?"
