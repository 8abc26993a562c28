"""Named faults of the input: each ends in one clear sentence, with nothing lost or overwritten.

More faults of data are in tests/test_cli.py (BAD), tests/data/check/ and tests/data/formats/.
"""

import json
import os
import pickle
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from misa.cli import main
from misa.engine.runs.checkpoints import newest
from misa.files import locked
from misa.rows import find_row

ROW = """
from misa.experiment import Experiment
import json
ROWS = {"small": Experiment.from_values(json.loads('''%s'''))}
"""


@dataclass
class Place:
    """A copy of a finished run, its data and its row, to corrupt."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def photo(self) -> Path:
        return self.folder / "photo.png"

    @property
    def newest(self) -> Path:
        return self.run / "checkpoints" / "epoch_8.pth"

    def annotations(self, split="train") -> Path:
        return self.data / "annotations" / f"instances_{split}2017.json"

    def edit(self, change, split="train") -> None:
        path = self.annotations(split)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def own(self, row: str) -> None:
        """The run's record becomes that of a row in rows.py."""
        params = json.loads((self.run / "params.json").read_text())
        params["experiment"] = find_row(f"{self.folder / 'rows.py'}:{row}").values()
        (self.run / "params.json").write_text(json.dumps(params))

    def image(self) -> Path:
        return min((self.data / "train2017").iterdir())

    def content(self, change) -> None:
        """Change the content of the newest checkpoint."""
        content = torch.load(self.newest, weights_only=True)
        change(content)
        torch.save(content, self.newest)

    def train(self, *options, work_dir="new", row="small"):
        common = ["--data-root", str(self.data), "--work-dir", str(self.folder / work_dir), "--gpus", "0"]
        return ["train", f"{self.folder / 'rows.py'}:{row}", *common, *map(str, options)]

    def predict(self, *options, checkpoint=None, inputs=None, out="out"):
        given = [str(checkpoint or self.run), str(inputs or self.photo), "--out", str(self.folder / out)]
        return ["predict", *given, "--device", "cpu", *map(str, options)]

    def export(self, out="x.pth", *options):
        return ["export", str(self.run), str(self.folder / out), *options]

    def evaluate(self, *options, run="run"):
        return ["evaluate", str(self.folder / run), "--gpus", "0", *map(str, options)]

    def snapshot(self):
        """Returns the content of all files except locks."""
        return {
            path.relative_to(self.folder): path.read_bytes() if path.is_file() else None
            for path in sorted(self.folder.rglob("*"))
            if path.name != ".lock"
        }


@pytest.fixture(scope="module")
def template(small_run, module_path):
    """The run without its optimizer state, which is most of its size; its data as if it were the user's."""
    folder = module_path
    shutil.copytree(small_run.folder, folder / "run", ignore=shutil.ignore_patterns(".lock", "figures"))
    for path in (folder / "run" / "checkpoints").glob("*.pth"):
        content = torch.load(path, weights_only=True)
        torch.save({"state_dict": content["state_dict"]}, path)
    shutil.copytree(small_run.source.root, folder / "data")
    row = json.dumps(small_run.experiment.but(data="coco", scenes=()).values())
    (folder / "rows.py").write_text(ROW % row)
    shutil.copy(next((folder / "data/val2017").iterdir()), folder / "photo.png")
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(template, tmp_path / "place")
    params = json.loads((folder / "run/params.json").read_text())
    (folder / "run/params.json").write_text(json.dumps(params | {"data_root": str(folder / "data")}))
    return Place(folder)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Trap:
    """Creates a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def first(change):
    """Returns a change of the first row of a table of the training annotations."""
    return lambda p: p.edit(change)


# name: (the corruption, the command, words of the message)
DATA = {
    "data: no such folder": (lambda p: shutil.rmtree(p.data), "there is no folder"),
    "data: a file in place of the folder": (lambda p: [shutil.rmtree(p.data), put(p.data, "")], "is a file"),
    "data: no annotations": (lambda p: p.annotations().unlink(), "instances_train2017.json is missing"),
    "data: no folder of images": (lambda p: shutil.rmtree(p.data / "train2017"), "train image folder"),
    "data: an image is absent": (lambda p: p.image().unlink(), "is missing"),
    "data: an image is cut": (lambda p: cut(p.image()), "is truncated or not an image"),
    "data: an image is empty": (lambda p: p.image().write_bytes(b""), "is empty"),
    "data: an image is text": (lambda p: p.image().write_text("<html>404</html>"), "is truncated or not an image"),
    "data: an image has another size": (lambda p: Image.new("RGB", (9, 9)).save(p.image()), "is 9 x 9 pixels, but"),
    "data: json is cut": (lambda p: cut(p.annotations()), "ends too early"),
    "data: json is empty": (lambda p: p.annotations().write_text(""), "ends too early"),
    "data: json is a list": (lambda p: p.annotations().write_text("[]"), "holds a list, not an object"),
    "data: json is binary": (lambda p: p.annotations().write_bytes(os.urandom(999)), "not json"),
    "data: json is nested without end": (lambda p: p.annotations().write_text('{"a":' + "[" * 10**5), "not json"),
    "data: a table is missing": (first(lambda c: c.pop("categories")), "has no 'categories'"),
    "data: an image id twice": (first(lambda c: c["images"][1].update(id=c["images"][0]["id"])), "more than once"),
    "data: an object id twice": (
        first(lambda c: c["annotations"][1].update(id=c["annotations"][0]["id"])),
        "this id is used more than once",
    ),
    "data: an object of no image": (first(lambda c: c["annotations"][0].update(image_id=99)), "is not in 'images'"),
    "data: an object of no class": (first(lambda c: c["annotations"][0].update(category_id=99)), "not in 'categor"),
    "data: a class twice": (
        first(lambda c: c["categories"][1].update(name=c["categories"][0]["name"])),
        "is used more than once",
    ),
    "data: a negative box": (first(lambda c: c["annotations"][0].update(bbox=[9, 9, -3, 3])), "has negative size"),
    "data: a box of no area": (first(lambda c: c["annotations"][0].update(bbox=[9, 9, 0, 3])), "has no area"),
    "data: a box outside": (first(lambda c: c["annotations"][0].update(bbox=[900, 9, 3, 3])), "lies outside"),
    "data: a box of nothing": (first(lambda c: c["annotations"][0].update(bbox=[float("nan")] * 4)), "four finite"),
    "data: no images listed": (first(lambda c: c.update(images=[], annotations=[])), "lists no images"),
    "data: other classes in val": (
        lambda p: p.edit(lambda c: c["categories"][0].update(name="zebra"), "val"),
        "is expected, but found are",
    ),
    "data: a mask of val that is none": (
        lambda p: p.edit(lambda c: c["annotations"][0]["segmentation"].update(counts="x"), "val"),
        "cannot be decoded",
    ),
    "data: fewer images than a batch": (
        first(
            lambda c: c.update(images=c["images"][:1], annotations=[a for a in c["annotations"] if a["image_id"] == 1])
        ),
        "set --batch to 1 or less",
    ),
}
TRAINING = {
    "row: no such table": (lambda p: ["train", "dmeo:box"], "did you mean 'demo'"),
    "row: no such row": (lambda p: p.train(row="samll"), "rows.py:small'?"),
    "row: not table:row": (lambda p: ["train", "demo"], "demo is a table; name one of its rows"),
    "row: a file that fails": (
        lambda p: [put(p.folder / "rows.py", "ROWS = 1/0"), p.train()][1],
        "rows.py, line 1: ZeroDivisionError",
    ),
    "parameters: a negative seed": (lambda p: p.train("--seed", -1), "seed must be from 0"),
    "parameters: no epochs": (lambda p: p.train("--epochs", 0), "epochs must be at least 1"),
    "parameters: no threads": (lambda p: p.train("--threads", 0), "threads must be from 1"),
    "work_dir: a file": (lambda p: p.train(work_dir="photo.png"), "cannot be written"),
    "work_dir: cannot be written": (lambda p: p.train(work_dir="/proc/nowhere"), "cannot be written"),
    "work_dir: not UTF-8": (lambda p: p.train(work_dir=os.fsdecode(b"caf\xe9")), "caf\\udce9 is not UTF-8"),
    "work_dir: another run": (lambda p: p.train(work_dir="run"), "holds another run"),
    "work_dir: files of no run": (lambda p: [put(p.folder / "new/log.txt", "mine"), p.train()][1], "no params.json"),
    "work_dir: the data": (lambda p: p.train(work_dir="data"), "data holds the data, which is only read"),
    "work_dir: its images": (lambda p: p.train(work_dir="data/train2017"), "train2017 holds the data"),
    "work_dir: a damaged record": (
        lambda p: [put(p.run / "params.json", '{"row": '), p.train(work_dir="run")][1],
        "params.json cannot be read",
    ),
    "work_dir: damaged metrics": (
        lambda p: [p.own("small"), put(p.run / "metrics.json", ""), p.train(work_dir="run")][2],
        "metrics.json cannot be read",
    ),
}
CHECKPOINTS = {
    "checkpoint: absent": (
        lambda p: p.predict(checkpoint=p.folder / "nothing.pth"),
        "there is no run folder or checkpoint",
    ),
    "checkpoint: a folder that is no run": (lambda p: p.predict(checkpoint=p.data), "is not a run folder"),
    "checkpoint: a run without any": (
        lambda p: [shutil.rmtree(p.run / "checkpoints"), p.predict()][1],
        "holds no checkpoint; train it first",
    ),
    "checkpoint: all damaged": (
        lambda p: [[cut(path) for path in (p.run / "checkpoints").glob("*.pth")], p.predict()][1],
        "holds no checkpoint",
    ),
    "checkpoint: cut": (lambda p: [cut(p.newest), p.predict(checkpoint=p.newest)][1], "cannot be read"),
    "checkpoint: empty": (lambda p: [put(p.newest, ""), p.predict(checkpoint=p.newest)][1], "cannot be read"),
    "checkpoint: text": (lambda p: p.predict(checkpoint=p.folder / "rows.py"), "cannot be read as a checkpoint"),
    "checkpoint: a picture": (lambda p: p.predict(checkpoint=p.photo), "photo.png is an image; the run comes first"),
    "checkpoint: the folder of a run's": (
        lambda p: p.predict(checkpoint=p.run / "checkpoints"),
        "checkpoints is a part of the run folder",
    ),
    "checkpoint: a folder, evaluated": (
        lambda p: p.evaluate("--checkpoint", p.run),
        "is a folder; give one of the files",
    ),
    "checkpoint: no weights in it": (
        lambda p: [p.content(lambda c: c.pop("state_dict")), p.predict()][1],
        "holds no state_dict",
    ),
    "checkpoint: weights of another network": (
        lambda p: [p.content(lambda c: c["state_dict"].popitem()), p.predict()][1],
        "is a checkpoint of another model",
    ),
    "checkpoint: alone, without its run": (
        lambda p: [shutil.move(p.newest, p.folder / "a.pth"), p.predict(checkpoint=p.folder / "a.pth")][1],
        "does not say what network it is of",
    ),
    "checkpoint: a malicious pickle": (
        lambda p: [p.newest.write_bytes(pickle.dumps(Trap(p.folder / "sprung"))), p.predict(checkpoint=p.newest)][1],
        "cannot be read as a checkpoint",
    ),
    "checkpoint: a malicious pickle among the weights": (
        lambda p: [p.content(lambda c: c["state_dict"].update(x=Trap(p.folder / "sprung"))), p.predict()][1],
        "cannot be read as a checkpoint",
    ),
    "checkpoint: a malicious pickle, exported": (
        lambda p: [p.content(lambda c: c.update(student=Trap(p.folder / "sprung"))), p.export()][1],
        "cannot be read as a checkpoint",
    ),
    "checkpoint: a malicious pickle, evaluated": (
        lambda p: [p.content(lambda c: c.update(meta=Trap(p.folder / "sprung"))), p.evaluate()][1],
        "cannot be read as a checkpoint",
    ),
    "run: a record of another version": (
        lambda p: [put(p.run / "params.json", json.dumps({"row": "x"})), p.evaluate()][1],
        "params.json lacks",
    ),
    "run: no such folder": (lambda p: p.evaluate(run="nowhere"), "there is no run folder"),
    "evaluate: predictions below a file": (
        lambda p: p.evaluate("--predictions", p.photo / "new" / "x.json"),
        "x.json cannot be written (Not a directory); choose another file",
    ),
    "run: its data is gone": (lambda p: [shutil.rmtree(p.data), p.evaluate()][1], "is no longer at"),
}
PREDICTIONS = {
    "predict: a score above 1": (lambda p: p.predict("--score", 2), "score must be from 0 to 1"),
    "predict: a score that is no number": (lambda p: p.predict("--score", "nan"), "score must be from 0 to 1"),
    "predict: a negative mask threshold": (lambda p: p.predict("--mask", -1), "mask must be from 0 to 1"),
    "predict: tiles too small": (lambda p: p.predict("--tile", 10), "tile must be at least 32"),
    "predict: overlap as large as the tiles": (lambda p: p.predict("--tile", 64, "--overlap", 64), "below tile (64)"),
    "predict: no batch": (lambda p: p.predict("--batch", 0), "batch must be at least 1"),
    "predict: every 0th frame": (lambda p: p.predict("--every", 0), "every must be at least 1"),
    "predict: an unknown device": (lambda p: p.predict("--device", "gpu"), "'gpu' is not a device"),
    "predict: a device that is not there": (lambda p: p.predict("--device", "cuda:99"), "CUDA devices; use cpu"),
    "predict: boxes and tiles": (
        lambda p: [put(p.folder / "b.csv", "image,x1,y1,x2,y2,label\nphoto.png,1,1,9,9,\n"),
                   p.predict("--boxes", p.folder / "b.csv", "--tile", 64, "--overlap", 16)][1],
        "boxes and tile do not go together",
    ),
    "predict: no such boxes": (lambda p: p.predict("--boxes", p.folder / "b.csv"), "there is no file of boxes"),
    "predict: boxes of other images": (
        lambda p: p.predict("--boxes", p.annotations()),
        "no box is of an image that was given",
    ),
    "predict: no such image": (lambda p: p.predict(inputs=p.folder / "phtoo.png"), "did you mean 'photo.png'"),
    "predict: an address": (lambda p: p.predict(inputs="http://x.org/a.png"), "is an address"),
    "predict: no image by its name": (lambda p: p.predict(inputs=p.folder / "rows.py"), "neither an image nor"),
    "predict: a folder without images": (lambda p: p.predict(inputs=p.run), "holds no image"),
    "predict: a broken video": (
        lambda p: [put(p.folder / "film.mp4", "x"), p.predict(inputs=p.folder / "film.mp4")][1],
        "cannot be read by OpenCV",
    ),
    "predict: out is empty": (lambda p: [*p.predict(), "--out", ""], "out is empty; give a path"),
    "predict: out is a file": (lambda p: p.predict(out="rows.py"), "cannot be written"),
    "predict: out cannot be made": (lambda p: p.predict(out="/proc/nowhere"), "cannot be written"),
    "predict: out holds something else": (lambda p: p.predict(out="run"), "and no predictions; choose a new folder"),
    "export: out exists": (lambda p: p.export("photo.png"), "exists already"),
    "export: ONNX": (lambda p: p.export("x.onnx"), "ONNX is not supported"),
    "export: weights named as a program": (lambda p: p.export("x.ts"), "named as a TorchScript program"),
    "export: a program named as weights": (lambda p: p.export("x.pth", "--torchscript"), "a .pth file holds weights"),
    "label: a distance that is infinite": (
        lambda p: ["label", p.data, "--out", p.folder / "x.json", "--run", p.run, "--tolerance", "inf"],
        "tolerance must be a finite number, not inf",
    ),
    "label: no effect": (
        lambda p: ["label", p.data, "--out", p.folder / "x.json", "--run", p.run, "--tolerance", "2", "--rle"],
        "--tolerance has no effect with --rle",
    ),
    "guidance: no such group": (
        lambda p: ["guidance", p.run, "--group", "tiny"],
        "there is no group 'tiny'; choose one of all, small, medium, large, class",
    ),
    "inspect: the page is a folder": (lambda p: ["inspect", p.run, "--out", p.data], "is a folder; give a file"),
    "export: out is a folder": (lambda p: p.export("run"), "is a folder"),
    "export: out cannot be written": (lambda p: p.export("/proc/nowhere/x.pth"), "cannot be written"),
}  # fmt: skip


def run(arguments):
    """Returns the exit status and the lines on standard error, as a shell sees them."""
    with redirect_stdout(StringIO()):
        try:
            return main([str(argument) for argument in arguments])
        except SystemExit as stop:
            return stop.code


def expect(place, arguments, words, capsys):
    before = place.snapshot()
    assert run(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    sentence, rows = lines[0], lines[1:]
    assert words in sentence, sentence
    assert sentence.startswith(f"misa {arguments[0]}: ")
    assert sentence[-1] in ".?" or sentence.endswith("Its rows are:"), "is a sentence"
    assert bool(rows) == sentence.endswith(":"), lines
    assert all(row.startswith("  ") for row in rows), rows
    assert place.snapshot() == before, "something was written or lost"
    assert not (place.folder / "sprung").exists(), "code was run"


@pytest.mark.parametrize("name", DATA)
def test_data(place, name, capsys):
    spoil, words = DATA[name]
    spoil(place)
    expect(place, place.train(), words, capsys)


@pytest.mark.parametrize("name", TRAINING | CHECKPOINTS | PREDICTIONS)
def test_commands(place, name, capsys):
    make, words = (TRAINING | CHECKPOINTS | PREDICTIONS)[name]
    expect(place, make(place), words, capsys)


def test_the_matrix_is_large_enough():
    assert len(DATA) + len(TRAINING) + len(CHECKPOINTS) + len(PREDICTIONS) >= 40


def test_two_at_once(place, capsys):
    with locked(place.folder / "out", "out"):
        expect(place, place.predict(), "out is in use by another run", capsys)
    with locked(place.folder / "new"):
        expect(place, place.train(), "new is in use by another run", capsys)


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(place, capsys):
    cut(place.newest)
    assert main(place.predict("--score", 0)) == 0
    assert "epoch_8.pth is damaged; looking for the one before" in capsys.readouterr().out
    card = json.loads((place.folder / "out/predict.json").read_text())
    assert main(place.predict("--score", 0, checkpoint=place.run / "checkpoints/epoch_7.pth")) == 0
    assert json.loads((place.folder / "out/predict.json").read_text()) == card, "the same weights"


@pytest.mark.parametrize("method", [0, 99], ids=["whole", "a compression that does not exist"])
def test_a_checkpoint_with_a_damaged_directory_is_skipped(place, capsys, method):
    """zipfile raises many kinds for it."""
    content = bytearray(place.newest.read_bytes())
    entry = content.index(b"PK\x01\x02")  # of the first file in the archive's directory
    content[entry + 10] = method
    place.newest.write_bytes(content)
    found = newest(place.run)
    assert (found == place.newest) is (method == 0)
    assert ("epoch_8.pth is damaged" in capsys.readouterr().out) is (method != 0)


def test_a_strangers_unfinished_run_runs_no_code(place, capsys):
    """mmengine's own loader unpickles what our loader refuses."""
    params = json.loads((place.run / "params.json").read_text())
    values = params["experiment"] | {"data": "coco", "scenes": []}
    (place.run / "params.json").write_text(json.dumps(params | {"experiment": values}))
    (place.run / "metrics.json").unlink()
    place.content(lambda c: c.update(message_hub=Trap(place.folder / "sprung")))
    expect(place, place.train(work_dir="run"), "cannot be read as a checkpoint", capsys)


def test_mmengine_may_not_unpickle_either(place, monkeypatch):
    from misa.engine.training import train

    params = json.loads((place.run / "params.json").read_text())
    values = params["experiment"] | {"data": "coco", "scenes": []}
    (place.run / "params.json").write_text(json.dumps(params | {"experiment": values}))
    (place.run / "metrics.json").unlink()
    place.content(lambda c: c.update(message_hub=Trap(place.folder / "sprung")))
    monkeypatch.setattr(train, "read_checkpoint", lambda path: None)
    with pytest.raises(pickle.UnpicklingError):
        main(place.train(work_dir="run"))
    assert not (place.folder / "sprung").exists()


def test_the_trap_would_spring(tmp_path):
    """Otherwise the tests above would prove nothing."""
    torch.save({"x": Trap(tmp_path / "sprung")}, tmp_path / "x.pth")
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert (tmp_path / "sprung").is_dir()


def test_an_image_of_one_pixel_and_one_of_nothing(place):
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(place.photo)
    assert main(place.predict("--score", 0)) == 0
    assert np.asarray(Image.open(place.folder / "out/masks/photo.png")).shape == (1, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_damaged_inside_is_named(place, capsys, workers):
    """Only decoding shows it, after the check; torch puts the traceback of its process before the sentence."""
    for path in (place.data / "train2017").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    assert main(place.train("--workers", workers)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("misa train")]
    assert re.fullmatch(r"misa train: the image \S+\.png cannot be read, or not to its end; .* of the data\.", line)
