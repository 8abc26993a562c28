"""PolarMask's head: targets and losses against loops, and decoding of targets to masks."""

import math

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch.testing import assert_close

from misa.experiment import TINY, Experiment
from misa.models.students.polarmask import assigned
from misa.models.students.table import model_config
from misa.ops.rays import ray_lengths

ROW = Experiment(student="polarmask", supervision="mask", affinity=None, network=TINY)
SIZE, CLASSES, STRIDES = 128, 3, (8, 16, 32, 64, 128)
RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))


@pytest.fixture(autouse=True)
def mmdet():
    register_all_modules(init_default_scope=True)
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture
def model():
    torch.manual_seed(0)
    built = MODELS.build(model_config(ROW, ("a", "b", "c")))
    built.init_weights()
    return built.train()


def disc(x, y, radius, height=None):
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return ((columns - x) / radius) ** 2 + ((rows - y) / (height or radius)) ** 2 <= 1


def instances(*masks, labels=None):
    boxes = []
    for mask in masks:
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        labels=torch.tensor(labels if labels is not None else [i % CLASSES for i in range(len(masks))]).long(),
        masks=BitmapMasks([mask.astype(np.uint8) for mask in masks], SIZE, SIZE),
    )


SCENE = (disc(40, 44, 20), disc(92, 80, 16, 26), disc(44, 48, 8), disc(5, 120, 1))


def priors():
    """Returns x, y, stride and the range of the level of every location."""
    found = []
    for stride, (low, high) in zip(STRIDES, RANGES, strict=True):
        side = SIZE // stride
        for y in range(side):
            for x in range(side):
                found.append((stride * x + stride // 2, stride * y + stride // 2, stride, low, high))
    return torch.tensor(found, dtype=torch.float32)


def centroid(mask):
    """Returns the centroid of all pixels of a shape without holes; within a pixel of that of the contour's polygon."""
    rows, columns = np.nonzero(mask)
    return columns.mean(), rows.mean()


def slow_targets(truth):
    """Returns the object assigned to every location, in loops; −1 for none."""
    owners = []
    for x, y, stride, low, high in priors().tolist():
        best, least = -1, math.inf
        for g, (mask, box) in enumerate(zip(truth.masks.masks, truth.bboxes.tolist(), strict=True)):
            if mask.sum() < 15:
                continue
            cx, cy = (math.floor(v + 1e-6) for v in centroid(mask))
            sides = (x - box[0], y - box[1], box[2] - x, box[3] - y)
            area = (box[2] - box[0]) * (box[3] - box[1])
            near = abs(x - cx) < 1.5 * stride and abs(y - cy) < 1.5 * stride
            if near and min(sides) > 0 and low <= max(sides) <= high and area < least:
                best, least = g, area
        owners.append(best)
    return owners


def targets(truth, rule="cast"):
    place = priors()
    return assigned(place[:, :3], place[:, 3:], truth, CLASSES, rule)


def test_targets_equal_the_loop():
    truth = instances(*SCENE)
    labels, boxes, rays = targets(truth)
    owners = slow_targets(truth)
    assert labels.tolist() == [CLASSES if g < 0 else int(truth.labels[g]) for g in owners]
    assert {g for g in owners if g >= 0} == {0, 1, 2}  # the smallest, of five pixels, has no location
    place = [i for i, g in enumerate(owners) if g >= 0]
    for i, box, lengths in zip(place, boxes.tolist(), rays, strict=True):
        x, y = priors()[i, :2].tolist()
        x1, y1, x2, y2 = truth.bboxes[owners[i]].tolist()
        assert box == [x - x1, y - y1, x2 - x, y2 - y]
        mask = truth.masks.masks[owners[i]]
        if not mask[int(y), int(x)]:
            continue  # a location in the box beside the mask: some rays miss it
        for k in range(0, 36, 5):  # the last pixel of the mask on the ray, stepwise
            angle = math.radians(10 * k)
            steps = [d / 4 for d in range(4 * SIZE)]
            inside = [
                d
                for d in steps
                if 0 <= round(x + d * math.sin(angle)) < SIZE
                and 0 <= round(y + d * math.cos(angle)) < SIZE
                and mask[round(y + d * math.cos(angle)), round(x + d * math.sin(angle))]
            ]
            assert lengths[k] == pytest.approx(max(inside), abs=1.5)


def test_the_smaller_box_wins_a_shared_location():
    labels, _, _ = targets(instances(disc(40, 44, 20), disc(44, 44, 8), labels=[0, 1]))
    at = [i for i, (x, y, *_) in enumerate(priors().tolist()) if (x, y) == (44, 44)]
    assert [int(labels[i]) for i in at] == [1]


def maps(values, channels, fill):
    """Returns maps (1 c h w) of all levels from values at locations {place: (c,)}."""
    flat = torch.full((len(priors()), channels), fill)
    for place, value in values.items():
        flat[place] = torch.as_tensor(value, dtype=torch.float32)
    levels, start = [], 0
    for stride in STRIDES:
        side = SIZE // stride
        levels.append(flat[start : start + side * side].T.reshape(1, channels, side, side))
        start += side * side
    return levels


def planted(truth, centerness=0.0, rule="cast"):
    """Returns the maps of a network whose output equals the targets at every positive location."""
    labels, boxes, rays = targets(truth, rule)
    place = (labels < CLASSES).nonzero().flatten().tolist()
    classes = {i: [6.0 if c == labels[i] else -9.0 for c in range(CLASSES)] for i in place}
    return (
        maps(classes, CLASSES, -9.0),
        maps(dict(zip(place, boxes, strict=True)), 4, 1.0),
        maps({i: [centerness] for i in place}, 1, 0.0),
        maps(dict(zip(place, rays, strict=True)), 36, 1.0),
    )


def test_from_targets_back_to_masks(model):
    truth = instances(*SCENE[:2])
    meta = {"img_shape": (SIZE, SIZE), "ori_shape": (2 * SIZE, SIZE), "scale_factor": (1.0, 0.5)}
    head = model.bbox_head.eval()
    (found,) = head.predict_by_feat(*planted(truth), batch_img_metas=[meta], rescale=True)
    assert found.labels.tolist() in ([0, 1], [1, 0])
    assert found.masks.shape == (2, 2 * SIZE, SIZE)
    assert_close(found.scores, torch.full((2,), torch.tensor(6.0).sigmoid().item() * (0.5 + 0.5) / 1.5))
    for label, mask, box in zip(found.labels.tolist(), found.masks.numpy(), found.bboxes, strict=True):
        true = np.repeat(SCENE[label], 2, axis=0)
        assert (mask & true).sum() / (mask | true).sum() > 0.9
        assert_close(box, truth.bboxes[label] * torch.tensor([1.0, 2, 1, 2]))
    (same,) = head.predict_by_feat(*planted(truth), batch_img_metas=[meta], rescale=False)
    assert same.masks.shape == (2, SIZE, SIZE)


@pytest.mark.parametrize("size", [(128, 128), (384, 384), (301, 450), (70, 90)])
def test_masks_lie_where_their_objects_lie_in_the_original_image(model, size):
    """Rays of the resized disc, decoded at the image's own size, compared with the disc drawn there."""
    head, gaps, overlaps = model.bbox_head.eval(), [], []
    down, across = size[0] / SIZE, size[1] / SIZE
    for x, y, radius in ((64, 64, 30), (50.5, 60, 26.5), (70.25, 55.75, 33)):
        truth = instances(disc(x - 0.5, y - 0.5, radius), labels=[0])  # x and y from the image's corner
        meta = {"img_shape": (SIZE, SIZE), "ori_shape": size, "scale_factor": (1 / across, 1 / down)}
        (found,) = head.predict_by_feat(*planted(truth), batch_img_metas=[meta], rescale=True)
        rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
        true = ((columns / across - x) / radius) ** 2 + ((rows / down - y) / radius) ** 2 <= 1
        mask = found.masks[0].numpy()
        overlaps.append((mask & true).sum() / (mask | true).sum())
        gaps.append((np.argwhere(mask).mean(0) - np.argwhere(true).mean(0)) / (down, across))
    assert np.abs(np.mean(gaps, axis=0)).max() < 0.15, "in pixels of the resized image"
    assert min(overlaps) > 0.96


def test_scores_never_exceed_one_and_follow_centerness(model):
    truth = instances(SCENE[0])
    meta = {"img_shape": (SIZE, SIZE), "ori_shape": (SIZE, SIZE), "scale_factor": (1.0, 1.0)}
    scores = [
        float(model.bbox_head.eval().predict_by_feat(*planted(truth, c), batch_img_metas=[meta])[0].scores[0])
        for c in (-50.0, 0.0, 50.0)
    ]
    one = torch.tensor(6.0).sigmoid().item()
    assert scores == pytest.approx([one / 3, one * 2 / 3, one])


def test_the_losses_of_an_exact_network_are_those_of_the_scores_alone(model):
    truth = instances(*SCENE[:2])
    exact = planted(truth, rule="official")
    found = model.bbox_head.loss_by_feat(*exact, [truth], [{}])
    assert found["loss_mask"] == pytest.approx(0, abs=1e-6)
    assert found["loss_bbox"] == pytest.approx(0, abs=1e-5)
    classes, boxes, centernesses, rays = exact
    longer = model.bbox_head.loss_by_feat(classes, boxes, centernesses, [1.1 * x for x in rays], [truth], [{}])
    assert longer["loss_mask"] == pytest.approx(math.log(1.1), rel=1e-4)


def test_the_losses_equal_the_loop(model, rng):
    scenes = [instances(*SCENE[:2]), instances(SCENE[2])]
    shapes = [(2, channels, SIZE // stride, SIZE // stride) for channels in (CLASSES, 4, 1, 36) for stride in STRIDES]
    drawn = [torch.rand(shape, generator=rng) for shape in shapes]
    given = [drawn[i : i + 5] for i in range(0, 20, 5)]
    given[1], given[3] = [40 * x + 1 for x in given[1]], [40 * x + 1 for x in given[3]]
    found = model.bbox_head.loss_by_feat(*given, scenes, [{}, {}])
    flat = [torch.cat([x.flatten(2) for x in levels], dim=2).transpose(1, 2) for levels in given]
    mask = box = centre = total = 0.0
    focal, count = 0.0, 0
    for b, truth in enumerate(scenes):
        owners = slow_targets(truth)
        for i, owner in enumerate(owners):
            for c in range(CLASSES):
                p = float(flat[0][b, i, c].sigmoid())
                positive = owner >= 0 and int(truth.labels[owner]) == c
                focal -= 0.25 * (1 - p) ** 2 * math.log(p) if positive else 0.75 * p**2 * math.log(1 - p)
            if owner < 0:
                continue
            count += 1
            at = priors()[i, :2]
            outline = torch.from_numpy(np.argwhere(edge(truth.masks.masks[owner]))[:, ::-1].copy())
            aim = ray_lengths(outline, at[None], rule="official")[0]  # the order of the points does not matter to it
            weight = math.sqrt(float(aim.min() / aim.max()))
            total += weight
            own = flat[3][b, i]
            mask += weight * math.log(float(torch.maximum(own, aim).sum() / torch.minimum(own, aim).sum()))
            own, ctr = flat[1][b, i], float(flat[2][b, i])
            x1, y1, x2, y2 = truth.bboxes[owner].tolist()
            aims = (at[0] - x1, at[1] - y1, x2 - at[0], y2 - at[1])
            inner = [min(float(a), float(d)) for a, d in zip(aims, own, strict=True)]
            overlap = (inner[0] + inner[2]) * (inner[1] + inner[3])
            union = float((own[0] + own[2]) * (own[1] + own[3])) + (x2 - x1) * (y2 - y1) - overlap
            box -= weight * math.log(overlap / union)
            centre -= weight * math.log(1 / (1 + math.exp(-ctr))) + (1 - weight) * math.log(1 / (1 + math.exp(ctr)))
    assert count > 5
    assert found["loss_cls"] == pytest.approx(focal / (count + 2), rel=1e-4)
    assert found["loss_mask"] == pytest.approx(mask / total, rel=1e-4)
    assert found["loss_bbox"] == pytest.approx(box / total, rel=1e-4)
    assert found["loss_centerness"] == pytest.approx(centre / count, rel=1e-4)


def edge(mask):
    """Returns the pixels of a mask with a 4-neighbor outside it."""
    wide = np.pad(mask.astype(bool), 1)
    inner = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask.astype(bool) & ~inner


@pytest.mark.parametrize("scenes", [((), SCENE[:1]), ((), ())])
def test_images_without_objects_are_finite(model, rng, scenes):
    samples = []
    for masks in scenes:
        sample = DetDataSample(metainfo={"img_shape": (SIZE, SIZE), "batch_input_shape": (SIZE, SIZE)})
        sample.gt_instances = instances(*masks)
        samples.append(sample)
    found = model.loss(torch.randn(len(scenes), 3, SIZE, SIZE, generator=rng), samples)
    sum(found.values()).backward()
    assert all(value.isfinite() for value in found.values())
    grads = [p.grad for p in model.bbox_head.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    if not scenes[1]:
        assert found["loss_mask"] == found["loss_bbox"] == found["loss_centerness"] == 0
