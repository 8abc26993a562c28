"""What waits for the device in a training step, counted without one (`tests/pretend_cuda.py`)."""

import copy
from collections import Counter

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

import misa.models  # noqa: F401  (imports mmdet silently)
from misa.engine.training.optimizer import optimizer_config
from misa.experiment import Affinity
from misa.losses.inputs import SemanticPrior
from misa.losses.pairwise import pairwise_loss
from misa.models.host import on_host
from misa.models.students.table import model_config
from misa.models.teacher.table import build_teacher
from misa.ops.backends import choice
from misa.rows import find_row, teacher_row
from tests.models.students.test_mask2former import CLASSES, TWO, batch
from tests.pretend_cuda import Pretend, pretended

HUNGARIAN = {"_to_copy at students/mask2former.py assign": 1}  # the table of costs
FCOS = {  # mmdet's targets and losses, then the choice of locations: 2 images
    "_local_scalar_dense at dense_heads/condinst_head.py loss_by_feat": 2,
    "_local_scalar_dense at losses/iou_loss.py forward": 1,
    "_to_copy at bbox/bbox_overlaps.py bbox_overlaps": 1,
    "_to_copy at dense_heads/condinst_head.py <listcomp>": 5,
    "_to_copy at dense_heads/condinst_head.py _get_targets_single": 2,
    "_to_copy at dense_heads/condinst_head.py loss_by_feat": 1,
    "_to_copy at dense_heads/fcos_head.py centerness_target": 2,
    "_to_copy at students/condinst.py <listcomp>": 2,
    "_to_copy at students/condinst.py best": 4,
    "index at dense_heads/condinst_head.py _get_targets_single": 2,
    "nonzero at dense_heads/condinst_head.py _get_targets_single": 2,
    "nonzero at dense_heads/condinst_head.py loss_by_feat": 1,
}
WAITS = {
    "misa": {},
    "mask2former_misa": HUNGARIAN,
    "boxlevelset": {},
    "box2mask": {},
    "discobox": {},
    "discobox_bank": {},
    "boxinst": FCOS,
}


def student(name):
    """A row's student and the wrapper of its optimiser."""
    MMLogger.get_current_instance().setLevel("ERROR")
    row = find_row(f"demo:{name}").smoke()
    torch.manual_seed(0)
    model = MODELS.build(model_config(row, CLASSES))
    model.init_weights()
    if row.teacher:
        model.attach(build_teacher(teacher_row(row), CLASSES))
    return model.train(), row


def losses(model):
    data = model.data_preprocessor(batch(*TWO), True)
    return model.loss(**{"batch_inputs": data["inputs"], "batch_data_samples": data["data_samples"]})


@pytest.mark.parametrize("name", WAITS)
def test_a_step_waits_only_where_it_is_written_down(name):
    """The second step: the first one fills caches. Its losses are those of the CPU."""
    model, row = student(name)
    with choice.use("torch"):
        expected = {key: value.item() for key, value in losses(copy.deepcopy(model)).items()}
    with pretended() as waits, choice.use("torch"):
        teacher = model.teacher
        model.to("cuda")
        if teacher is not None:
            model.attach(teacher)
        optimizer = build_optim_wrapper(model, optimizer_config(row))
        found = model.train_step(batch(*TWO), optimizer)
        assert all(isinstance(p, Pretend) for p in model.parameters())
        assert {key: found[key].item() for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
        waits.clear()
        model.train_step(batch(*TWO), optimizer)
    assert Counter(waits) == WAITS[name]


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton's interpreter
def test_the_kernels_wait_for_nothing():
    """Of a map so small that the interpreter takes seconds; on a GPU machine `pytest -m gpu` asks the kernels."""
    rng = torch.Generator().manual_seed(0)
    masks, images, s = (torch.rand(*shape, generator=rng) for shape in ((2, 3, 4), (1, 3, 3, 4), (1, 2, 3, 4)))
    boxes = torch.zeros(2, 3, 4, dtype=torch.bool)
    boxes[0, :2, 1:3] = boxes[1, 1:, :] = True
    k, image, labels = torch.rand(2, 2, generator=rng), torch.zeros(2, dtype=torch.long), torch.tensor([0, 1])

    def pulled(*there):
        mask, box, picture, features, factors = there
        affinity = Affinity(saliency=True, local_steps=2, window=3)
        return pairwise_loss(
            mask, box, picture, image, affinity=affinity, labels=labels, prior=SemanticPrior(features, factors)
        )

    tensors = (masks, boxes, images, s, k)
    expected = {name: value.item() for name, value in pulled(*tensors).items()}
    with pretended() as waits, choice.use("torch" if torch.cuda.is_available() else "triton"):
        found = pulled(*(each.to("cuda", non_blocking=True) for each in tensors))
        assert not waits
        assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, abs=1e-5)


def test_what_waits_is_noted():
    with pretended() as waits:
        there = torch.arange(4.0).to("cuda", non_blocking=True)
        assert not waits
        for wait in (
            lambda: there.sum().item(),
            lambda: bool(there[0] > 1),
            lambda: there.tolist(),
            lambda: there[there > 1],
            lambda: (there > 1).nonzero(),
            lambda: there.cpu(),
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: torch.zeros(3).to("cuda"),
            lambda: there[torch.tensor([0])],
            lambda: there.unique(),
            lambda: torch.equal(there, there),
            lambda: there.repeat_interleave(torch.tensor([1, 0, 2, 1]).to("cuda", non_blocking=True)),
        ):
            before = len(waits)
            wait()
            assert len(waits) == before + 1, wait
        assert all("test_waits.py" in line for line in waits)
        waits.clear()
        there[there > 1] = 0  # a masked_fill
        there.to("cpu", non_blocking=True)
        torch.where(there > 1, there, 0).sum().sqrt()
        assert not waits
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.zeros(4)


def test_the_host_keeps_boxes_and_labels_until_they_change():
    model, _ = student("projection")
    with pretended() as waits:
        model.to("cuda")
        sent = batch(*TWO)
        instances = model.data_preprocessor(sent, True)["data_samples"][1].gt_instances
        waits.clear()
        assert torch.equal(on_host(instances.bboxes), sent["data_samples"][1].gt_instances.bboxes)
        assert on_host(instances.labels).tolist() == [2, 1]
        assert not waits
        instances.bboxes += 1
        assert on_host(instances.bboxes)[0].tolist() == [21, 31, 91, 61]
        instances.labels = instances.labels.flip(0)
        assert on_host(instances.labels).tolist() == [1, 2]
        assert len(waits) == 2
