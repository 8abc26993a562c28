"""Errors as their readers see them."""

from IPython.core.interactiveshell import InteractiveShell


def test_a_notebook_shows_the_sentence_alone(capsys):
    """IPython's own shell, which notebooks and papermill run cells with; other errors keep their traceback."""
    shell = InteractiveShell()
    shell.run_cell("from misa.errors import UserError\nraise UserError('no run there; give another.')")
    shown = "".join(capsys.readouterr())
    assert "no run there; give another." in shown
    assert "Traceback" not in shown
    assert "raise" not in shown
    shell.run_cell("raise ValueError('a fault of ours')")
    assert "Traceback" in "".join(capsys.readouterr())
