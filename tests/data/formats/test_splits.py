"""Which images a list of a split names, and the hash that splits off validation images."""

import pytest

from misa.data.formats.coco import DataError
from misa.data.formats.splits import Named, assign, by_hash


def lists(folder, **texts):
    folder = folder / "ImageSets" / "Main"
    folder.mkdir(parents=True)
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def assigned(home, *paths):
    """The splits of images by path, the faults of the lists, and what was said."""
    faults, said = [], []
    images = [Named(path, path.partition("/")[2].rpartition(".")[0]) for path in paths]
    splits, _ = assign(images, [home], lambda *fault, fatal=True: faults.append(fault), said.append)
    return dict(zip(paths, splits, strict=True)), faults, said


@pytest.mark.parametrize(
    "names", [("Train", "Validation", "Test"), ("training", "valid", "test"), ("train", "dev", "testing")]
)
def test_lists_have_all_accepted_names_of_splits(tmp_path, names):
    paths = [f"images/{k}.jpg" for k in range(3)]
    lists(tmp_path, **{name: [str(k)] for k, name in enumerate(names)})
    splits, faults, said = assigned(tmp_path, *paths)
    assert splits == {paths[0]: {"train"}, paths[1]: {"val"}, paths[2]: {"test"}}
    assert (faults, said) == ([], [])


def test_two_lists_of_one_split_are_refused(tmp_path):
    lists(tmp_path, val=["0"], valid=["1"])
    with pytest.raises(DataError, match=r"holds val\.txt and valid\.txt, both the val split by name"):
        assigned(tmp_path, "images/0.jpg", "images/1.jpg")


def test_an_image_of_another_folder_is_not_the_one_that_is_named(tmp_path):
    """day2/0 has no annotations, and day1/0 is another image."""
    lists(tmp_path, train=["day1/0", "day1/1"], val=["day2/0", "day2/2"])
    splits, faults, _ = assigned(tmp_path, "images/day1/0.jpg", "images/day1/1.jpg", "images/day2/2.jpg")
    assert list(splits.values()) == [{"train"}, {"train"}, {"val"}]
    (fault,) = faults
    assert "1 line names no annotated image, such as 'day2/0'" in fault


def test_a_foreign_folder_does_not_name_every_image(tmp_path):
    lists(tmp_path, train=["day1/0", "day2/0"], val=["day3/0", "day2/1"])
    splits, faults, _ = assigned(tmp_path, "images/day1/0.jpg", "images/day2/0.jpg", "images/day2/1.jpg")
    assert list(splits.values()) == [{"train"}, {"train"}, {"val"}]
    assert len(faults) == 1


@pytest.mark.parametrize("line", ["/elsewhere/voc/{}.jpg", "C:\\voc\\{}.jpg", "{}", "{} 1", "./{}.jpg", "x/{}"])
def test_folders_of_another_computer_do_not_matter(tmp_path, line):
    lists(tmp_path, train=[line.format(0)], val=[line.format(1)])
    splits, faults, _ = assigned(tmp_path, "images/0.jpg", "images/1.jpg")
    assert (list(splits.values()), faults) == ([{"train"}, {"val"}], [])


def test_names_without_folders_do_not_make_those_of_other_lines_count(tmp_path):
    lists(tmp_path, train=["0"], val=["elsewhere/1"])
    splits, faults, _ = assigned(tmp_path, "images/day1/0.jpg", "images/day1/1.jpg")
    assert (list(splits.values()), faults) == ([{"train"}, {"val"}], [])


def test_of_equal_names_the_one_with_the_folders_is_meant(tmp_path):
    lists(tmp_path, train=["/data/day1/0.jpg"], val=["/data/day2/0.jpg"])
    splits, _, _ = assigned(tmp_path, "images/day1/0.jpg", "images/day2/0.jpg")
    assert list(splits.values()) == [{"train"}, {"val"}]


@pytest.mark.parametrize("name", ["frame.png", "image.png", "0.png", "front.jpg"])
def test_equal_names_in_many_folders_are_split_by_their_folders(name):
    """A hash of the name alone put all of them into one split."""
    val = by_hash([f"case{k}/{name}" for k in range(300)], lambda text: None).count("val")
    assert 15 < val < 50


def test_more_videos_of_numbered_frames_move_no_image():
    before, added = ([f"v{k}/{i:03}.jpg" for i in range(200)] for k in range(2))
    said = []
    assert by_hash([*before, *added], said.append)[:200] == by_hash(before, said.append)


def test_an_image_stays_in_its_split_when_its_folder_changes():
    names = [f"{k}.jpg" for k in range(200)]
    assert by_hash(names, print) == by_hash([f"a/{name}" for name in names], print)
