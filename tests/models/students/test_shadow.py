"""The EMA copy of a student: its masks and detections, when it is run, and agreement with mmdet."""

import dataclasses

import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch import nn
from torch.testing import assert_close

from experiments.demo import OBJECTIVES
from misa.experiment import TINY, TINY_MASK2FORMER, Experiment
from misa.models.students.base import Clock
from misa.models.students.memory import Shadow
from misa.models.students.table import model_config
from misa.ops.paste import Picture

SIZE = 128
STUDENTS = {"solov2": TINY, "condinst": TINY, "mask2former": TINY_MASK2FORMER}


@pytest.fixture(autouse=True)
def mmdet():
    register_all_modules(init_default_scope=True)
    yield
    DefaultScope._instance_dict.clear()


def build(student, objective=None, **inference):
    row = Experiment(student=student, network=STUDENTS[student], affinity=None, objective=objective)
    torch.manual_seed(0)
    model = MODELS.build(model_config(row.but(inference=inference), ("a", "b", "c")))
    model.init_weights()
    return model.train()


def batch(rng, boxes=([[8, 16, 72, 80], [60, 4, 124, 60]], [[20, 20, 100, 120]])):
    samples = []
    for image, own in enumerate(boxes):
        meta = {"img_shape": (SIZE, SIZE), "batch_input_shape": (SIZE, SIZE), "pad_shape": (SIZE, SIZE)}
        sample = DetDataSample(metainfo=meta | {"ori_shape": (SIZE, SIZE), "scale_factor": (1.0, 1.0), "img_id": image})
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(own, dtype=torch.float32).view(-1, 4), labels=torch.arange(len(own)) % 3
        )
        samples.append(sample)
    coarse = torch.randn(len(boxes), 3, 8, 8, generator=rng)
    return nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear"), samples


def test_the_copy_answers_at_the_students_places(rng):
    """Its own scores would select other locations."""
    model = build("condinst").eval()  # so that both normalise alike
    images, samples = batch(rng)
    instances = [sample.gt_instances for sample in samples]
    model.mask_head.topk_masks_per_img = 4
    other = Shadow(model)
    nn.init.normal_(other.copy.bbox_head.conv_cls.weight, std=5.0, generator=rng)
    own = model.training_output(images, instances)
    found = other.copy.training_output(images, instances, own.places)
    assert torch.equal(found.positives.instance, own.positives.instance)
    assert_close(found.positives.mask_logits, own.positives.mask_logits)
    alone = other.copy.training_output(images, instances)
    assert not torch.allclose(alone.positives.mask_logits, found.positives.mask_logits)


def test_the_copy_follows_by_name(rng):
    """Parameters registered in another order are still matched."""
    student = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    shadow = Shadow(student)
    with torch.no_grad():
        for p in student.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    swapped = nn.ModuleDict({"b": student["b"], "a": student["a"]})
    shadow.follow(swapped, 0.0)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in shadow.copy.state_dict().items())
    before = {name: value.clone() for name, value in shadow.copy.state_dict().items()}
    with torch.no_grad():
        student["a"].weight.add_(1.0)
    shadow.follow(swapped, 0.75)
    assert_close(shadow.copy["a"].weight, before["a.weight"] + 0.25)
    assert_close(shadow.copy["b"].weight, before["b.weight"])


def test_a_copy_that_has_not_begun_is_not_asked(rng, monkeypatch):
    model = build("solov2", OBJECTIVES["discobox"])
    images, samples = batch(rng)
    asked = []
    copy = model.memory.shadow.copy
    training_output = type(copy).training_output

    def counted(self, *args):
        asked.append(self is copy)
        return training_output(self, *args)

    monkeypatch.setattr(type(copy), "training_output", counted)
    for iteration, expected in ((10, [False]), (20, [False, True]), (21, [False, True])):
        asked.clear()
        model.begin_step(Clock(iteration, 100, 0))
        model.loss(images, samples)
        assert asked == expected


@pytest.mark.parametrize("student", STUDENTS)
def test_detections_are_mmdets(rng, student):
    model = build(student, score=0.001, keep=0.0, mask=0.5, per_image=20).eval()
    images, samples = batch(rng)
    with torch.no_grad():
        found = model.detect(images, [(SIZE, SIZE)] * 2)
        answers = model.predict(images, samples, rescale=True)
    for own, answer in zip(found, answers, strict=True):
        theirs = answer.pred_instances
        scores = own.scores**2 if student == "condinst" else own.scores
        assert len(scores) > 0
        if student == "mask2former":  # mmdet does not sort, and weights by the pixels at image size
            assert_close(scores.sort().values, theirs.scores.sort().values, atol=0.02, rtol=0)
            continue
        assert_close(scores, theirs.scores)
        assert own.masks.shape[1:] == (SIZE // 4, SIZE // 4)
        shrunk = nn.functional.avg_pool2d(theirs.masks.float(), 4)
        assert ((own.masks > 0.5) == (shrunk > 0.5)).float().mean() > 0.97
        if student == "condinst":
            assert_close(own.boxes, theirs.bboxes)


def test_detections_of_condinst_have_their_threshold_on_the_product(rng):
    images, _ = batch(rng)
    with torch.no_grad():
        every = build("condinst", score=0.0, per_image=20).eval().detect(images, [(SIZE, SIZE)] * 2)
        products = torch.cat([own.scores**2 for own in every])
        limit = float(products.median())
        found = build("condinst", score=limit, per_image=20).eval().detect(images, [(SIZE, SIZE)] * 2)
    above = products[products > limit]
    assert 0 < len(above) < len(products)
    assert_close(torch.cat([own.scores**2 for own in found]), above)


def test_scores_take_in_the_masks_where_the_row_says_so(rng):
    images, samples = batch(rng)
    with torch.no_grad():
        plain = build("condinst", score=0.001, per_image=20).eval()
        (own, *_), (before, *_) = plain.detect(images, [(SIZE, SIZE)] * 2), plain.predict(images, samples)
        before = before.pred_instances.scores.clone()
        (after, *_) = build("condinst", score=0.001, per_image=20, rescore=True).eval().predict(images, samples)
    assert len(before) > 0
    for score, mask, found in zip(before, own.masks, after.pred_instances.scores, strict=True):
        sure = mask[mask > 0.5]
        quality = sure.mean() if len(sure) else 0.0
        assert float(found) == pytest.approx(float((score.sqrt() * quality) ** 0.5), rel=1e-3)


def test_the_copy_predicts_where_the_row_says_so(rng):
    model = build("condinst", OBJECTIVES["boxteacher"], from_shadow=True, score=0.001, per_image=20)
    with torch.no_grad():
        for p in model.bbox_head.parameters():
            p.add_(0.05)  # the student has moved
    images, samples = batch(rng)
    model.eval()
    with torch.no_grad():
        found = model.predict(images, samples)[0].pred_instances.scores.clone()
        copied = model.memory.shadow.copy.predict(images, samples)[0].pred_instances.scores.clone()
        model.from_shadow = False
        moved = model.predict(images, samples)[0].pred_instances.scores.clone()
    assert torch.equal(found, copied)
    assert model.predicting is model
    assert not torch.equal(found, moved)


def test_a_row_without_a_copy_cannot_predict_from_it():
    with pytest.raises(ValueError, match="nothing follows this row's student"):
        Experiment(inference=dataclasses.replace(Experiment().inference, from_shadow=True))
    with pytest.raises(ValueError, match="rescore is of condinst"):
        Experiment(inference=dataclasses.replace(Experiment().inference, rescore=True))


@pytest.mark.parametrize("student", STUDENTS)
def test_pasted_objects_are_taught_by_what_is_seen_of_them(rng, student, monkeypatch):
    """Masks in the losses lie within the visible part of each box, or in the whole box if no cell is visible."""
    objective = dataclasses.replace(OBJECTIVES["sim_paste"], paste=1, paste_rate=1.0)
    model = build(student, objective)
    images, samples = batch(rng)
    y, x = torch.meshgrid(torch.arange(32) - 12, torch.arange(32) - 14, indexing="ij")
    triangle = (3 * x + y < 12) & (x > -9) & (y > -8) & (y < 10)
    shape = Picture(
        torch.randint(0, 256, (3, SIZE, SIZE), generator=rng, dtype=torch.uint8),
        torch.where(triangle, 0.9, 0.1)[None],
        torch.tensor([[0.0, 0, SIZE, SIZE]]),
        torch.tensor([1]),
    )
    model.memory.own.on_host.put(shape, sure=0.7)
    seen = []
    losses = type(objective).losses
    monkeypatch.setattr(
        type(objective), "losses", lambda self, step, memory: seen.append(step) or losses(self, step, memory)
    )
    model.begin_step(Clock(0, 100, 0))
    found = model.loss(images, samples)
    assert found["loss_paste"] > 0
    (step,) = seen
    assert step.truth.pasted.tolist() == [False, False, True, False, True]
    assert step.truth.labels.tolist() == [0, 1, 1, 0, 1]
    (picture,) = model.memory.own.on_host.pictures
    stretched = (
        nn.functional.interpolate(picture.masks.float()[:, None], size=(SIZE, SIZE), mode="bilinear")[0, 0] > 0.7
    )
    cells = stretched.reshape(SIZE // 4, 4, SIZE // 4, 4).sum(dim=(1, 3)) >= 8  # at least half of the pixels
    assert not torch.equal(cells, stretched[2::4, 2::4]), "nor the third pixel of each, as published"
    for n, g in enumerate(step.positives.instance.tolist()):
        own = step.positives.box_masks[n]
        if step.truth.pasted[g]:
            assert torch.equal(own, cells)
        else:
            assert own.any()
            assert not (own & cells).any()
    assert {2, 4} <= set(step.positives.instance.tolist())
