"""Examples hold what the losses see: the same colors, features, boxes and masks as in a training step."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from misa.data.synthetic import Scenes, draw_scene, named_scene
from misa.engine.explore import embedded, example_of, open_networks, trained
from misa.errors import UserError
from misa.losses.distillation import in_units_of_spread
from misa.models.misa import _shrink, union_of_boxes


@pytest.fixture(scope="module")
def networks(module_path):
    return trained(module_path / "run", data_root=module_path / "data", smoke=True)


def test_colors_are_those_of_the_loss():
    """`_shrink` is what MISA.loss feeds the pairwise loss with."""
    scene = draw_scene(Scenes(size=64), 3)
    example = embedded(scene, "scene")
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    images = torch.from_numpy((scene.image - mean) / std).permute(2, 0, 1)[None].float()
    assert_close(example.colors, _shrink(images, [(64, 64)], torch.zeros(1, 1, 16, 16, dtype=torch.bool)).images[0])
    boxes = torch.from_numpy(scene.boxes)
    assert torch.equal(example.box_masks().any(dim=0), union_of_boxes([boxes], torch.zeros(1, 1, 16, 16), 4)[0, 0])


@pytest.mark.slow
def test_features_are_the_networks_own(networks):
    example = networks.example(networks.image_ids()[0])
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    images = torch.from_numpy((example.image - mean) / std).permute(2, 0, 1)[None].float()
    features, factors = networks.teacher.prior(images)
    assert_close(example.features, features[0])
    assert_close(example.saliency_factors, factors)
    with torch.no_grad():
        dense = networks.student.mask_head.mask_feature_head(networks.student.extract_feat(images)[:4])
        assert_close(example.student, dense[0])
        answer = networks.student.adapter(dense)
    target = in_units_of_spread(features)
    learned = networks.experiment.distillation
    assert learned.unit == "spread"
    # What is compared in training, but for the units.
    expected = (target - answer).square().sum() * (features.square().sum() / target.square().sum())
    assert_close((example.features - example.adapted).square().sum(), expected, rtol=1e-4, atol=1e-4)
    assert example.size == tuple(example.features.shape[-2:]) == (32, 32)
    assert len(example.masks) == len(example.labels) == len(example.boxes) == len(example.coarse_masks())


@pytest.mark.slow
def test_padding_is_cut_off(networks):
    example = networks.scene(named_scene("odd_size"), "odd_size")
    assert example.features.shape[-2:] == example.student.shape[-2:] == example.colors.shape[-2:]


def test_a_turned_page_is_resized_as_in_the_test():
    example = example_of(np.zeros((100, 300, 3), np.uint8), short_side=64, long_side=96)
    assert example.size == (8, 24)
    assert example.stride == (12.5, 12.5)


def test_coarse_masks_are_the_majority_of_a_cell():
    masks = np.zeros((1, 8, 8), bool)
    masks[0, :4, :2] = masks[0, 4:, 4:] = True
    masks[0, 3, 1] = False  # 7 of 16 pixels
    example = example_of(np.zeros((8, 8, 3), np.uint8), short_side=8, masks=masks)
    assert example.coarse_masks()[0].tolist() == [[False, False], [False, True]]


@pytest.mark.slow
def test_an_unknown_image_is_a_sentence(networks):
    with pytest.raises(UserError, match="has no image 999; it has 4"):
        networks.example(999)


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(networks, capsys):
    again = trained(networks.folders[0], row="demo:misa")
    assert again.student is not None
    assert "training" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_teacher_alone(networks):
    alone = open_networks(networks.folders[1])
    assert alone.student is None
    example = alone.scene(named_scene("two_tone_object"), "two_tone_object")
    assert example.features is not None
    assert example.student is example.adapted is None


@pytest.mark.slow
def test_a_student_without_its_teacher_is_a_sentence(networks, tmp_path):
    networks.folders[0].rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(UserError, match=r"the teacher of .*elsewhere should be in"):
            open_networks(tmp_path / "elsewhere")
    finally:
        (tmp_path / "elsewhere").rename(networks.folders[0])
