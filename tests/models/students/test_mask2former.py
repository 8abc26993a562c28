"""Mask2Former as a box-supervised student: matching against brute force, losses against mmdet's, hard batches."""

import copy
import dataclasses
from itertools import permutations

import pytest
import torch
from mmengine.structures import InstanceData

import misa.models  # noqa: F401  (imports mmdet silently)
from experiments.demo import OBJECTIVES
from misa.errors import Diverged
from misa.experiment import TINY_MASK2FORMER
from misa.losses.inputs import shrink
from misa.models.students.mask2former import assign, match_costs
from misa.models.students.memory import Shadow
from misa.models.students.table import model_config
from misa.models.teacher.table import build_teacher
from misa.objectives import misa as terms
from misa.objectives.base import Step, Term
from misa.rows import find_row, teacher_row

SIZE = (64, 96)
CLASSES = ("a", "b", "c")


def build(row):
    from mmdet.registry import MODELS

    torch.manual_seed(0)
    model = MODELS.build(model_config(row, CLASSES))
    model.init_weights()
    if row.teacher:
        model.attach(build_teacher(teacher_row(row), CLASSES))
    return model.train()


def batch(*images):
    from mmdet.structures import DetDataSample

    generator = torch.Generator().manual_seed(0)
    samples = []
    for boxes in images:
        rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5)
        sample = DetDataSample(metainfo={"img_shape": SIZE, "ori_shape": SIZE, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=rows[:, :4], labels=rows[:, 4].long())
        samples.append(sample)
    inputs = [torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8) for _ in images]
    return {"inputs": inputs, "data_samples": samples}


BOX = find_row("demo:mask2former_box")
MISA = find_row("demo:mask2former_misa")
TWO = ([(10, 10, 60, 50, 0)], [(20, 30, 90, 60, 2), (5, 5, 40, 40, 1)])
MANY = [(x, y, x + 9, y + 8, (x + y) % 3) for x in range(0, 88, 11) for y in range(0, 56, 8)]


@pytest.fixture(scope="module")
def student():
    return build(BOX)


def prepared(model, *images):
    data = model.data_preprocessor(copy.deepcopy(batch(*images)), True)
    return data["inputs"], data["data_samples"]


def test_the_match_is_the_cheapest_of_all():
    """Against every one-to-one match of three boxes to five queries, with the cost by definition in float64."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 1, 5, 4, generator=generator)
    logits = torch.randn(2, 1, 5, 6, 7, generator=generator)
    boxes = torch.zeros(3, 6, 7, dtype=torch.bool)
    boxes[0, 1:4, 2:5] = boxes[1, :, :2] = boxes[2, 3:6, 1:7] = True
    labels = torch.tensor([2, 0, 2])

    def cost(prediction, query, instance):
        mask = logits[prediction, 0, query].double().sigmoid().tolist()
        box = boxes[instance].double().tolist()
        total = 0.0
        for transposed in (False, True):
            a, b = ([max(line) for line in (zip(*m, strict=True) if transposed else m)] for m in (mask, box))
            overlap = sum(x * y for x, y in zip(a, b, strict=True))
            total += 5 * (1 - (2 * overlap + 1) / (sum(x * x for x in a) + sum(y * y for y in b) + 1))
        return total - 2 * scores[prediction, 0, query].double().softmax(0)[labels[instance]].item()

    match = assign(scores, logits, [boxes], [labels])
    for prediction in range(2):
        mine = match.prediction == prediction
        found = dict(zip(match.instance[mine].tolist(), match.query[mine].tolist(), strict=True))
        best = min(permutations(range(5), 3), key=lambda qs: sum(cost(prediction, q, i) for i, q in enumerate(qs)))
        assert found == dict(enumerate(best))


def test_masks_that_are_no_numbers_are_told():
    logits = torch.full((1, 1, 2, 4, 4), torch.nan)
    with pytest.raises(Diverged, match="lower the learning rate"):
        assign(torch.zeros(1, 1, 2, 4), logits, [torch.ones(1, 4, 4, dtype=torch.bool)], [torch.tensor([0])])


def test_every_prediction_hands_over_every_object_once(student):
    images, samples = prepared(student, *TWO)
    truth = [sample.gt_instances for sample in samples]
    positives, features, _, repeats, *_ = student.training_output(images, truth)
    assert repeats == TINY_MASK2FORMER.decoder_layers + 1
    assert positives.mask_logits.shape == (3 * repeats, SIZE[0] // 4, SIZE[1] // 4)
    assert positives.image.tolist().count(1) == 2 * repeats
    assert sorted(zip(positives.image.tolist(), positives.labels.tolist(), strict=True)) == sorted(
        [(0, 0), (1, 1), (1, 2)] * repeats
    )
    first = positives.box_masks[(positives.image == 0).nonzero()[0, 0]]
    assert first.any(1).sum() == 10  # rows 10 to 50 of stride 4 by their centres
    assert first.any(0).sum() == 13
    with torch.no_grad():
        expected = student.panoptic_head.pixel_decoder(student.extract_feat(images))[0]
    torch.testing.assert_close(features, expected)


def test_the_classification_loss_is_mmdets_summed_over_the_predictions(student):
    images, samples = prepared(student, *TWO)
    truth = [sample.gt_instances for sample in samples]
    head = student.panoptic_head
    features = student.extract_feat(images)
    scores, logits = head(features, samples)
    from misa.ops.boxes import box_masks

    boxes = [box_masks(t.bboxes, SIZE[0] // 4, SIZE[1] // 4, stride=4) for t in truth]
    match = assign(torch.stack(scores), torch.stack(logits), boxes, [t.labels for t in truth])
    expected = 0.0
    for prediction, score in enumerate(scores):
        target = torch.full(score.shape[:2], 3)
        for image in range(2):
            mine = (match.prediction == prediction) & (match.image == image)
            target[image, match.query[mine]] = truth[image].labels[match.instance[mine]]
        weight = torch.tensor([1, 1, 1, 0.1])[target.flatten()]
        expected += head.loss_cls(
            score.flatten(0, 1), target.flatten(), torch.ones(target.numel()), avg_factor=weight.sum()
        )
    found = head.match(head.predict_all(features), boxes, truth)[1]
    torch.testing.assert_close(found.losses["loss_cls"], expected)


@pytest.mark.parametrize("reduction", ["box_mean", "box_ratio"])
def test_all_predictions_at_once_are_the_sum_of_each(reduction):
    model = build(BOX.but(affinity={"reduction": reduction}))
    images, samples = prepared(model, *TWO)
    positives, features, _, repeats, *_ = model.training_output(images, [sample.gt_instances for sample in samples])
    small = shrink(images, [SIZE, SIZE], torch.zeros(2, 1, *features.shape[-2:], dtype=torch.bool))
    objective = model.objective
    assert objective == terms.MISA(BOX.projection_weight, dataclasses.replace(BOX.affinity, reduction=reduction))
    whole = objective.losses(Step(positives, small))
    # The first image's object in every prediction, then the second image's two.
    parts = [
        objective.losses(
            Step(type(positives)(*(field[[k, repeats + 2 * k, repeats + 2 * k + 1]] for field in positives)), small)
        )
        for k in range(repeats)
    ]
    for name, (value, *_) in whole.items():
        ordered = sum(part[name].loss for part in parts) / repeats
        torch.testing.assert_close(value, ordered, rtol=1e-4, atol=1e-6)


BATCHES = {
    "two images": TWO,
    "an image without objects": ([(10, 10, 60, 50, 0)], []),
    "no object in the batch": ([], []),
    "a one-pixel box": ([(17, 9, 18, 10, 1)], [(0, 0, 96, 64, 1)]),
    "more objects than queries": (MANY, []),
}


@pytest.mark.parametrize("name", BATCHES)
def test_every_batch_trains_every_weight(student, name):
    """Also those that do not depend on this batch: several processes must not wait for their gradients."""
    student.zero_grad()
    images, samples = prepared(student, *BATCHES[name])
    losses = student.loss(images, samples)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values()), losses
    for parameter, value in student.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter
    assert len(MANY) > TINY_MASK2FORMER.queries


def test_the_order_of_the_objects_does_not_matter(student):
    boxes = [(5, 5, 50, 40, 0), (60, 20, 90, 60, 1), (10, 30, 40, 60, 2)]
    one, other = (student.loss(*prepared(student, order)) for order in (boxes, boxes[::-1]))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)


def test_misa_adds_its_terms_and_nothing_else():
    images, samples = prepared(build(BOX), *TWO)
    box, full = build(BOX).loss(images, samples), build(MISA).loss(images, samples)
    assert list(full) == [*box, "loss_distillation"]
    assert torch.equal(box["loss_cls"], full["loss_cls"])
    assert torch.equal(box["loss_projection"], full["loss_projection"])
    assert not torch.equal(box["loss_local"], full["loss_local"])


def test_the_tree_may_span_a_square_of_another_size():
    model = build(BOX.but(affinity={"global_size": 12}))
    images, samples = prepared(model, *TWO)
    losses = model.loss(images, samples)
    assert losses["loss_global"] > 0
    assert losses["loss_global"].isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101", "swin_t", "swin_s", "swin_b", "swin_l"])
def test_every_backbone_fits(backbone):
    """In its real size, with a decoder of real size."""
    network = {"backbone": backbone, "pretrained": False}
    model = build(find_row("table1_coco:apro_m2f_r101").but(network=network, augmentation={"crop": 96})).eval()
    images, samples = prepared(model, TWO[0])
    with torch.no_grad():
        positives, features, _, repeats, *_ = model.training_output(images, [samples[0].gt_instances])
    assert features.shape == (1, 256, 24, 24)  # padded to the square of 96 pixels
    assert positives.mask_logits.shape == (10, 24, 24)
    assert repeats == 10


@torch.no_grad()
def test_the_mask_of_a_known_box_is_that_of_the_query_that_the_last_layer_matches(student):
    """Against every one-to-one match of two boxes; an image without objects beside it."""
    images, samples = prepared(student, TWO[1], [])
    truth = [sample.gt_instances for sample in samples]
    found, empty = student.masks_of_boxes(images, truth)
    scores, logits = (each[-1][0] for each in student.panoptic_head(student.extract_feat(images), []))
    masks, classes = logits.sigmoid(), scores.softmax(-1)
    assert empty.probabilities.shape == (0, *masks.shape[-2:])
    assert found.answered.tolist() == [True, True]

    def cost(query, instance):
        box = torch.zeros(SIZE)
        x1, y1, x2, y2 = truth[0].bboxes[instance].int().tolist()
        box[y1:y2, x1:x2] = 1
        box = box[2::4, 2::4]  # about the centre of each cell of stride 4
        total = -2 * classes[query, truth[0].labels[instance]]
        for axis in (0, 1):
            a, b = masks[query].amax(axis), box.amax(axis)
            total += 5 * (1 - (2 * (a * b).sum() + 1) / (a.square().sum() + b.square().sum() + 1))
        return float(total)

    table = [[cost(query, instance) for instance in range(2)] for query in range(len(masks))]
    one, other = min(permutations(range(len(masks)), 2), key=lambda pair: table[pair[0]][0] + table[pair[1]][1])
    torch.testing.assert_close(found.probabilities, masks[[one, other]])


@torch.no_grad()
def test_boxes_beyond_the_queries_have_no_mask(student):
    images, samples = prepared(student, MANY)
    (found,) = student.masks_of_boxes(images, [samples[0].gt_instances])
    assert found.answered.sum() == TINY_MASK2FORMER.queries < len(MANY) == len(found.probabilities)
    assert torch.equal(found.answered, found.probabilities.flatten(1).any(1))


@torch.no_grad()
def other_copy(student):
    """A copy with other weights, whose queries are in another order than the student's."""
    copy_ = Shadow(student).copy
    torch.manual_seed(1)
    for p in copy_.panoptic_head.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return copy_


def shuffled(student):
    """Returns the same network with its queries in another order."""
    other = copy.deepcopy(student)
    for part in (other.panoptic_head.query_embed, other.panoptic_head.query_feat):
        part.weight.copy_(part.weight.flip(0))
    return other


@torch.no_grad()
def test_the_copys_mask_of_an_object_is_that_of_its_own_last_match(student):
    """For every positive of the student in any prediction; the order of the copy's queries does not matter."""
    images, samples = prepared(student, *TWO)
    truth = [sample.gt_instances for sample in samples]
    own, following = student.training_output(images, truth), other_copy(student)
    found = following.training_output(images, truth, own.places)
    every = torch.cat([each.probabilities for each in following.masks_of_boxes(images, truth)])
    torch.testing.assert_close(found.positives.mask_logits.sigmoid(), every[own.positives.instance])
    for one, other in zip(found.positives[1:], own.positives[1:], strict=True):
        assert torch.equal(one, other)
    again = shuffled(following).training_output(images, truth, own.places)
    torch.testing.assert_close(again.positives.mask_logits, found.positives.mask_logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.positives.mask_logits, own.positives.mask_logits, atol=0.1)


@torch.no_grad()
def test_boxes_beyond_the_copys_queries_are_answered_by_the_cheapest(student):
    images, samples = prepared(student, MANY)
    truth = [samples[0].gt_instances]
    following = other_copy(student)
    found = following.training_output(images, truth, torch.arange(len(MANY)))
    (matched,) = following.masks_of_boxes(images, truth)
    scores, logits, _ = following.panoptic_head.predict_all(following.extract_feat(images))
    (costs,) = match_costs(scores[-1:], logits[-1:], [found.positives.box_masks], [truth[0].labels])
    assert not matched.answered.all()
    for box, answered in enumerate(matched.answered.tolist()):
        cheapest = min(range(costs.shape[1]), key=lambda query, box=box: costs[0, query, box])
        expected = matched.probabilities[box] if answered else logits[-1, 0, cheapest].sigmoid()
        torch.testing.assert_close(found.positives.mask_logits[box].sigmoid(), expected)


def test_one_mask_of_every_box_is_the_last_predictions():
    model = build(BOX.but(affinity=None, projection_weight=3.0, objective=OBJECTIVES["discobox_bank"]))
    images, samples = prepared(model, *TWO)
    positives, features, *_, per_box = model.training_output(images, [sample.gt_instances for sample in samples])
    last = {int(positives.instance[n]): positives.mask_logits[n] for n in (3, 10, 11)}  # of 4 and of 2 x 4
    assert sorted(last) == per_box.positives.instance.tolist() == [0, 1, 2]
    for box, mask in enumerate(per_box.positives.mask_logits):
        assert torch.equal(mask, last[box])
    assert per_box.positives.labels.tolist() == [0, 2, 1]
    assert per_box.positives.image.tolist() == [0, 1, 1]
    assert torch.equal(per_box.finest, features)


def test_what_an_object_has_once_is_not_counted_for_every_prediction(student, monkeypatch):
    """All other terms are sums over the predictions."""

    def losses(self, step, memory):
        loss = step.positives.mask_logits.mean()
        return {"loss_each": Term(loss), "loss_once": Term(loss, once=True), "loss_batch": Term(loss, "batch")}

    monkeypatch.setattr(type(student.objective), "losses", losses)
    found = student.loss(*prepared(student, *TWO))
    torch.testing.assert_close(found["loss_each"], 4 * found["loss_once"])
    torch.testing.assert_close(found["loss_batch"], found["loss_once"])
