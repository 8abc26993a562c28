"""For any input, readers and public functions return a usable result or raise the documented UserError (ValueError)."""

import io
import json
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from misa.data.check.annotations import check_coco
from misa.data.check.report import Report
from misa.data.formats.convert import open_layout, read_boxes
from misa.data.formats.csv_boxes import CSV
from misa.data.formats.parts import IMAGES, Part
from misa.data.formats.voc_xml import VOC
from misa.data.images import Picture, find_inputs, read_image
from misa.engine.prediction.export import export_student
from misa.engine.prediction.known_boxes import find_boxes
from misa.engine.prediction.predict import Options
from misa.engine.prediction.student import Instances, Student, find, load_student
from misa.engine.reports.inspection import inspect_run
from misa.engine.runs.checkpoints import CARD, read_checkpoint
from misa.errors import UserError

FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
CELL = st.sampled_from(["a.png", "1", "-3", "2.5", "nan", "1e400", "", " ", "cat", "x,y", '"', "é", "val", "a\nb"])


@pytest.fixture(scope="module")
def student(small_run):
    return load_student(small_run.folder, device="cpu")


@pytest.fixture(scope="module")
def exported(student, module_path):
    return export_student(student, module_path / "student.pth")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def spoil(data, content):
    """Returns bytes with some changed, cut, doubled or added."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        way = data.draw(st.sampled_from(["change", "cut", "drop", "add"]))
        if way == "change" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif way == "cut":
            del content[at:]
        elif way == "drop":
            del content[at : at + data.draw(st.integers(1, 40))]
        else:
            content[at:at] = data.draw(st.binary(max_size=8))
    return bytes(content)


@FUZZ
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(st.lists(CELL, max_size=8), max_size=6).map(
            lambda rows: ("image,x1,y1,x2,y2,label\n" + "\n".join(map(",".join, rows))).encode()
        ),
        st.lists(st.lists(CELL, max_size=7), max_size=6).map(lambda rows: "\n".join(map(";".join, rows)).encode()),
    )
)
def test_csv(tmp_path, content):
    folder = tmp_path / "csv"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    file = folder / "boxes.csv"
    file.write_bytes(content)
    faults = []
    with suppress(UserError):
        for entry in CSV.entries(
            Part((file,), file.parent, "", file.parent), lambda *fault, fatal=True: faults.append(fault)
        ):
            assert entry.file
            assert all(np.isfinite(o.box).all() and o.label for o in entry.objects)
    assert all(len(fault) == 4 for fault in faults)
    with suppress(UserError):
        assert all(len(boxes) == len(labels) for boxes, labels in read_boxes(file).values())
    with suppress(UserError):
        layout = open_layout(file)
        for split in (layout.train, layout.val):
            assert isinstance(check_coco(*split, verify_images="open", purpose="boxes"), Report)


XML = (
    "<annotation><filename>a.png</filename><size><width>9</width><height>9</height></size><object><name>cat</name>"
    "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax><ymax>6</ymax></bndbox></object></annotation>"
)


@FUZZ
@given(st.data())
def test_xml(tmp_path, data):
    root = tmp_path / "voc"
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    (root / "JPEGImages").mkdir(exist_ok=True)
    Image.new("RGB", (9, 9)).save(root / "JPEGImages" / "a.png")
    file = root / "Annotations" / "a.xml"
    text = XML
    for value in ("1", "9", "cat", "a.png"):
        if data.draw(st.booleans()):
            text = text.replace(f">{value}<", f">{data.draw(CELL).replace('<', '')}<")
    file.write_bytes(spoil(data, text.encode()) if data.draw(st.booleans()) else text.encode())
    faults = []
    for entry in VOC.entries(
        Part((file,), root / "JPEGImages", "", root), lambda *fault, fatal=True: faults.append(fault)
    ):
        assert all(np.isfinite(o.box).all() and o.label for o in entry.objects)
    with suppress(UserError):
        layout = open_layout(root)
        report = check_coco(*layout.train, verify_images="open")
        assert report.usable or report.fatal
        assert not faults or not report.usable, "a fault of a file is never forgotten"


def picture(suffix):
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (12, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, format={".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper()))
    return content.getvalue()


PICTURES = {suffix: picture(suffix) for suffix in (".png", ".jpg", ".bmp", ".webp", ".tif")}


@FUZZ
@given(st.sampled_from(list(PICTURES)), st.data())
def test_images(tmp_path, suffix, data):
    """Pillow, used for checking, and OpenCV, used for reading, agree on what is an image, or a fault is reported."""
    path = tmp_path / f"x{suffix}"
    path.write_bytes(spoil(data, PICTURES[suffix]))
    with suppress(UserError):
        image = read_image(path)
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert 0 not in image.shape


@FUZZ
@given(st.lists(st.text("ab.~ -_'é\u202e", min_size=1, max_size=5), max_size=5), st.sampled_from(IMAGES))
def test_names_of_files(tmp_path, names, suffix):
    root = tmp_path / "names"
    shutil.rmtree(root, ignore_errors=True)
    (root / "inner").mkdir(parents=True)
    for name in names:
        (root / f"{name}{suffix}").write_bytes(b"")
        (root / "inner" / f"{name}.png").write_bytes(b"")
    with suppress(UserError):
        found = find_inputs([root, root / "inner"])
        assert all(isinstance(item, Picture) for item in found)
        assert len({item.name for item in found}) == len(found)
        assert not any(item.name.startswith("/") or ".." in item.name.split("/") for item in found)


@FUZZ
@given(st.data())
def test_checkpoints(exported, tmp_path, data):
    path = tmp_path / "x.pth"
    whole = exported.read_bytes()
    # The pickle is at the beginning, the zip directory at the end; in between there are only numbers.
    head, tail = whole[:20_000], whole[-20_000:]
    path.write_bytes(
        spoil(data, head) + whole[20_000:-20_000] + (spoil(data, tail) if data.draw(st.booleans()) else tail)
    )
    with suppress(UserError):
        assert isinstance(read_checkpoint(path)["state_dict"], dict)


def places(node, path=()):
    steps = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    return [place for key, inner in steps for place in [(*path, key), *places(inner, (*path, key))]]


@settings(FUZZ, max_examples=40)
@given(st.data())
def test_cards_of_strangers(exported, tmp_path, data):
    content = torch.load(exported, weights_only=True)
    values = json.loads(content[CARD])
    for _ in range(data.draw(st.integers(1, 2))):
        *way, key = data.draw(st.sampled_from(places(values)))
        node = values
        for step in way:
            node = node[step]
        node[key] = data.draw(JUNK)
    content[CARD] = json.dumps(values)
    torch.save(content, tmp_path / "x.pth")
    with suppress(UserError):
        student = load_student(tmp_path / "x.pth", device="cpu")
        assert isinstance(student, Student)
        assert isinstance(find(student, [np.zeros((20, 20, 3), np.uint8)])[0], Instances)


@settings(FUZZ, max_examples=30)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 4))), st.floats(0, 1))
def test_arrays_of_images(student, image, score):
    with suppress(UserError):
        (found,) = find(student, [image], score=score, mask=0.05)
        assert isinstance(found, Instances)
        assert found.masks().shape == (len(found), *image.shape[:2])
        assert (found.scores >= score).all()


@settings(FUZZ, max_examples=40)
@given(
    st.lists(st.lists(st.floats(width=32) | st.integers(-5, 60), min_size=3, max_size=5), max_size=4),
    st.lists(st.sampled_from([None, "dotted cross", "zebra"]), max_size=4) | st.none(),
)
@example([[0, 0, 40, 30]] * 3, None)
@example([[0.0, 0.0, 1e-6, 1e-6]], None)
def test_boxes(student, boxes, labels):
    image = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    with suppress(UserError):
        found = find_boxes(student, image, boxes, labels, mask=0.05)
        assert len(set(found.prompts)) == len(found) <= len(boxes)
        assert all(mask.any() for mask in found.masks())


@FUZZ
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("score", "mask", "tile", "overlap", "every", "masks"), JUNK)))
def test_options(values):
    with suppress(UserError):
        options = Options(**values)
        assert 0 <= options.score <= 1
        assert options.tile is None or 0 <= options.overlap < options.tile


@settings(FUZZ, max_examples=40)
@given(st.data())
def test_predictions_to_inspect(small_run, tmp_path, data):
    whole = json.loads((small_run.folder / "predictions" / "val.json").read_text())[:3]
    for _ in range(data.draw(st.integers(1, 3))):
        *way, key = data.draw(st.sampled_from(places(whole)))
        node = whole
        with suppress(TypeError, KeyError, IndexError):
            for step in way:
                node = node[step]
            node[key] = data.draw(JUNK)
    (tmp_path / "x.json").write_text(json.dumps(whole))
    with suppress(UserError):
        assert inspect_run(small_run.folder, predictions=tmp_path / "x.json", out=None, resamples=0).errors
