"""The box-supervised student on edge cases of batches: it always trains, and never reads a mask."""

import json

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

import misa.models  # noqa: F401  (imports mmdet silently)
from misa.models.students.solov2 import cell_labels
from misa.models.students.table import model_config
from misa.rows import find_row

SIZE = (96, 128)


@pytest.fixture(scope="module")
def build():
    from mmdet.registry import MODELS

    def make(row="demo:box", classes=3):
        torch.manual_seed(0)
        model = MODELS.build(ConfigDict(model_config(find_row(row), tuple("abc"[:classes]))))
        model.init_weights()
        return model.train()

    return make


def batch(*images, masks=False):
    """Returns mmdet's samples for lists of (x1, y1, x2, y2, label)."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8) for _ in images]
    samples = []
    for boxes in images:
        rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5)
        sample = DetDataSample(metainfo={"img_shape": SIZE, "ori_shape": SIZE, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=rows[:, :4], labels=rows[:, 4].long())
        if masks:
            import numpy as np

            bitmaps = np.zeros((len(rows), *SIZE), dtype=np.uint8)
            for bitmap, (x1, y1, x2, y2, _) in zip(bitmaps, rows.int().tolist(), strict=True):
                bitmap[y1:y2, x1:x2] = 1
            sample.gt_instances.masks = BitmapMasks(bitmaps, *SIZE)
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def losses_and_gradients(model, data):
    model.zero_grad()
    data = model.data_preprocessor(data, True)
    losses = model.loss(data["inputs"], data["data_samples"])
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients


MANY = [(x, y, x + 9, y + 8, (x + y) % 3) for x in range(0, 110, 11) for y in range(0, 80, 8)]

BATCHES = {
    "one object an image": ([(10, 10, 60, 50, 0)], [(20, 30, 90, 80, 2)]),
    "an image without objects": ([(10, 10, 60, 50, 0)], []),
    "no object in the batch": ([], []),
    "a one-pixel box": ([(17, 9, 18, 10, 1)], [(0, 0, 128, 96, 1)]),
    "a hundred objects": (MANY, []),
    "two classes in one cell": ([(40, 40, 60, 60, 0), (41, 41, 61, 61, 1)], []),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("row", ["demo:box", "demo:projection", "demo:mask"])
def test_every_batch_trains(build, row, name):
    model = build(row)
    losses, gradients = losses_and_gradients(model, batch(*BATCHES[name], masks=row == "demo:mask"))
    assert all(torch.isfinite(value).all() for value in losses.values()), losses
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(MANY) == 100
    assert {n for n in trained if "backbone" in n} <= gradients.keys()


def test_without_objects_only_the_classifier_has_anything_to_learn(build):
    losses, _ = losses_and_gradients(build(), batch([], []))
    assert losses["loss_cls"] > 0
    assert all(value == 0 for name, value in losses.items() if name != "loss_cls")


def test_the_losses_do_not_depend_on_the_order_of_the_objects(build):
    model = build()
    model.eval()  # only the order of summation differs
    boxes = [(5, 5, 50, 40, 0), (60, 20, 120, 90, 1), (10, 50, 40, 90, 2)]
    one, _ = losses_and_gradients(model, batch(boxes))
    other, _ = losses_and_gradients(model, batch(boxes[::-1]))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


def test_crowds_are_left_out(build):
    model = build()
    crowded = batch([(10, 10, 60, 50, 0)])
    crowded["data_samples"][0].ignored_instances = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 90, 90]]), labels=torch.tensor([1])
    )
    with_crowd, _ = losses_and_gradients(model, crowded)
    model = build()
    without, _ = losses_and_gradients(model, batch([(10, 10, 60, 50, 0)]))
    assert all(torch.equal(with_crowd[name], value) for name, value in without.items())


@pytest.mark.parametrize("boxes", [[(70, 40, 110, 90, 1)], [(70, 40, 110, 90, 1), (72, 42, 112, 92, 0)]])
def test_the_classification_loss_is_the_focal_loss_of_every_cell(build, boxes):
    """Against torchvision's: summed over cells and classes, divided by the number of positive cells plus one.

    A cell that objects share counts once.
    """
    from torchvision.ops import sigmoid_focal_loss

    model = build()
    data = model.data_preprocessor(batch([(10, 10, 60, 50, 2)], boxes), True)
    features = model.extract_feat(data["inputs"])
    truth = [sample.gt_instances for sample in data["data_samples"]]
    cells = model.mask_head.assign(truth, SIZE)
    losses = model.mask_head.match(features, cells, truth).losses
    scores = torch.cat([s.flatten(2) for s in model.mask_head(features)[1]], dim=2).transpose(1, 2)
    target = torch.zeros_like(scores)
    for image, position, label in zip(cells.image, cells.position, cells.labels, strict=True):
        target[image, position] = 0  # the later object wins a shared cell
        target[image, position, label] = 1
    assert (target.sum() < len(cells.position)) == (len(boxes) > 1)
    expected = sigmoid_focal_loss(scores, target, alpha=0.25, gamma=2.0, reduction="sum") / (target.sum() + 1)
    torch.testing.assert_close(losses["loss_cls"], expected)


def test_the_later_object_wins_a_shared_cell():
    labels = cell_labels(torch.tensor([2, 0]), torch.tensor([1, 0, 0]), torch.tensor([3, 3, 1]), 5, 9)
    assert json.dumps(labels.tolist()) == "[9, 2, 9, 0, 9]"


def test_padding_does_not_touch_the_losses(build):
    """The same image in a padded batch has valid pixels only inside the image."""
    from misa.losses.inputs import shrink

    images = torch.zeros(2, 3, 64, 96)
    shrunk = shrink(images, [(64, 96), (32, 60)], torch.zeros(2, 1, 16, 24, dtype=torch.bool))
    assert shrunk.valid[0].all()
    assert shrunk.valid[1].sum() == 8 * 15
    assert not shrunk.valid[1, 8:].any()


def test_the_mask_of_a_known_box_is_the_mean_of_its_cells(build):
    """For an image with objects of two sizes, one without objects, and a box that no level covers."""
    model = build()
    model.mask_head.scale_ranges = ((30, 60), (50, 80), (60, 90), (70, 200))
    boxes = [(10, 10, 60, 50, 2), (70, 40, 110, 90, 1), (20, 20, 30, 30, 0)]
    data = model.data_preprocessor(batch(boxes, []), False)
    truth = [sample.gt_instances for sample in data["data_samples"]]
    with torch.no_grad():
        found, empty = model.masks_of_boxes(data["inputs"], truth)
        kernels, _, features = model.mask_head(model.extract_feat(data["inputs"]))
    assert empty.probabilities.shape == (0, *features.shape[-2:])
    assert empty.answered.shape == (0,)
    assert found.answered.tolist() == [True, True, False]
    assert not found.probabilities[2].any()
    strung = torch.cat([level[0].flatten(1) for level in kernels], dim=1)
    cells = model.mask_head.assign(truth, SIZE)
    for n in range(2):
        own = cells.position[cells.instance == n].tolist()
        masks = [torch.einsum("d,dhw->hw", strung[:, cell].double(), features[0].double()).sigmoid() for cell in own]
        torch.testing.assert_close(found.probabilities[n], (sum(masks) / len(masks)).float())
