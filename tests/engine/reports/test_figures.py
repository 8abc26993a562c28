"""The figure factory, from run folders of two training steps to files that say where they come from."""

import json

import pytest

from misa.cli import main
from misa.engine.reports.explore import trained
from misa.engine.reports.figures import Choice, Factory, deepest
from misa.errors import UserError
from misa.figures.provenance import whence

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(module_path):
    trained(module_path / "misa", data_root=module_path / "data", smoke=True)
    trained(module_path / "mask", row="demo:mask", data_root=module_path / "data", smoke=True)
    return module_path


def test_all_figures_from_one_command(runs, tmp_path, capsys):
    given = [str(runs / "misa"), str(runs / "mask")]
    assert main(["figures", *given, "--out", str(tmp_path), "--images", "2", "--random", "2", "--worst", "3"]) == 0
    names = [f"figure{name}.{kind}" for name in (1, 3, 4, 5) for kind in ("pdf", "png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    capsys.readouterr()
    assert main(["whence", str(tmp_path / "figure5.pdf")]) == 0
    words = capsys.readouterr().out
    assert words.startswith("command: misa figures ")
    made = whence(tmp_path / "figure5.png")
    assert made["images"]["chosen"] == [2]
    assert len(made["images"]["random"]) == 2
    assert len(made["images"]["worst"]) <= 3
    params = json.loads((runs / "misa" / "params.json").read_text())
    assert made["runs"]["misa"]["hash"] == params["digest"]
    assert {card["row"] for card in made["runs"].values()} == {"demo:misa", "demo:mask", "teacher:demo"}


def test_the_command_in_a_figure_makes_it_again(runs, tmp_path):
    factory = Factory([runs / "misa"], choice=Choice(drawn=2, worst=2, seed=4), wanted="5")
    (pdf, _) = factory.make(tmp_path / "first")
    assert factory.show("5") is factory.draw("5")
    assert factory.show("4") is None
    before = pdf.read_bytes()
    pdf.unlink()
    command = whence(tmp_path / "first" / "figure5.png")["command"].split()
    assert command[0] == "misa"
    assert main(command[1:]) == 0
    assert pdf.read_bytes() == before


def test_what_is_missing_is_said_and_left_out(runs, tmp_path, capsys):
    factory = Factory([runs / "mask"], wanted="134")
    assert factory.make(tmp_path) == []
    assert factory.show("4") is None
    words = capsys.readouterr().out
    assert "figure 1 is left out: it compares a student with a semantic network" in words
    assert "figure 4 is left out: it needs a semantic teacher" in words


def test_the_draw_is_the_seeds(runs):
    first, again, other = (Factory([runs / "misa"], choice=Choice(drawn=2, seed=seed)).drawn for seed in (0, 0, 5))
    assert first == again
    assert first != other


def test_wrong_input_is_a_sentence(runs, tmp_path):
    with pytest.raises(UserError, match="has no image 99; it has 4"):
        Factory([runs / "misa"], choice=Choice(given=(99,))).draw("5")
    with pytest.raises(UserError, match="there is no figure '2'"):
        Factory([runs / "misa"], wanted="2")
    with pytest.raises(UserError, match="give one or more"):
        Factory([])
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "params.json").write_text((runs / "misa" / "params.json").read_text())
    with pytest.raises(UserError, match="is not finished"):
        Factory([unfinished])


def test_the_deepest_place_is_inside_the_largest_object(runs):
    example = Factory([runs / "misa"]).networks.example(1)
    masks = example.coarse_masks()
    row, column = deepest(example)
    assert bool(masks[int(masks.sum(dim=(1, 2)).argmax()), row, column])
