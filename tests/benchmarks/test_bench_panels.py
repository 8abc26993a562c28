"""The benchmark of the panels reports every event."""

from benchmarks.panels import main


def test_quick_run_prints_a_line_an_event(capsys):
    assert main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3
    assert all("32 x 32" in line for line in lines[2:])
