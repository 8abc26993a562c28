"""The Python API: the quickstart, every form of image, and one-sentence errors for invalid ones."""

import json
import shutil
import subprocess
import sys
import traceback
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps
from scipy.ndimage import map_coordinates

import misa
from misa.api import SceneView, as_images, photograph
from misa.cli import main
from misa.data.check.image_files import look
from misa.engine.prediction.export import export_student
from misa.engine.reports.evaluate import evaluate
from misa.engine.reports.explore import trained
from misa.engine.runs.checkpoints import newest
from misa.errors import UserError, counted
from misa.ops.seed_affinity import SeedField
from tests.helpers import CPU


@pytest.fixture(scope="module")
def run(module_path):
    """demo:misa and its teacher, two training steps each."""
    trained(module_path / "misa", data_root=module_path / "data", smoke=True)
    return module_path / "misa"


@pytest.fixture(scope="module")
def photo(module_path):
    """An image file that is not square."""
    rng = np.random.default_rng(0)
    path = module_path / "photo.png"
    Image.fromarray(rng.integers(0, 255, (120, 200, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def teacher(run):
    return misa.load_teacher(run)


@pytest.fixture(scope="module")
def scene(teacher, photo):
    return teacher.see(photo, boxes=[[20, 30, 90, 100], [100, 10, 180, 60]], labels=list(teacher.classes[:2]))


def test_the_ten_lines(run, photo, tmp_path):
    student = misa.load(run)
    found = student(photo, score=0.0, mask=0.01)
    n = len(found)
    assert n > 0
    assert found.masks.shape == (n, 120, 200)
    assert found.masks.dtype == bool
    assert found.boxes.shape == (n, 4)
    assert found.scores.shape == (n,)
    assert set(found.labels) <= set(student.classes)
    found.plot().save(tmp_path / "overlay.png")
    with Image.open(tmp_path / "overlay.png") as written:
        assert written.size[0] >= 200

    teacher = misa.load_teacher(run)
    scene = teacher.see(photo, boxes=[[20, 30, 90, 100]], labels=[teacher.classes[0]])
    assert scene.affinity(seed=(60, 50), kind="sepa").shape == (120, 200)
    soft = scene.propagate(start="box", steps=5)
    assert soft.shape == (1, 120, 200)
    masks = soft >= 0.5 * soft.max(axis=(1, 2), keepdims=True)
    assert 0 < masks.sum() < 70 * 80 * 1.1, "about within the box"
    assert bytes(scene.explore().picture.value).startswith(b"\x89PNG")


def test_every_form_of_an_image_gives_the_same(run, photo):
    student = misa.load(run)
    with Image.open(photo) as file:
        picture = file.copy()
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = student(photo, score=0.0, mask=0.01)
    assert len(expected) > 0
    for form in (str(photo), picture, array, tensor, tensor.float() / 255):
        found = student(form, score=0.0, mask=0.01)
        np.testing.assert_array_equal(found.masks, expected.masks)
        np.testing.assert_array_equal(found.scores, expected.scores)
    for several in ([photo, array], tensor[None].repeat(2, 1, 1, 1), np.stack([array, array])):
        answers = student(several, score=0.0, mask=0.01)
        assert [answer.labels for answer in answers] == [expected.labels] * 2
    assert student([]) == []
    gray = array[..., 0]
    again = student(gray, score=0.0, mask=0.01)
    np.testing.assert_array_equal(again.scores, student(np.stack([gray] * 3, 2), score=0.0, mask=0.01).scores)


def test_given_boxes_get_the_masks_that_the_shell_writes(run, photo, tmp_path, capsys):
    student = misa.load(run)
    boxes, labels = [[20, 30, 90, 100], [100.5, 10, 180, 60], [20, 30, 90, 100]], list(student.classes[:3])
    rows = [f"photo.png,{','.join(map(str, box))},{label}" for box, label in zip(boxes, labels, strict=True)]
    (tmp_path / "boxes.csv").write_text("\n".join(["image,x1,y1,x2,y2,label", *rows, ""]))
    words = ["--boxes", str(tmp_path / "boxes.csv"), "--mask", "0.001"]
    assert main(["predict", str(run), str(photo), "--out", str(tmp_path / "out"), *words]) == 0
    shell = json.loads((tmp_path / "out" / "instances.json").read_text())["annotations"]
    table = pd.read_csv(tmp_path / "out" / "instances.csv")
    capsys.readouterr()
    found = student(photo, boxes=np.array(boxes), labels=labels, mask=0.001)
    assert len(found) > 0
    assert [row["segmentation"] for row in shell] == list(found.instances.runs)
    assert [student.classes[row["category_id"] - 1] for row in shell] == list(found.labels)
    np.testing.assert_allclose([row["score"] for row in shell], found.scores, atol=1e-6)
    assert (table["box"] - 1).tolist() == list(found.prompts)
    left = len(boxes) - len(found)
    assert capsys.readouterr().err == (
        f"warning: {counted(left, 'box has', 'boxes have')} no mask, the student found nothing there.\n" if left else ""
    )
    one, two = student([photo, photo], boxes=[boxes, torch.tensor(boxes[1])], labels=[labels, None], mask=0.001)
    assert (one.instances.runs, one.prompts) == (found.instances.runs, found.prompts)
    assert two.instances.runs == student(photo, boxes=[boxes[1]], mask=0.001).instances.runs
    assert student(photo, boxes=boxes[1], labels=student.classes[0], mask=0.001).labels in ((student.classes[0],), ())
    assert len(student(photo, boxes=[])) == 0
    capsys.readouterr()
    student([photo, photo], boxes=[[[-9, 30, 90, 100], [-1, 30, 90, 100]], [[20, 30, 90, 140]]], mask=0.001)
    assert "warning: 2 boxes reach more than a pixel beyond the image" in capsys.readouterr().err
    student(photo, boxes=[-9, 30, 90, 100], mask=0.001)
    assert "warning: 1 box reaches more than a pixel beyond the image" in capsys.readouterr().err


def test_boxes_of_a_detector_are_boxes(run, teacher, photo):
    """Tensors with a gradient, of half precision, or one a box; labels as arrays and columns of a table."""
    student, boxes = misa.load(run), [[20, 30, 90, 100], [100, 10, 180, 60]]
    labels = list(student.classes[:2])
    expected = student(photo, boxes=boxes, labels=labels, mask=0.001)
    seen = teacher.see(photo, boxes=boxes, labels=labels).example
    exact = torch.tensor(boxes, dtype=torch.float32, requires_grad=True)
    for given in (exact, exact.to(torch.bfloat16), list(exact), exact.detach().numpy(), pd.DataFrame(boxes)):
        for names in (labels, tuple(labels), np.array(labels), pd.Series(labels)):
            found = student(photo, boxes=given, labels=names, mask=0.001)
            assert (found.instances.runs, found.labels) == (expected.instances.runs, expected.labels)
            example = teacher.see(photo, boxes=given, labels=names).example
            assert example.labels == seen.labels
            np.testing.assert_array_equal(example.boxes, seen.boxes)
    both = student([photo, photo], boxes=[boxes, boxes], labels=np.array([labels, labels]), mask=0.001)
    assert [one.labels for one in both] == [expected.labels] * 2
    with pytest.raises(UserError, match="labels are classes, one for each box in their order"):
        teacher.see(photo, boxes=boxes, labels=set(labels))


def test_tables_of_results_have_one_form(run, photo):
    """Also of an image in which nothing is found, so that they can be joined."""
    student = misa.load(run)
    found, none = student(photo, score=0.0, mask=0.01).frame(), student(photo, score=1.0).frame()
    assert len(found) > 0 == len(none)
    assert (found.dtypes == none.dtypes).all()
    assert (pd.concat([none, found]).dtypes == found.dtypes).all()


def test_floats_may_exceed_0_and_1_by_rounding(photo):
    (exact,), _ = as_images(photo)
    pixels = exact.astype(np.float32) / 255
    (found,), _ = as_images(pixels * 1.0000002 - 1e-7)
    np.testing.assert_array_equal(found, exact)
    with pytest.raises(UserError, match=r"floats of 0 to 1; this one is float32 of 0 to 1\.1"):
        as_images(pixels * np.float32(1.1 / pixels.max()))


@pytest.mark.parametrize(
    ("several", "given", "words"),
    [
        (False, {"boxes": [[5, 5, 5, 9]]}, "the box [5.0, 5.0, 5.0, 9.0] has no area in the image of 200 x 120 pixels"),
        (False, {"boxes": [0.1, 0.1, 0.5, 1]}, "shares of the image, multiply x by its width"),
        (False, {"boxes": [[5, 5], [1]]}, "boxes must be an array (n 4)"),
        (False, {"boxes": [[5, 5, 16, 17]], "labels": "zebra"}, "the student knows no class 'zebra'; its classes are"),
        (False, {"boxes": [[5, 5, 16, 17]], "labels": [None, None]}, "1 box is given and 2 labels"),
        (False, {"boxes": [[5, 5, 16, 17]], "labels": 3}, "labels are classes, one for each box"),
        (False, {"boxes": [[5, 5, 16, 17]], "labels": {"a"}}, "one for each box in their order, not {'a'}"),
        (False, {"boxes": [[5, 5, 16, 17]], "labels": {"a": 1}}, "labels are classes, one for each box"),
        (False, {"labels": ["a"]}, "labels are those of given boxes"),
        (False, {"mask": 1.5}, "mask must be from 0 to 1"),
        (False, {"score": "0.3"}, "score must be from 0 to 1, not '0.3'"),
        (False, {"score": [0.3, 0.5]}, "score must be from 0 to 1, not [0.3, 0.5]"),
        (False, {"score": torch.tensor([0.3, 0.5])}, "score must be from 0 to 1, not tensor"),
        (False, {"score": None}, "score must be from 0 to 1, not None"),
        (True, {"boxes": [[5, 5, 16, 17]]}, "several images need boxes for each: a list of 2"),
        (True, {"boxes": [[[5, 5, 16, 17]]] * 2, "labels": "ab"}, "several images need labels for each: a list of 2"),
        (True, {"boxes": [[5, 5, 16, 17], [5, 5, 5, 9]]}, "image 1 of the list: the box"),
        (True, {"boxes": [[5, 5, 16, 17], None]}, "image 1 of the list has None for boxes; give [] if it has none"),
    ],
)
def test_wrong_boxes_are_a_sentence(run, photo, several, given, words):
    with pytest.raises(UserError) as error:
        misa.load(run)([photo, photo] if several else photo, **given)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_result_is_short_in_text_and_a_picture_in_a_notebook(run, photo, tmp_path):
    student = misa.load(run)
    found = student(photo, score=0.0, mask=0.01)
    assert len(found) > 0
    assert len(repr(found)) < 200
    assert repr(found).startswith(f"<{counted(len(found), 'instance')} in 120 x 200: ")
    assert repr(student(photo, score=1.0)) == "<0 instances in 120 x 200: nothing>"
    assert "data:image/png;base64," in found._repr_html_()
    assert found.labels[0] in found._repr_html_()
    assert found.save(tmp_path / "new" / "a.jpg").is_file()
    saved = json.loads(found.save(tmp_path / "a.json").read_text())
    assert len(saved["instances"]) == len(found)
    assert len(found.save(tmp_path / "a.csv").read_text().splitlines()) == len(found) + 1
    with pytest.raises(UserError, match=r"should end in \.png"):
        found.save(tmp_path / "a.tiff")
    assert "classes" in repr(student)


def test_a_bfloat16_tensor_is_an_image():
    values = torch.linspace(0, 1, 48).reshape(3, 4, 4).to(torch.bfloat16)
    expected = (values.double() * 255).round().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(as_images(values)[0][0], expected)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "F"])
def test_a_pil_image_of_more_than_8_bits_is_scaled_as_its_file_is(tmp_path, mode):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    expected = as_images(tmp_path / "ramp.png")[0][0]
    assert expected.mean() == 127.5
    if mode == "F":
        picture = Image.fromarray((ramp >> 8).astype(np.float32) / 255)
    else:
        picture = Image.frombytes(mode, ramp.shape, ramp.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    assert picture.mode == mode
    np.testing.assert_array_equal(as_images(picture)[0][0], expected)


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_a_photograph_with_an_orientation_is_read_alike_from_its_path_and_as_a_pil_image(tmp_path, suffix):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30, 0] = 255
    upright = Image.fromarray(pixels)
    orientation = upright.getexif()
    orientation[0x0112] = 6  # to be turned by 90 degrees
    upright.save(tmp_path / f"a.{suffix}", exif=orientation, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(tmp_path / f"a.{suffix}") as picture:
        seen = as_images(picture)[0][0]
    np.testing.assert_array_equal(seen, as_images(tmp_path / f"a.{suffix}")[0][0])
    assert seen.shape == ((40, 60, 3) if suffix == "webp" else (60, 40, 3))


def test_an_orientation_in_xmp_alone_turns_nothing(tmp_path):
    """Pillow turns by it and OpenCV, with which training reads, does not."""
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf tiff:Orientation="6"/></x:xmpmeta>'
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    plain = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(plain[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + plain[2:])
    with Image.open(tmp_path / "a.jpg") as picture:
        assert ImageOps.exif_transpose(picture).size == (40, 60)
        seen = as_images(picture)[0][0]
    assert seen.shape == (40, 60, 3)
    assert as_images(tmp_path / "a.jpg")[0][0].shape == (40, 60, 3)
    facts = look(tmp_path / "a.jpg", listed=(60, 40))
    assert (facts.size, facts.odd) == ((60, 40), ())


def test_an_array_may_be_reused_by_the_caller(run, photo):
    buffer = np.array(photo if isinstance(photo, np.ndarray) else as_images(photo)[0][0])
    found = misa.load(run)(buffer)
    before = found.image.copy()
    buffer[:] = 0
    np.testing.assert_array_equal(found.image, before)


def test_boxes_that_are_only_commas_are_a_sentence(photo):
    with pytest.raises(UserError, match="write a box as x1 y1 x2 y2 label"):
        photograph(photo, ",")


def test_a_pgm_of_16_bits_is_read_alike_from_its_path_and_as_a_pil_image(tmp_path):
    """Pillow opens it in mode "I", of 32 bits."""
    ramp = np.arange(65536, dtype=">u2").reshape(256, 256)
    (tmp_path / "ramp.pgm").write_bytes(b"P5 256 256 65535\n" + ramp.tobytes())
    with Image.open(tmp_path / "ramp.pgm") as picture:
        assert picture.mode == "I"
        np.testing.assert_array_equal(as_images(picture)[0][0], as_images(tmp_path / "ramp.pgm")[0][0])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("nowhere.jpg", "there is no file nowhere.jpg; give an image"),
        (".", ". is a folder; give an image or a list of them"),
        ("", "the path of an image is empty; give one"),
        ("https://example.org/a.jpg", "https://example.org/a.jpg is an address; download it and give the file."),
        (np.array([["a", "b"]]), "8-bit values, or floats of 0 to 1; this one is <U1."),
        (np.array([[True, False]]), "8-bit values, or floats of 0 to 1; this one is bool."),
        (np.zeros((4, 4, 5), np.uint8), "is (H W 3), RGB"),
        (Image.new("I", (4, 4), 300), "8-bit values, or floats of 0 to 1; this one is int32 of 300 to 300"),
        (Image.new("F", (4, 4), 2), "8-bit values, or floats of 0 to 1; this one is float32 of 2 to 2"),
        (np.full((4, 4, 3), 300), "8-bit values, or floats of 0 to 1"),
        (np.full((4, 4, 3), np.nan), "8-bit values, or floats of 0 to 1"),
        (torch.zeros(4, 4, 3), "is (3 H W), RGB"),
        (np.zeros((0, 4, 3), np.uint8), "holds nothing"),
        (7, "not a int"),
    ],
)
def test_what_is_no_image_is_a_sentence(run, image, words):
    with pytest.raises(UserError) as error:
        misa.load(run)(image)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pil_image_that_cannot_be_decoded_is_a_sentence(tmp_path, photo):
    with Image.open(photo) as picture:
        picture.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    with Image.open(tmp_path / "cut.jpg") as cut, pytest.raises(UserError, match=r"cut\.jpg cannot be decoded \(image"):
        as_images(cut)
    with Image.open(photo) as closed:
        pass
    with pytest.raises(UserError, match="cannot be decoded"):
        as_images(closed)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (None, "is a text or a Path, not None"),
        (" ", "is empty; give one"),
        ("https://example.org/run", "https://example.org/run is an address"),
    ],
)
def test_what_is_no_path_is_a_sentence(path, words):
    with pytest.raises(UserError, match=f"^the path of a student {words}" if "://" not in words else words):
        misa.load(path)
    with pytest.raises(UserError, match=f"^the path or name of a teacher {words}" if "://" not in words else words):
        misa.load_teacher(path)


def test_a_device_is_named(run):
    for device in (None, "gpu", []):
        with pytest.raises(UserError, match="is not a device; give cpu, cuda, cuda:1, or auto"):
            misa.load(run, device=device)


def test_the_affinity_is_that_of_the_seeds_cell(scene):
    """Pixels of the image map to cells at stride 4; the result is the map of cells, enlarged."""
    color = scene.affinity((87, 58), "color")
    assert color.max() == pytest.approx(1, abs=0.35)
    assert scene.example.resized == (115, 192)  # 120 x 200 at the run's test size: 28.75 rows of cells
    cell = int(87.5 * 115 / 120 / 4), int(58.5 * 192 / 200 / 4)
    assert cell != (87 * 29 // 120, 58 * 48 // 200), "as if the cells ended with the image"
    colors = scene.example.colors
    distance = (colors - colors[:, cell[0], cell[1]][:, None, None]).square().sum(0)
    expected = torch.exp(-distance / scene.settings.local_bandwidth**2).numpy()
    rows = (np.arange(120) + 0.5) * 115 / 120 / 4 - 0.5  # a pixel's center in cells, whose centers are integers
    columns = (np.arange(200) + 0.5) * 192 / 200 / 4 - 0.5
    places = np.meshgrid(rows, columns, indexing="ij")
    np.testing.assert_allclose(color, map_coordinates(expected, places, order=1, mode="nearest"), atol=1e-4)
    for kind in ("feature", "saliency", "sepa"):
        values = scene.affinity((87, 58), kind)
        assert values.shape == (120, 200)
        assert 0 <= values.min() <= values.max() <= 1
    assert (scene.affinity((87, 58), "color", tree=True) != color).any()
    assert (scene.affinity((87, 58), "sepa", semantic_scale=0.5) != scene.affinity((87, 58), "sepa")).any()


def test_rounding_errors_beyond_0_and_1_are_cut_off(scene, monkeypatch):
    for value in (1.0000029, -3e-7, 0.25):
        masks = {"color": torch.full(scene.example.colors.shape[-2:], value)}
        monkeypatch.setattr(SeedField, "masks", lambda *_, masks=masks, **__: masks)
        found = scene.propagate(kind="color")
        assert 0 <= found.min() <= found.max() <= 1
        np.testing.assert_allclose(found, value, atol=1e-5)


def test_masks_stay_in_their_boxes_and_a_seed_gives_one(scene):
    masks = scene.propagate(start="box", steps=3)
    assert masks.shape == (2, 120, 200)
    outside = masks[0].copy()
    outside[26:104, 16:94] = 0  # with a margin of one cell around the box
    assert outside.max() == 0
    assert scene.propagate(start="blob", steps=3).shape == (2, 120, 200)
    assert scene.propagate(start=(60, 50), steps=3).shape == (1, 120, 200)
    assert (scene.propagate(steps=3) != scene.propagate(steps=9)).any()
    assert scene.propagate(reach="global", kind="color").shape == (2, 120, 200)
    assert scene.plot((60, 50)).get_size_inches()[0] > 1
    assert "120 x 200" in repr(scene)


def test_a_seed_in_no_box_needs_a_category_in_every_call(scene):
    seed = (2, 2)
    for call in (scene.affinity, scene.propagate, scene.plot):
        with pytest.raises(UserError, match="the seed is in no box; name the category with label="):
            call(seed)
        call(seed, label=scene.example.classes[-1])
        with pytest.raises(UserError, match="has no class 'nonsense'"):
            call(seed, label="nonsense")
    for start in ("box", "blob"):
        with pytest.raises(UserError, match="label is the category for a seed; boxes have the labels"):
            scene.propagate(start, label=scene.example.classes[0])


def test_wrong_input_to_a_teacher_is_a_sentence(teacher, scene, photo):
    name = teacher.classes[0]
    wrong = {
        "the box 20 30 900 100 .* is not within the image of 200 x 120": {"boxes": [20, 30, 900, 100], "labels": name},
        "the box 20 30 20 100 .* has no area": {"boxes": [20, 30, 20, 100], "labels": name},
        "the box 90 30 20 100": {"boxes": [[90, 30, 20, 100]], "labels": name},
        "the box nan": {"boxes": [[np.nan, 30, 20, 100]], "labels": name},
        "1 box, 0 labels": {"boxes": [[20, 30, 90, 100]]},
        r"boxes are \(n 4\)": {"boxes": [[1, 2, 3]], "labels": name},
        r"boxes are \(n 4\), .*, not array.* 100\]\]\]\)\.$": {
            "boxes": np.full((1, 2, 4), [20, 30, 90, 100]),
            "labels": [name] * 2,
        },
        "if they are shares of the image, multiply x by its width": {"boxes": [[0.1, 0.1, 0.5, 1]], "labels": name},
        "has no class 'dotted cros'; did you mean 'dotted cross'": {
            "boxes": [[20, 30, 90, 100]],
            "labels": "dotted cros",
        },
    }
    for words, arguments in wrong.items():
        with pytest.raises(UserError, match=words):
            teacher.see(photo, **arguments)
    with pytest.raises(UserError, match=r"the seed \(row 60, column 200\) is outside the image of 120 x 200"):
        scene.affinity((60, 200))
    for seed in (3, "12", ("1", "2"), (float("inf"), 5), (5, float("nan")), None, torch.zeros(2, 2)):
        with pytest.raises(UserError, match="a seed is"):
            scene.affinity(seed)
    with pytest.raises(UserError, match="there is no affinity 'colour'"):
        scene.affinity((60, 50), "colour")
    with pytest.raises(UserError, match="the seed is in no box; name the category"):
        scene.affinity((119, 0), "sepa")
    colors = SceneView(replace(scene.example, features=None, saliency_factors=None))
    assert colors.affinity((60, 50), "color").shape == (120, 200)
    with pytest.raises(UserError, match="'sepa' needs a teacher's features; without a teacher there is 'color'"):
        colors.affinity((60, 50))
    assert scene.affinity((119, 0), "sepa", label=name).shape == (120, 200)
    with pytest.raises(UserError, match="window must be odd"):
        scene.propagate(window=4)
    with pytest.raises(UserError, match="window is 1001, larger than the map of 29 x 48 cells"):
        scene.propagate(window=1001)
    assert scene.propagate(kind="color", window=29, steps=1).shape == (2, 120, 200)
    with pytest.raises(UserError, match="semantic_scale must be positive and finite, not inf"):
        scene.propagate(semantic_scale=float("inf"))
    for steps in (1.5, True, "a"):
        with pytest.raises(UserError, match=f"steps must be a whole number, not {steps!r}"):
            scene.propagate(steps=steps)
    with pytest.raises(UserError, match="balance must be 0 or more"):
        scene.affinity((119, 0), label=name, balance=-1)
    with pytest.raises(UserError, match="an affinity's settings are"):
        scene.propagate(step=3)
    with pytest.raises(UserError, match="a value of these is of the wrong type: balance='a'"):
        scene.affinity((60, 50), balance="a")
    with pytest.raises(UserError, match="there are no boxes to start from"):
        teacher.see(photo).propagate()
    with pytest.raises(UserError, match="one image at a time"):
        teacher.see([photo, photo])


def test_a_torchvision_network_is_a_teacher(photo, monkeypatch):
    teacher = misa.load_teacher("torchvision:deeplabv3_mobilenet_v3_large", weights=None)
    assert "cat" in teacher.classes
    assert len(teacher.classes) == 20
    scene = teacher.see(photo, boxes=[[20, 30, 90, 100]], labels=["cat"])
    assert scene.example.features.shape[0] == 256
    assert scene.affinity((60, 50), "saliency").shape == (120, 200)
    with pytest.raises(UserError, match="did you mean 'deeplabv3_resnet50'"):
        misa.load_teacher("torchvision:deeplabv3_resnet5")
    with pytest.raises(UserError, match="no run folder fcn_resnet50; did you mean 'torchvision:fcn_resnet50'"):
        misa.load_teacher("fcn_resnet50")
    with pytest.raises(UserError, match="there is no file of weights"):
        misa.load_teacher("torchvision:fcn_resnet50", weights="nowhere.pth")

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"cannot be downloaded \(no route to host\); where there is internet") as error:
        misa.load_teacher("torchvision:deeplabv3_resnet50")
    shown = "".join(traceback.format_exception(error.value))
    assert shown.count("Traceback") == 1, "the sentence has the reason; no chain of tracebacks above it"


def test_networks_of_a_smoke_run_say_so_once(run, capsys):
    """With the message of every other result of a smoke run; a teacher by its own folder."""
    printed = (
        "is a smoke run: two training steps on small images, to see that everything runs; its numbers mean nothing.\n"
    )
    capsys.readouterr()
    misa.load(run)
    assert capsys.readouterr().err == f"warning: {run} {printed}"
    (beside,) = run.parent.glob("teacher-*")
    for place in (run, beside):
        misa.load_teacher(place)
        assert capsys.readouterr().err == f"warning: {beside} {printed}"


def test_a_teacher_needs_its_checkpoint_alone(run, photo, tmp_path, monkeypatch):
    """Not the data that it was trained on, which may be on another machine, nor the student."""
    (beside,) = run.parent.glob("teacher-*")
    for folder in (run, beside):
        shutil.copytree(folder, tmp_path / folder.name)
        params = json.loads((tmp_path / folder.name / "params.json").read_text())
        params["data_root"] = str(tmp_path / "gone")
        (tmp_path / folder.name / "params.json").write_text(json.dumps(params))
    shutil.rmtree(tmp_path / run.name / "checkpoints")
    for folder in (run, beside):
        found, expected = (misa.load_teacher(place).see(photo) for place in (tmp_path / folder.name, folder))
        np.testing.assert_array_equal(*(each.affinity(seed=(60, 50), kind="feature") for each in (found, expected)))


def test_an_exported_student_is_scored_as_its_run(run, tmp_path):
    """It lacks FSD's adapter, which only training needs."""
    expected = evaluate(run, machine=CPU).metrics
    file = export_student(run, tmp_path / "student.pth")
    assert evaluate(run, checkpoint=file, machine=CPU).metrics == expected


def test_an_unfinished_run_says_so(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    capsys.readouterr()
    misa.load(tmp_path / "run")
    printed = capsys.readouterr().err
    assert "has not ended its training; what follows is of epoch 1 of 1" in printed
    assert "is a smoke run" in printed
    misa.load(newest(tmp_path / "run"))
    assert capsys.readouterr().err == ""
    for command in (["evaluate"], ["export", str(tmp_path / "student.pth")]):
        assert main([command[0], str(tmp_path / "run"), *command[1:]]) == 0
        assert "has not ended its training" in capsys.readouterr().err


def test_the_package_stays_light_and_names_what_it_has():
    code = (
        "import sys, misa; assert {'UserError', 'load', 'load_teacher'} <= set(dir(misa)); misa.UserError; "
        "assert not {'torch', 'mmdet', 'mmcv', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert misa.UserError is UserError
    with pytest.raises(AttributeError, match="it has UserError, load, load_teacher"):
        _ = misa.lod


def test_a_photograph_for_the_panels(run, photo):
    colors = photograph(photo, "20 30 90 100 a green cup; 100,10,180,60 a cat")
    assert colors.features is None
    assert colors.classes == ("a green cup", "a cat")
    assert colors.labels == (0, 1)
    assert colors.box_at(colors.middle()) == 0
    assert photograph(photo).middle() == tuple(side // 2 for side in photograph(photo).size)
    name = misa.load_teacher(run).classes[1]
    assert photograph(photo, f"20 30 90 100 {name}", str(run)).features is not None
    for boxes in ("20 30 90 cat", "cat", "20 30 90 x cat"):
        with pytest.raises(UserError, match="write a box as x1 y1 x2 y2 label"):
            photograph(photo, boxes)
