"""The inspection of a run: its numbers agree with the run's, and its page is self-contained."""

import base64
import json
import re
import shutil
from collections import defaultdict
from html.parser import HTMLParser

import cv2
import numpy as np
import pandas as pd
import pytest

from misa.cli import main
from misa.engine.reports.inspection import Painter, inspect_run, summary
from misa.engine.runs.scores import DETECTIONS
from misa.errors import UserError
from misa.evaluation.ap import read_truth
from misa.evaluation.failures import KINDS
from misa.figures.page import jpeg, render


@pytest.fixture(scope="module")
def perfect(small_run, module_path):
    """Predictions that equal the ground truth, except one wrong class and one missed object."""
    truth = read_truth(small_run.source.val.annotations)
    rows = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.9, "segmentation": a["segmentation"]}
        for a in truth.dataset["annotations"]
    ]
    rows[0]["category_id"] = next(i for i in truth.getCatIds() if i != rows[0]["category_id"])
    path = module_path / "perfect.json"
    path.write_text(json.dumps(rows[:-1]))
    return path, rows


def test_scores_are_those_of_the_run(small_run):
    found = inspect_run(small_run.folder, out=None, resamples=20)
    for name, value in small_run.metrics["segm"].items():
        assert found.scores[name].value == (None if value is None else pytest.approx(value, abs=1e-9))
    assert found.page is None


def test_planted_failures_are_counted(small_run, perfect):
    path, rows = perfect
    found = inspect_run(small_run.folder, predictions=path, out=None, resamples=0)
    kinds = found.kinds()
    assert (kinds["found"], kinds["wrong class"], kinds["missed"]) == (len(rows) - 2, 1, 1)
    assert sum(kinds[kind] for kind in KINDS) == len(rows)
    spoilt = {rows[0]["image_id"], rows[-1]["image_id"]}
    assert set(found.worst(len(spoilt))) == spoilt
    assert all(value == 100 for image, value in found.images.items() if image not in spoilt and value is not None)
    text = summary(found)
    assert text.startswith("masks    (%)\nAP ")
    assert re.search(r"wrong class +1\b", text)
    assert f"outcome of {len(rows)} objects\nfound " in text
    assert "0 false positives: detections that overlap no object, but lie on the background" in text


def test_an_unfinished_run_is_called_so(small_run, perfect, tmp_path, capsys):
    folder = shutil.copytree(small_run.folder, tmp_path / "run")
    (folder / "metrics.json").unlink()
    (folder / DETECTIONS).unlink()
    words, epochs = ["inspect", str(folder), "--resamples", "2"], small_run.experiment.schedule.epochs
    loud = f"warning: {folder} has not ended its training; what follows is of epoch {epochs} of {epochs}.\n"
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(loud)
    assert "has no predictions, as a training writes them at its end; let the same misa train go on, or" in error
    assert "give --predictions the file of misa evaluate --predictions" in error
    assert main([*words, "--predictions", str(perfect[0])]) == 0
    assert capsys.readouterr().err == loud
    assert "has not ended its training" in (folder / "inspection.html").read_text()


class ParsedPage(HTMLParser):
    """The elements of a page."""

    def __init__(self):
        super().__init__()
        self.addresses, self.scripts, self.text, self.ids = [], 0, [], []

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_by_itself(small_run, perfect, tmp_path, capsys):
    out = tmp_path / "page.html"
    arguments = ["inspect", str(small_run.folder), "--predictions", str(perfect[0]), "--out", str(out)]
    assert main([*arguments, "--resamples", "20"]) == 0
    assert str(out) in capsys.readouterr().out
    assert main([*arguments, "--resamples", "20"]) == 0
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"\xff\xd8\xff")
    assert main([*arguments[:-1], str(photo)]) == 2
    assert "photo.jpg exists already and is no page of misa inspect" in capsys.readouterr().err
    assert photo.read_bytes() == b"\xff\xd8\xff"
    photo.write_text('<meta name="generator" content="misa">')  # another page of ours
    assert main([*arguments[:-1], str(photo)]) == 2
    parsed = ParsedPage()
    parsed.feed(out.read_text())
    assert parsed.scripts == 1  # sorts the table of all images; in the page itself, see below
    assert parsed.addresses
    links = [address[1:] for address in parsed.addresses if address.startswith("#")]
    assert links
    assert set(links) <= set(parsed.ids)
    rest = [address for address in parsed.addresses if not address.startswith("#")]
    assert all(address.startswith(("data:image/jpeg;base64,", "data:image/png;base64,")) for address in rest)
    assert sum(address.startswith("data:image/png") for address in parsed.addresses) == 2  # losses and health
    text = " ".join(parsed.text)
    for words in (
        "Training",
        "health: how much of its box a mask fills",
        "Scores",
        "95 % interval",
        "Wrong class (1)",
        "Missed (1)",
        "Worst images",
        "All images",
    ):
        assert words in text
    for name in small_run.source.classes:
        assert name in text


def test_the_page_is_the_runs_own_and_made_again(small_run, tmp_path):
    first = inspect_run(small_run.folder, resamples=5, examples=1)
    assert first.page == small_run.folder / "inspection.html"
    inspect_run(small_run.folder, resamples=5, examples=1)
    first.page.unlink()


def test_names_are_text_and_not_markup():
    empty = pd.DataFrame({"class": []})
    frame = pd.DataFrame({"class": ["<script>alert(1)</script>"], "AP": [None], "share": [7.0]}, dtype=object)
    values = dict.fromkeys(("scores", "by_class", "kinds", "images"), empty)
    html = render(
        "inspection.html.j2",
        title="<b>&",
        subtitle="<i>",
        warning="a <u>",
        charts=[],
        resamples=3,
        classes=frame,
        examples=[],
        worst=[],
        all_note="",
        **values,
    )
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;" in html
    assert "a &lt;u&gt;" in html
    assert "width:9.00em" in html  # a share above 1 fills its bar
    assert ">–<" in html


def test_pictures_are_in_the_page():
    pixels = np.full((20, 30, 3), (200, 30, 30), np.uint8)
    data = base64.b64decode(jpeg(pixels).removeprefix("data:image/jpeg;base64,"))
    shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    assert np.abs(shown.astype(int) - pixels).max() < 12


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there are no predictions"),
        ("{", "is not a COCO results file"),
        ("[3]", "is not a COCO results file"),
        ('[{"image_id": 1, "category_id": 1}]', "is not a COCO results file"),
        ('[{"image_id": 987654, "category_id": 1}]', "holds predictions on other data: image_id 987654"),
        ('[{"image_id": 1, "category_id": 77}]', "holds predictions on other data: category_id 77 is not in this"),
        ('[{"image_id": "1", "category_id": 1}]', "the image_id '1', which is not a whole number"),
        (
            '{"categories": [], "images": []}',
            "is not a list of detections; give the file of misa evaluate --predictions",
        ),
        (
            '[{"image_id": 1, "category_id": 1, "score": 1, "segmentation": {"size": [52, 70], "counts": "zzzz"}}]',
            "cannot be decoded",
        ),
        (
            '[{"image_id": 1, "category_id": 1, "score": 1, "segmentation": {"size": [3, 3], "counts": "09"}}]',
            "is of size",
        ),
    ],
)
def test_predictions_of_something_else_are_named(small_run, tmp_path, content, words):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        inspect_run(small_run.folder, predictions=path, out=None)


def test_objects_of_a_class_that_was_left_out_are_not_drawn(small_run):
    """They may have no masks."""
    truth = read_truth(small_run.source.val.annotations)
    (image, *_) = truth.imgs
    before = Painter(truth, small_run.source, defaultdict(list)).image(image)
    truth.dataset["categories"].append({"id": 99, "name": "left out"})
    truth.imgToAnns[image].append({"id": 999, "image_id": image, "category_id": 99, "bbox": [1, 1, 9, 9]})
    after = Painter(truth, small_run.source, defaultdict(list)).image(image)
    assert all((after[name] == before[name]).all() for name in before)
    assert len(before) == 3


def test_wrong_values_are_named(small_run, tmp_path, capsys):
    assert main(["inspect", str(small_run.folder), "--good", "2"]) == 2
    assert "good must be from 0" in capsys.readouterr().err
    with pytest.raises(UserError, match="good must be above 0"):
        inspect_run(small_run.folder, good=0.0)
    assert main(["inspect", str(small_run.folder), "--good", "0"]) == 2
    assert "good must be from 0" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be written"):
        inspect_run(small_run.folder, out=small_run.folder / DETECTIONS / "x.html", resamples=0)


def test_predictions_of_one_val_split_are_not_compared_with_another(small_run, tmp_path):
    """Image ids and sizes are the same in many data sets, so that nothing else would tell."""
    root = small_run.source.root
    shutil.copytree(root, tmp_path / "moved")
    assert inspect_run(small_run.folder, data_root=tmp_path / "moved", out=None, resamples=0).scores
    file = tmp_path / "moved" / small_run.source.val.annotations.relative_to(root)
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][:-1]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"another val split .*misa evaluate .* --predictions FILE"):
        inspect_run(small_run.folder, data_root=tmp_path / "moved", out=None, resamples=0)
    given = small_run.folder / DETECTIONS
    assert inspect_run(small_run.folder, data_root=tmp_path / "moved", predictions=given, out=None, resamples=0).scores


def test_detections_of_classes_that_the_run_does_not_know_are_no_errors(small_run, perfect, tmp_path):
    """AP leaves them out, too."""
    root = small_run.source.root
    shutil.copytree(root, tmp_path / "moved")
    file = tmp_path / "moved" / small_run.source.val.annotations.relative_to(root)
    content = json.loads(file.read_text())
    content["categories"].append({"id": 99, "name": "never"})
    file.write_text(json.dumps(content))
    rows = json.loads(perfect[0].read_text())
    (tmp_path / "more.json").write_text(json.dumps(rows + [{**row, "category_id": 99, "score": 0.95} for row in rows]))
    options = {"data_root": tmp_path / "moved", "out": None, "resamples": 0}
    first = inspect_run(small_run.folder, predictions=perfect[0], **options)
    second = inspect_run(small_run.folder, predictions=tmp_path / "more.json", **options)
    assert second.kinds() == first.kinds()
    assert second.scores == first.scores
