"""A saved figure: the venue's width, embedded fonts, and its provenance."""

from pathlib import Path

import pytest
from PIL import Image
from pypdf import PdfReader

from misa.cli import main
from misa.errors import UserError, on_command_line
from misa.figures.paper import figure1, figure3, figure4, figure5
from misa.figures.provenance import as_text, provenance_of, require_own, save_figure
from misa.figures.style import COLUMN, PAGE
from misa.rows import find_row

MADE = {"what": "Figure 4", "command": "misa figures 'runs/a b'", "images": {"random": [3, 1]}, "commit": None}


@pytest.fixture
def saved(example, tmp_path):
    return save_figure(figure4([(example, (5, 6))]), tmp_path / "out", "figure4", MADE)


def test_both_files_say_where_they_come_from(saved):
    assert [path.name for path in saved] == ["figure4.pdf", "figure4.png"]
    assert provenance_of(saved[0]) == provenance_of(saved[1]) == MADE


def test_as_text_starts_with_the_command():
    lines = as_text(MADE).splitlines()
    assert lines[0] == "command: misa figures 'runs/a b'"
    assert "images:" in lines
    assert "  random: 3, 1" in lines


def test_the_same_figure_is_the_same_file(example, saved, tmp_path):
    again = save_figure(figure4([(example, (5, 6))]), tmp_path / "again", "figure4", MADE)
    for first, second in zip(saved, again, strict=True):
        assert first.read_bytes() == second.read_bytes()


def figures(example):
    inside = example.box_masks().any(dim=0)
    sample = {"image": example.image, "masks": example.masks, "title": "1"}
    maps = {"image": example.image, "semantic": example.image}
    scores = {"boxes": {"instances, merged": 40.0, "semantic": 50.0}, "masks": {"semantic": 60.0}}
    return {
        "1": (figure1(scores, [maps]), PAGE),
        "1 bars alone": (figure1(scores, []), COLUMN),
        "3": (figure3({"S": (example.features, inside)}, radius=3), PAGE),
        "4": (figure4([(example, (5, 6))]), PAGE),
        "5": (figure5({"chosen": [sample]}), PAGE),
    }


@pytest.mark.parametrize("name", ["1", "1 bars alone", "3", "4", "5"])
def test_the_venues_width_and_embedded_fonts(example, tmp_path, name):
    figure, width = figures(example)[name]
    pdf, png = save_figure(figure, tmp_path, "figure", MADE)
    (page,) = PdfReader(pdf).pages
    assert float(page.mediabox.width) / 72 == pytest.approx(width, abs=0.01)
    with Image.open(png) as image:
        assert image.width == pytest.approx(300 * width, abs=1)
    fonts = [font.get_object() for font in page["/Resources"]["/Font"].get_object().values()]
    assert fonts
    for font in fonts:
        inner = font["/DescendantFonts"][0].get_object() if font["/Subtype"] == "/Type0" else font
        assert font["/Subtype"] != "/Type3"
        assert "/FontFile2" in inner["/FontDescriptor"].get_object()


def test_bars_are_what_was_measured(example):
    (axes,) = figures(example)["1 bars alone"][0].axes
    assert sorted(bar.get_height() for bar in axes.patches) == [40.0, 50.0, 60.0]


@pytest.mark.parametrize("name", ["missing.pdf", "plain.png", "text.pdf", "plain.pdf"])
def test_other_files_are_a_sentence(tmp_path, example, name):
    path = tmp_path / name
    if name.startswith("plain"):
        figure4([(example, (5, 6))]).savefig(path)
    elif name.startswith("text"):
        path.write_text("no figure")
    with pytest.raises(UserError, match="made by misa figures"):
        provenance_of(path)


def test_a_folder_lists_its_figures(example, tmp_path, capsys):
    """A figure's PDF and PNG once, those of folders below as well, and no file of another origin."""
    figure = figure4([(example, (5, 6))])
    save_figure(figure, tmp_path, "figure4", MADE)
    save_figure(figure, tmp_path / "one", "figure5", {**MADE, "command": "misa figures other"})
    Image.new("RGB", (4, 4)).save(tmp_path / "mask.png")
    assert main(["provenance", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line[0] != " "] == [
        "figure4.pdf, figure4.png:",
        "one/figure5.pdf, one/figure5.png:",
    ]
    assert lines[1] == f"  command: {MADE['command']}"
    assert lines[lines.index("one/figure5.pdf, one/figure5.png:") + 1] == "  command: misa figures other"
    (run := tmp_path / "run").mkdir()
    (run / "params.json").write_text("{}")
    assert main(["provenance", str(run)]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "has no figures made by misa figures; give a PDF or PNG of these, or their folder; what a run" in sentence


@pytest.mark.parametrize("content", ["picture", "text"])
def test_a_foreign_file_of_a_figures_name_is_not_overwritten(tmp_path, content):
    path = tmp_path / "figure5.png"
    Image.new("RGB", (4, 4)).save(path) if content == "picture" else path.write_text("mine")
    sentence = f"{path} exists and was not made by misa figures; choose another {{}}."
    with pytest.raises(UserError) as caught:
        require_own(tmp_path, {})
    assert str(caught.value) == sentence.format("out")
    with on_command_line(), pytest.raises(UserError) as caught:
        require_own(tmp_path, {})
    assert str(caught.value) == sentence.format("--out")


def test_only_figures_of_the_same_runs_may_be_replaced(example, tmp_path):
    card = {"row": "demo:misa", "hash": "0123"}
    save_figure(figure4([(example, (5, 6))]), tmp_path, "figure4", {**MADE, "runs": {"misa": card}})
    require_own(tmp_path, {"misa": card, "mask": {"row": "demo:mask"}})
    with pytest.raises(UserError, match=r"figure4.* was made from another run, misa \(demo:misa\)"):
        require_own(tmp_path, {"misa": card | {"hash": "4567"}})


def test_a_folder_that_cannot_be_written_is_a_sentence(example, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="figures cannot be written to"):
        save_figure(figure4([(example, (5, 6))]), tmp_path / "file", "figure4", MADE)


def test_warnings_are_printed_as_sentences_of_a_line_each():
    text = as_text(
        {"images": [3, 17], "beware": ["run/a is a smoke run: x, y.", "run/b has not ended."], "command": "c"}
    )
    assert text.splitlines() == [
        "command: c",
        "images: 3, 17",
        "beware:",
        "  run/a is a smoke run: x, y.",
        "  run/b has not ended.",
    ]


@pytest.mark.parametrize("name", ["figure3", "figure4"])
def test_the_readmes_figures_are_of_the_row_as_it_is(name):
    """After a change of the row its figures have to be drawn again."""
    docs = Path(__file__).parents[2] / "docs"
    made = provenance_of(docs / f"{name}.png")
    assert made["command"].startswith("misa figures runs/demo-misa-seed0 ")
    for card in made["runs"].values():
        assert card["hash"] == find_row(card["row"]).digest()
