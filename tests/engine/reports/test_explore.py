"""Examples hold the inputs of the losses: the same colors, features, boxes and masks as in a training step."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch.testing import assert_close

from misa.cli import main
from misa.data.scenes.scenes import Scenes, draw_scene, named_scene
from misa.engine.reports.explore import FeatureExtractor, Networks, example_of, open_networks, trained
from misa.engine.training.train import train
from misa.errors import UserError
from misa.experiment import TINY_MASK2FORMER, Affinity, Augmentation, Experiment
from misa.losses.distillation import in_units_of_spread
from misa.losses.inputs import shrink, union_of_boxes
from misa.models.students.table import model_config
from misa.ops.readings import Classifier
from tests.helpers import CPU


@pytest.fixture(scope="module")
def networks(module_path):
    return trained(module_path / "run", data_root=module_path / "data", smoke=True)


def test_colors_are_those_of_the_loss():
    """`shrink` gives the colors that MISA.loss passes to the pairwise loss."""
    scene = draw_scene(Scenes(size=64), 3)
    example = example_of(scene.image, short_side=64, boxes=scene.boxes.astype(np.float64))
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    images = torch.from_numpy((scene.image - mean) / std).permute(2, 0, 1)[None].float()
    assert_close(example.colors, shrink(images, [(64, 64)], torch.zeros(1, 1, 16, 16, dtype=torch.bool)).images[0])
    boxes = torch.from_numpy(scene.boxes)
    assert torch.equal(example.box_masks().any(dim=0), union_of_boxes([boxes], torch.zeros(1, 1, 16, 16), 4)[0, 0])


class _Averages(torch.nn.Module):
    """A teacher whose S is the padded input's mean over each cell of 4 x 4 pixels."""

    def prior(self, images):
        return torch.nn.functional.avg_pool2d(images, 4), torch.ones(1, 3)


@pytest.mark.parametrize("size", [(128, 160), (129, 161), (130, 162), (131, 163), (96, 250), (300, 411), (61, 97)])
@pytest.mark.parametrize("short_side", [128, 97])
def test_colors_features_masks_and_boxes_lie_over_each_other(size, short_side):
    """At any size of the resized image, which need not be a whole number of cells."""
    generator, gaps = np.random.default_rng(0), {"colors": [], "features": [], "masks": [], "boxes": []}
    height, width = size
    for _ in range(12):
        radius = generator.uniform(0.15, 0.25) * min(size)
        y, x = (generator.uniform(radius, side - radius) for side in size)
        disc = (np.arange(height)[:, None] + 0.5 - y) ** 2 + (np.arange(width)[None] + 0.5 - x) ** 2 <= radius**2
        image = np.where(disc[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
        extractor = FeatureExtractor(("disc",), Augmentation(test_short_side=short_side, long_side=1000), _Averages())
        box = np.array([[x - radius, y - radius, x + radius, y + radius]])
        example = extractor.see(image, boxes=box, labels=(0,), masks=disc[None])
        assert example.features.shape[-2:] == example.colors.shape[-2:] == example.size
        down, across = example.stride
        middle = np.array([y / down, x / across])
        for name, inside in (
            ("colors", example.colors[0] > 0),
            ("features", example.features[0] > 0),
            ("masks", example.coarse_masks()[0]),
            ("boxes", example.box_masks()[0]),
        ):
            gaps[name].append(inside.nonzero().double().mean(0).numpy() + 0.5 - middle)
    for name, found in gaps.items():
        assert np.abs(np.mean(found, axis=0)).max() < 0.12, name
    scale = short_side / min(size)
    assert example.resized == (int(height * scale + 0.5), int(width * scale + 0.5))
    assert example.stride == (height / example.resized[0] * 4, width / example.resized[1] * 4)


def test_a_notebook_is_told_what_a_run_lacks(networks):
    assert networks.requiring(teacher=True, distilled=True) is networks
    alone = replace(networks, teacher=None)
    with pytest.raises(UserError, match=r"has no semantic teacher; give a run of a row such as demo:misa"):
        alone.requiring(teacher=True)
    plain = replace(networks, experiment=networks.experiment.but(distillation=None))
    for lacking in (alone, plain, replace(networks, student=None)):
        with pytest.raises(UserError, match=r"has no student that a teacher was distilled into"):
            lacking.requiring(distilled=True)


def test_a_smoke_run_says_so_whenever_it_is_opened(networks, capsys):
    trained(networks.folders[0])
    assert "is a smoke run" in capsys.readouterr().err


def test_an_image_beyond_the_last_is_not_another_one(networks):
    ids = networks.image_ids()
    last = len(ids) - 1
    assert networks.nth(last).name == f"image {ids[last]}"
    for place in (len(ids), -1):
        with pytest.raises(UserError, match=f"place is {place}, and there are {len(ids)} validation images"):
            networks.nth(place)


class _Teacher(torch.nn.Module):
    """A teacher with S of two channels computed from colors, and a last layer."""

    layer = Classifier(torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([0.5, 0.5]), torch.zeros(2), torch.zeros(()))

    def prior(self, images):
        return images[:, :2, ::4, ::4], self.layer.factors

    def last_layer(self):
        return self.layer


@pytest.mark.parametrize(
    ("affinity", "read"),
    [(Affinity(saliency=True, semantic_values="probability"), True), (Affinity(saliency=True), False), (None, False)],
)
def test_saliency_is_read_as_the_row_reads_it(affinity, read):
    scene = draw_scene(Scenes(size=64), 3)
    extractor = FeatureExtractor(("one", "two"), Augmentation(test_short_side=64), _Teacher(), affinity=affinity)
    example = extractor.see(scene.image)
    assert (example.reading is not None) == read
    if read:
        k = torch.cat([_Teacher.layer.factors, _Teacher.layer.background[None]])
        shares = torch.einsum("cd,dhw->chw", k, example.features).softmax(0)[:2]
        values = (shares - shares.mean((1, 2), keepdim=True)) / shares.std((1, 2), correction=0, keepdim=True)
        assert_close(example.reading.values, values, atol=1e-5, rtol=1e-4)


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
    # In training S is divided by its spread in the batch, which is not that of any one image.
    assert networks.experiment.distillation.unit == "spread"
    batch = networks.image_ids()[: networks.experiment.schedule.batch]
    several = torch.stack([networks.example(key).features for key in batch])
    unit = several.norm() / in_units_of_spread(several).norm()
    assert len(batch) > 1
    assert_close(example.adapted, answer[0] * unit, rtol=1e-4, atol=1e-4)
    assert_close(networks.unit, float(unit), rtol=1e-4, atol=0)
    assert example.size == tuple(example.features.shape[-2:]) == (32, 32)
    assert len(example.masks) == len(example.labels) == len(example.boxes) == len(example.coarse_masks())


@pytest.mark.slow
def test_padding_is_cut_off(networks):
    example = networks.scene(named_scene("odd_size"), "odd_size")
    assert example.features.shape[-2:] == example.student.shape[-2:] == example.colors.shape[-2:]


def test_a_turned_page_is_resized_as_in_the_test():
    example = example_of(np.zeros((100, 300, 3), np.uint8), short_side=64, long_side=96)
    assert example.size == (8, 24)
    assert example.cells == (8, 24)
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
def test_a_finished_run_reads_the_data_it_is_given(networks, tmp_path):
    """Data that has moved: its new place, or the folder that holds the embedded data, as when training."""
    root = networks.source.root
    root.rename(tmp_path / root.name)
    try:
        for place in (tmp_path, tmp_path / root.name):
            again = trained(networks.folders[0], data_root=place)
            assert again.source.root == tmp_path / root.name
            assert len(again.example(again.image_ids()[0]).boxes)
        with pytest.raises(UserError, match="is no longer at"):
            trained(networks.folders[0])
    finally:
        (tmp_path / root.name).rename(root)


@pytest.mark.slow
def test_a_teacher_alone(networks):
    alone = open_networks(networks.folders[1])
    assert alone.student is None
    example = alone.scene(named_scene("two_tone_object"), "two_tone_object")
    assert example.features is not None
    assert example.student is example.adapted is None


def test_a_scene_before_networks_of_fewer_classes():
    """As of photographs of two classes: the fourth class of the scenes is none of theirs."""
    scene = named_scene("two_tone_object")
    assert int(scene.labels[0]) == 3
    networks = Networks(Experiment(data="coco"), SimpleNamespace(classes=("person", "cat")), None, None, ())
    example = networks.scene(scene, "two_tone_object")
    assert [example.classes[label] for label in example.labels] == ["cat"]


@pytest.mark.slow
def test_a_student_without_its_teacher_is_a_sentence(networks, tmp_path):
    networks.folders[0].rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(UserError, match=r"the teacher of .*elsewhere should be in"):
            open_networks(tmp_path / "elsewhere")
    finally:
        (tmp_path / "elsewhere").rename(networks.folders[0])


def normalised(image):
    """Returns an image of a size that needs no resizing, normalised as the network's input."""
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    return torch.from_numpy((image - mean) / std).permute(2, 0, 1)[None].float()


@pytest.fixture(scope="module")
def mask2former(module_path):
    run = module_path / "mask2former"
    return trained(run, row="demo:mask2former_misa", data_root=module_path / "data", smoke=True)


@pytest.mark.slow
def test_a_mask2formers_feature_is_what_it_hands_over_in_training(mask2former):
    example = mask2former.example(mask2former.image_ids()[0])
    truth = InstanceData(bboxes=torch.tensor(example.boxes).float(), labels=torch.tensor(example.labels))
    with torch.no_grad():
        features = mask2former.student.training_output(normalised(example.image), [truth]).features
        assert_close(example.student, features[0])
        unit = mask2former.teacher.prior(normalised(example.image))[0].square().mean().sqrt()
        assert example.adapted.shape == example.features.shape
        answer = mask2former.student.adapter(features)[0]
    ratio = example.adapted / answer  # in the units of S, one factor for all
    assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=1e-3 * float(unit))


@pytest.mark.slow
def test_a_mask2former_has_all_its_figures(mask2former, tmp_path):
    given = [str(mask2former.folders[0]), "--only", "3,4,5", "--random", "1", "--worst", "1"]
    assert main(["figures", *given, "--out", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"figure3", "figure4", "figure5"}


@pytest.mark.parametrize("supervision", ["box", "mask"])
@pytest.mark.parametrize("student", ["solov2", "mask2former"])
def test_every_student_of_the_paper_has_a_feature(small_row, small_run, student, supervision):
    """It is the one from which masks are predicted, without the padding."""
    network = {"network": TINY_MASK2FORMER} if student == "mask2former" else {}
    row = small_row.but(student=student, supervision=supervision, affinity=None, **network)
    row = row.but(augmentation={"test_short_side": 52})
    model = MODELS.build(model_config(row, small_run.source.classes)).eval()
    example = Networks(row, small_run.source, None, model, ()).example(1)
    assert example.image.shape == (52, 70, 3)
    assert example.student.shape == (TINY_MASK2FORMER.feature_channels, 13, 17)
    padded = torch.zeros(1, 3, 64, 96)
    padded[:, :, :52, :70] = normalised(example.image)
    kept = []
    head = model.mask_head.mask_feature_head if student == "solov2" else model.panoptic_head.pixel_decoder
    with torch.no_grad(), head.register_forward_hook(lambda module, inputs, output: kept.append(output)):
        model.predict(padded, samples(padded))
    (dense,) = kept if student == "solov2" else kept[0][:1]
    assert_close(example.student, dense[0, :, :13, :17])


def samples(images):
    from mmdet.structures import DetDataSample

    size = images.shape[-2:]
    metainfo = {"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0), "batch_input_shape": size}
    return [DetDataSample(metainfo=metainfo)]


def test_a_student_without_a_feature_is_a_sentence(small_row, tmp_path):
    row = small_row.but(student="boxinst", affinity=None, schedule={"epochs": 1})
    run = train(row, data_root=tmp_path / "data", work_dir=tmp_path / "run", machine=CPU)
    with pytest.raises(UserError, match=r"is a boxinst, which has no dense feature .* give the run of a solov2"):
        open_networks(run.folder)
