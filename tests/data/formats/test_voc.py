"""VOC 2012 and SBD as COCO annotations, on the small devkit and on a generated one."""

import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from scipy.io import savemat
from scipy.ndimage import find_objects

from misa.cli import main
from misa.data.formats import voc
from misa.data.formats.coco import find_layout
from misa.data.formats.plain_coco import convert
from misa.data.formats.voc import augmented, download_voc, read_sbd_objects, write_voc
from misa.data.label_maps import VOC_CLASSES
from misa.data.semantic import true_maps
from misa.errors import UserError

H, W = 20, 30


def devkit(root, names, *, train, val):
    """Write a devkit with an aeroplane (1) and a person (15) in each image, a void border between them."""
    root = root / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True)
    for name in names:
        Image.fromarray(np.full((H, W, 3), 90, np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
    for name in (*train, *val):
        index = np.zeros((H, W), np.uint8)
        index[2:10, 3:12], index[10:18, 3:12], index[9:11, 3:12] = 1, 2, 255
        classes = np.select([index == 1, index == 2, index == 255], [1, 15, 255]).astype(np.uint8)
        Image.fromarray(index).save(root / "SegmentationObject" / f"{name}.png")
        Image.fromarray(classes).save(root / "SegmentationClass" / f"{name}.png")
    for split, listed in (("train", train), ("val", val)):
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in listed))
    return root


def sbd(root, *, train, val):
    """Write SBD's folder, as MATLAB wrote it: a struct of a map and a column of classes."""
    (root / "inst").mkdir(parents=True)
    for split, listed in (("train", train), ("val", val)):
        (root / f"{split}.txt").write_text("".join(f"{name}\n" for name in listed))
        for name in listed:
            index = np.zeros((H, W), np.uint8)
            index[1:5, 1:9], index[8:12, 20:29] = 1, 2
            savemat(root / "inst" / f"{name}.mat", {"GTinst": {"Segmentation": index, "Categories": [[3], [20]]}})
    return root


A, B, C, D = "2007_000001", "2007_000002", "2008_000003", "2010_000004"


@pytest.fixture
def both(tmp_path):
    return (
        devkit(tmp_path, (A, B, C, D), train=(A,), val=(B,)),
        # SBD's own split is unrelated to VOC's: A and B are in it too.
        sbd(tmp_path / "benchmark_RELEASE" / "dataset", train=(A, C), val=(B, D)),
    )


def annotations(out, name):
    return json.loads((out / "annotations" / name).read_text())


def test_train_aug_is_train_with_all_of_sbd_that_is_not_scored_on(both, tmp_path, capsys):
    root, extra = both
    out = tmp_path / "out"
    assert main(["data", "voc", str(root.parent), "--sbd", str(root), "--out", str(out)]) == 2  # no inst there
    assert main(["data", "voc", str(root.parent), "--sbd", str(extra.parent), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "train_aug: 3 images (VOC 2012 has 10,582" in text
    assert "6 objects" in text
    truth = annotations(out, "instances_train2017.json")
    assert [image["file_name"] for image in truth["images"]] == [f"{A}.jpg", f"{C}.jpg", f"{D}.jpg"]
    assert truth["images"][1]["id"] == 2008000003
    by_image = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    # A has VOC's masks, with a void border; C has SBD's.
    assert [(a["category_id"], a["area"], a["bbox"]) for a in by_image[2007000001]] == [
        (1, 7 * 9, [3, 2, 9, 7]),
        (15, 7 * 9, [3, 11, 9, 7]),
    ]
    assert [(a["category_id"], a["area"]) for a in by_image[2008000003]] == [(3, 4 * 8), (20, 4 * 9)]
    assert [image["file_name"] for image in annotations(out, "instances_val2017.json")["images"]] == [f"{B}.jpg"]
    assert [category["name"] for category in truth["categories"]] == list(VOC_CLASSES)
    layout = find_layout(out)
    assert (layout.train.images / f"{C}.jpg").is_file()
    assert main(["check", str(out), "--no-picture"]) == 0
    # Label maps are VOC's if it has one, with the void border; SBD has none.
    maps = {true.name: true.make() for true in true_maps(layout.train, tuple(VOC_CLASSES))}
    assert {name: bool((labels == 255).any()) for name, labels in maps.items()} == {
        f"{A}.jpg": True, f"{C}.jpg": False, f"{D}.jpg": False
    }  # fmt: skip


def test_converted_data_keeps_vocs_label_maps(both, tmp_path):
    write_voc(both[0], tmp_path / "voc")
    convert(tmp_path / "voc", tmp_path / "plain")
    for layout in (find_layout(tmp_path / "voc"), find_layout(tmp_path / "plain")):
        for split in (layout.train, layout.val):
            assert [int((true.make() == 255).sum()) for true in true_maps(split, VOC_CLASSES)] == [18]


def test_the_official_counts_come_out_of_the_official_lists():
    """VOC's 1,464 and the 9,118 images of SBD that are in neither of VOC's lists; SBD's others add nothing."""
    voc_train = [f"t{i}" for i in range(1464)]
    voc_val = [f"v{i}" for i in range(1449)]
    outside = [f"s{i}" for i in range(9118)]
    assert len(augmented(voc_train, voc_val, voc_train[:1000] + voc_val[:700] + outside)) == 10582
    assert voc.COUNTS["train_aug"] == 10582


@pytest.mark.shared
def test_the_real_pngs_keep_every_object(shared, tmp_path):
    """Compared with SciPy's bounding boxes of the ids in the PNG, reading the result with pycocotools."""
    root = shared / "data" / "voc_mini" / "VOC2012"
    summaries = write_voc(root, tmp_path / "out", train="trainval")
    assert {s.name: s.images for s in summaries} == {"train": 2, "val": 1, "trainval": 3}
    truth = COCO(str(tmp_path / "out" / "annotations" / "voc2012_trainval.json"))
    for image in truth.dataset["images"]:
        index = np.asarray(Image.open(root / "SegmentationObject" / f"{image['file_name'][:-4]}.png"))
        found = truth.loadAnns(truth.getAnnIds(imgIds=[image["id"]]))
        numbers = [n for n in np.unique(index) if n not in (0, 255)]
        assert len(found) == len(numbers)
        extents = find_objects(np.where(index == 255, 0, index))
        for annotation, number in zip(found, numbers, strict=True):
            assert np.array_equal(truth.annToMask(annotation), index == number)
            assert annotation["area"] == (index == number).sum() == rle.area(annotation["segmentation"])
            rows, columns = extents[number - 1]
            x, y, w, h = annotation["bbox"]
            assert (x, y, x + w, y + h) == (columns.start, rows.start, columns.stop, rows.stop)


def test_an_existing_result_is_not_overwritten(both, tmp_path):
    write_voc(both[0], tmp_path / "out")
    with pytest.raises(UserError, match="already"):
        write_voc(both[0], tmp_path / "out")


def test_after_its_annotations_are_deleted_the_same_command_works(both, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_voc(both[0], out)
    first = {path.name: path.read_bytes() for path in (out / "annotations").iterdir()}
    shutil.rmtree(out / "annotations")
    with monkeypatch.context() as stopped:
        stopped.setattr(voc.os, "symlink", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_voc(both[0], out)
    assert not (out / "annotations").exists()
    write_voc(both[0], out)
    assert {path.name: path.read_bytes() for path in (out / "annotations").iterdir()} == first
    assert find_layout(out).train.images.resolve() == both[0] / "JPEGImages"


def test_what_stands_in_the_place_of_a_link_is_named_before_the_work(both, tmp_path):
    (tmp_path / "out" / "val2017").mkdir(parents=True)
    with pytest.raises(UserError, match=r"val2017 exists already, and is no link to .*JPEGImages"):
        write_voc(both[0], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["val2017"]


def damage_mat(root, extra):
    (extra / "inst" / f"{C}.mat").write_bytes((extra / "inst" / f"{C}.mat").read_bytes()[:150])


def drop_png(root, extra):
    (root / "SegmentationObject" / f"{A}.png").unlink()


def drop_image(root, extra):
    (root / "JPEGImages" / f"{C}.jpg").unlink()


def drop_mat(root, extra):
    (extra / "inst" / f"{D}.mat").unlink()


def cut_png(root, extra):
    path = root / "SegmentationClass" / f"{B}.png"
    path.write_bytes(path.read_bytes()[:60])


def foreign_mat(root, extra):
    savemat(
        extra / "inst" / f"{C}.mat", {"GTinst": {"Segmentation": np.full((H, W), 9, np.uint8), "Categories": [[1]]}}
    )


def other_size(root, extra):
    Image.fromarray(np.zeros((H, W + 1, 3), np.uint8)).save(root / "JPEGImages" / f"{D}.jpg")


def no_class(root, extra):
    Image.fromarray(np.zeros((H, W), np.uint8)).save(root / "SegmentationClass" / f"{A}.png")


def no_list(root, extra):
    (root / "ImageSets" / "Segmentation" / "val.txt").unlink()


def no_folder(root, extra):
    shutil.rmtree(root / "SegmentationObject")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_mat, rf"{C}\.mat cannot be read .*benchmark\.tgz"),
        (foreign_mat, rf"{C}\.mat contradicts itself: objects \[9\]"),
        (drop_mat, rf"{D}\.mat is missing"),
        (drop_png, rf"SegmentationObject.{A}\.png is missing; unpack"),
        (cut_png, rf"SegmentationClass.{B}\.png is (damaged|no readable image)"),
        (drop_image, rf"{C}\.jpg is missing; it is in a list and not on the disk"),
        (other_size, rf"{D}\.jpg has 31 x 20 pixels and its masks 30 x 20"),
        (no_class, rf"object 1 of .*{A}\.png has no class"),
        (no_list, "there is no list val"),
        (no_folder, "has no SegmentationObject"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_and_nothing_is_left(both, tmp_path, harm, message):
    harm(*both)
    with pytest.raises(UserError, match=message) as error:
        write_voc(both[0], tmp_path / "out", sbd=both[1])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_void_in_sbd_is_no_object(both):
    root = both[1]
    index = np.full((H, W), 255, np.uint8)
    index[:4] = 1
    savemat(root / "inst" / f"{C}.mat", {"GTinst": {"Segmentation": index, "Categories": [[7]]}})
    objects = read_sbd_objects(root, C)
    assert objects.classes == {1: 7}
    assert (objects.numbers > 0).sum() == 4 * W


def test_without_internet_the_cure_is_named(tmp_path, monkeypatch):
    import torchvision.datasets

    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", offline)
    with pytest.raises(UserError, match=r"could not be fetched .*by hand"):
        download_voc(tmp_path)


def test_what_torchvision_fetches_is_where_the_converter_looks(tmp_path, monkeypatch):
    """The two downloaders create these folders (torchvision 0.26); nothing is downloaded twice."""
    import torchvision.datasets

    monkeypatch.setattr(
        torchvision.datasets,
        "VOCSegmentation",
        lambda root, year, image_set, download: devkit(root, (A, B), train=(A,), val=(B,)),
    )
    monkeypatch.setattr(torchvision.datasets, "SBDataset", lambda root, mode, download: sbd(root, train=(A,), val=(B,)))
    found = download_voc(tmp_path)
    summaries = write_voc(found[0], tmp_path / "out", sbd=found[1])
    assert {s.name: s.images for s in summaries} == {"train": 1, "val": 1, "train_aug": 1}
