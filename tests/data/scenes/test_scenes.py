"""The embedded scenes: deterministic, hard where colour affinity fails, and without colour cues to the class."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import KDTree

from misa.data.scenes.arrange import arrange, visible
from misa.data.scenes.scenes import MODES, NAMED_SCENES, Scene, Scenes, draw_scene, named_scene
from misa.data.scenes.shapes import stamp

COUNT = 400


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return [draw_scene(Scenes(), index) for index in range(COUNT)]


def same(one: Scene, other: Scene) -> bool:
    return (
        np.array_equal(one.image, other.image)
        and np.array_equal(one.masks, other.masks)
        and np.array_equal(one.labels, other.labels)
        and one.modes == other.modes
    )


def test_a_scene_depends_on_seed_split_and_index_only(drawn: list[Scene]) -> None:
    many = Scenes(train=5000, val=3)
    assert all(same(draw_scene(many, index), drawn[index]) for index in (17, 3, 0))
    assert not same(draw_scene(many, 0, "val"), drawn[0])
    assert not same(draw_scene(replace(many, seed=1), 0), drawn[0])
    assert not same(drawn[0], drawn[1])


def test_scenes_are_well_formed(drawn: list[Scene]) -> None:
    for scene in drawn:
        n = len(scene.labels)
        assert 1 <= n <= 4
        assert scene.image.shape == (128, 128, 3)
        assert scene.image.dtype == np.uint8
        assert scene.masks.shape == (n, 128, 128)
        assert (scene.masks.sum(axis=0) <= 1).all(), "visible parts do not overlap"
        assert (scene.masks.sum(axis=(1, 2)) >= 24).all()
        assert len(scene.modes) == n
        assert set(scene.modes) <= set(MODES)


def test_boxes_are_tight(drawn: list[Scene]) -> None:
    for scene in drawn[:50]:
        for mask, box in zip(scene.masks, scene.boxes, strict=True):
            rows, columns = ndimage.find_objects(mask.astype(int))[0]
            assert box.tolist() == [columns.start, rows.start, columns.stop, rows.stop]


@pytest.mark.parametrize(("camouflage", "contrast"), [(0.3, 0.3), (0.5, 0.0), (0.0, 1.0)])
def test_modes_come_in_the_asked_shares(camouflage: float, contrast: float) -> None:
    scenes = Scenes(size=48, camouflage=camouflage, contrast=contrast, clutter=0)
    modes = [mode for index in range(300) for mode in draw_scene(scenes, index).modes]
    for mode, share in (("camouflage", camouflage), ("contrast", contrast)):
        spread = np.sqrt(share * (1 - share) / len(modes))
        assert abs(modes.count(mode) / len(modes) - share) <= 4 * spread


def _colours(scene: Scene, index: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the mean colour of an object and of the background within 6 pixels of it, 0 to 1."""
    mask = scene.masks[index]
    ring = ndimage.distance_transform_edt(~mask) <= 6
    ring &= ~scene.masks.any(axis=0)
    if ring.sum() < 60:
        return None
    return scene.image[mask].mean(axis=0) / 255, scene.image[ring].mean(axis=0) / 255


def test_only_camouflaged_objects_have_the_colour_of_their_surroundings(drawn: list[Scene]) -> None:
    steps: dict[str, list[float]] = {mode: [] for mode in MODES}
    for scene in drawn:
        for index, mode in enumerate(scene.modes):
            if (pair := _colours(scene, index)) is not None:
                steps[mode].append(float(np.linalg.norm(pair[0] - pair[1])))
    assert np.quantile(steps["camouflage"], 0.99) < 0.04
    assert np.quantile(steps["plain"], 0.01) > 0.25


def test_contrasting_objects_have_two_parts(drawn: list[Scene]) -> None:
    # Averages over 8 pixels remove the texture and leave the difference between the parts.
    spread: dict[str, list[float]] = {mode: [] for mode in MODES}
    for scene in drawn:
        light = scene.image.mean(axis=2) / 255
        for mask, mode in zip(scene.masks, scene.modes, strict=True):
            share = ndimage.gaussian_filter(mask.astype(float), 4)[mask]
            spread[mode].append(float((ndimage.gaussian_filter(light * mask, 4)[mask] / share).std()))
    assert np.median(spread["contrast"]) > 5 * np.median(spread["plain"])
    assert np.median(spread["contrast"]) > 5 * np.median(spread["camouflage"])


def test_camouflaged_objects_differ_by_texture(drawn: list[Scene]) -> None:
    for scene in drawn[:100]:
        light = scene.image.mean(axis=2) / 255
        fine = (light - ndimage.gaussian_filter(light, 3)) ** 2
        outside = ~ndimage.binary_dilation(scene.masks.any(axis=0), iterations=4)
        for mask, mode in zip(scene.masks, scene.modes, strict=True):
            if mode == "camouflage":
                assert fine[mask].mean() > 3 * np.median(fine[outside])


def _nearest(features: np.ndarray, labels: np.ndarray, k: int = 15) -> float:
    """Returns the accuracy of k nearest neighbours, fitted on the first half, evaluated on the second."""
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    half = len(labels) // 2
    _, near = KDTree(features[:half]).query(features[half:], k=k)
    votes = np.apply_along_axis(np.bincount, 1, labels[:half][near], minlength=labels.max() + 1)
    return float((votes.argmax(axis=1) == labels[half:]).mean())


def test_colour_tells_nothing_about_the_class(drawn: list[Scene]) -> None:
    labels = np.concatenate([scene.labels for scene in drawn])
    objects = [(scene.image[mask] / 255) for scene in drawn for mask in scene.masks]
    colours = np.stack([pixels.mean(axis=0) for pixels in objects])
    chance = np.bincount(labels).max() / len(labels)
    spread = np.sqrt(chance * (1 - chance) / (len(labels) // 2))
    assert _nearest(colours, labels) <= chance + 3 * spread


def test_outline_and_texture_tell_the_class(drawn: list[Scene]) -> None:
    labels = np.concatenate([scene.labels for scene in drawn])
    rows = []
    for scene in drawn:
        light = scene.image.mean(axis=2) / 255
        fine = light - ndimage.gaussian_filter(light, 3)
        for mask in scene.masks:
            depth = ndimage.distance_transform_edt(mask).max() / np.sqrt(mask.sum())
            pattern = fine[mask] - fine[mask].mean()
            rows.append(
                [
                    depth,
                    (pattern**3).mean() / (pattern**2).mean() ** 1.5,
                    (pattern**4).mean() / (pattern**2).mean() ** 2,
                ]
            )
    assert _nearest(np.array(rows), labels) > 0.6


def test_boxes_are_not_masks(drawn: list[Scene]) -> None:
    boxes = np.concatenate([scene.boxes for scene in drawn])
    areas = np.concatenate([scene.masks.sum(axis=(1, 2)) for scene in drawn])
    fill = areas / ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    assert 0.45 < fill.mean() < 0.65
    assert (fill > 0.8).mean() < 0.05


@pytest.mark.parametrize("label", range(8))
def test_only_the_ring_has_a_hole(label: int) -> None:
    for seed in range(5):
        mask = stamp(label, 60, np.random.default_rng(seed)) >= 0.5
        hole = ndimage.binary_fill_holes(mask).sum() - mask.sum()
        assert (hole > 0.15 * mask.sum()) == (Scenes(classes=8).names[label] == "checked ring")


def test_small_and_medium_objects_and_large_ones_where_they_fit(drawn: list[Scene]) -> None:
    areas = np.concatenate([scene.masks.sum(axis=(1, 2)) for scene in drawn])
    assert 0.2 < (areas < 32**2).mean() < 0.8
    large = Scenes(size=256, clutter=0)
    assert max(draw_scene(large, index).masks.sum(axis=(1, 2)).max() for index in range(40)) > 96**2


def test_some_objects_of_one_class_touch() -> None:
    pairs = 0
    for index in range(40):
        scene = draw_scene(Scenes(objects=(2, 2), touching=1.0), index)
        if len(scene.labels) == 2:
            first, second = scene.masks
            near = (ndimage.binary_dilation(first, iterations=3) & second).any()
            pairs += bool(near and scene.labels[0] == scene.labels[1])
    assert pairs > 25


@pytest.mark.parametrize("least", [0.4, 0.8])
def test_occlusion_hides_a_part_but_not_too_much(least: float) -> None:
    shares = []
    for seed in range(60):
        pieces = arrange(
            np.random.default_rng(seed),
            size=(128, 128),
            objects=(3, 3),
            classes=4,
            scale=(0.3, 0.5),
            touching=0.0,
            occlusion=1.0,
            truncation=0.0,
            least_visible=least,
        )
        whole = np.stack([piece.mask for piece in pieces])
        shares += (visible(pieces, (128, 128)).sum(axis=(1, 2)) / whole.sum(axis=(1, 2))).tolist()
    assert min(shares) >= least
    assert np.mean(np.array(shares) < 1) > 0.3


@pytest.mark.parametrize("size", [32, (97, 131), (64, 200)])
@pytest.mark.parametrize("classes", [1, 8])
def test_any_size_and_number_of_classes(size: int | tuple[int, int], classes: int) -> None:
    scenes = Scenes(size=size, classes=classes)
    labels = set()
    for index in range(30):
        scene = draw_scene(scenes, index)
        assert scene.image.shape[:2] == scenes.shape
        assert (scene.masks.sum(axis=(1, 2)) >= 24).all()
        labels |= set(scene.labels.tolist())
    assert labels <= set(range(classes))
    assert len(labels) > classes / 2
    assert len(scenes.names) == classes


def test_no_objects_when_none_are_asked_for() -> None:
    scene = draw_scene(Scenes(objects=(0, 0)), 0)
    assert scene.masks.shape == (0, 128, 128)
    assert scene.boxes.shape == (0, 4)


def test_a_hundred_objects() -> None:
    scene = draw_scene(Scenes(size=256, objects=(100, 100), scale=(0.05, 0.06), clutter=0, touching=0, occlusion=0), 0)
    assert len(scene.labels) == 100


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 8}, "size must be a whole number"),
        ({"size": (128, 12.5)}, "size must be"),
        ({"train": 0}, "train must be a whole number, at least 1; got 0"),
        ({"val": True}, "val must be"),
        ({"classes": 9}, "classes must be a whole number, 1 to 8; got 9"),
        ({"camouflage": 0.6, "contrast": 0.6}, "may not exceed 1"),
        ({"contrast": -0.1}, "contrast must be a share from 0 to 1"),
        ({"occlusion": float("nan")}, "occlusion must be a share"),
        ({"objects": (4, 1)}, "objects must be (least, most)"),
        ({"objects": 3}, "objects must be"),
        ({"scale": (0.5, 2.0)}, "scale must be"),
        ({"wavelength": (0.0, 4.0)}, "wavelength must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Scenes(**settings)  # type: ignore[arg-type]
    assert words in str(error.value)


def test_settings_from_json_are_the_same() -> None:
    assert Scenes(size=[64, 96], objects=[1, 2]) == Scenes(size=(64, 96), objects=(1, 2))  # type: ignore[arg-type]


def test_wrong_split_and_index_are_named() -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'val'; got 'test'"):
        draw_scene(Scenes(), 0, "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index must be a whole number"):
        draw_scene(Scenes(), -1)


@pytest.mark.parametrize("name", NAMED_SCENES)
def test_named_scenes_are_the_same_each_time(name: str) -> None:
    assert same(named_scene(name), named_scene(name))
    assert all(mask.any() for mask in named_scene(name).masks)


def test_named_scenes_are_what_they_say() -> None:
    pair = named_scene("same_color_neighbors")
    for index in (0, 1):
        colours = _colours(pair, index)
        assert colours is not None
        assert np.linalg.norm(colours[0] - colours[1]) < 0.02
    assert named_scene("two_tone_object").modes == ("contrast",)
    x0, y0, x1, y1 = named_scene("one_pixel_box").boxes[1]
    assert (x1 - x0, y1 - y0) == (1, 1)
    assert len(named_scene("no_boxes").labels) == 0
    touching = named_scene("touching_boxes")
    left, right = touching.boxes
    assert left[2] == right[0]
    assert max(left[1], right[1]) < min(left[3], right[3])
    one, other = (touching.image[mask].mean(axis=0) for mask in touching.masks)
    assert np.abs(one - other).max() < 3
    h, w = named_scene("odd_size").image.shape[:2]
    assert h % 2 == 1
    assert w % 2 == 1


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="no scene named 'three_tone'; the names are same_color_neighbors, "):
        named_scene("three_tone")
