"""Host-device waits in a training step, counted without a GPU (`tests/pretend_cuda.py`)."""

import copy
import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.structures import InstanceData, PixelData

import misa.models  # noqa: F401  (imports mmdet silently)
from experiments.demo import OBJECTIVES
from misa.engine.training.optimizer import optimizer_config
from misa.experiment import Affinity
from misa.losses.inputs import SemanticPrior
from misa.losses.pairwise import pairwise_loss
from misa.models.students.base import BoxSupervised, Clock
from misa.models.students.table import model_config
from misa.models.teacher.table import build_teacher
from misa.ops.backends import choice
from misa.ops.transfer import on_host, to_device
from misa.rows import find_row, teacher_row
from tests.models.students.test_mask2former import CLASSES, TWO, batch
from tests.pretend_cuda import Pretend, pretended

SHADOWED = ("boxinst", "discobox", "boxteacher", "sim")  # the others need no more from the student than boxinst
PASTE = dataclasses.replace(OBJECTIVES["sim_paste"], paste=1, paste_rate=1.0, sure=0.1)  # in the second step
SOLO, CONDINST = find_row("demo:discobox"), find_row("demo:boxinst").but(inference={"score": 0.001})
QUERIES = find_row("demo:mask2former_box2mask")
ROWS = {
    "misa": find_row("demo:misa"),
    "mask2former_misa": find_row("demo:mask2former_misa"),
    "mask2former_box2mask": QUERIES,
    "polarmask": find_row("demo:polarmask"),
    "teacher from boxes": find_row("teacher:demo"),
    "teacher from label maps": find_row("teacher:demo_boxes"),
    **{f"solov2, {name}": SOLO.but(objective=own, inference={"score": 0.001}) for name, own in OBJECTIVES.items()},
    "solov2, sim_paste": SOLO.but(objective=PASTE),
    "condinst, sim_paste": CONDINST.but(objective=PASTE),
    **{f"condinst, {name}": CONDINST.but(objective=OBJECTIVES[name]) for name in SHADOWED},
    **{f"mask2former, {name}": QUERIES.but(objective=own) for name, own in OBJECTIVES.items() if name != "box2mask"},
    "mask2former, sim_paste": QUERIES.but(objective=PASTE),
}
MATCH, MATCHES = ({"_to_copy at students/mask2former.py assign": times} for times in (1, 2))  # the cost matrices
PROTOTYPES = {"_to_copy at objectives/sim.py update": 1}  # which pixels belong to an object with high confidence
TAKEN = {"_to_copy at objectives/boxteacher.py pseudo_masks": 1}  # boxes and scores of the copy's detections
MATRIX_NMS = {  # the copy's detections: their number determines every shape
    "_local_scalar_dense at layers/matrix_nms.py mask_matrix_nms": 2,
    "index at layers/matrix_nms.py mask_matrix_nms": 8,
    "index at students/solov2_decode.py <genexpr>": 10,
    "nonzero at students/solov2_decode.py decode": 2,
}
FCOS_NMS = {  # the same by mmdet, on five levels
    "_local_scalar_dense at dense_heads/base_dense_head.py _bbox_post_process": 2,
    "_to_copy at ops/nms.py batched_nms": 2,
    "index at structures/instance_data.py __getitem__": 12,
    "index at utils/misc.py filter_scores_and_topk": 10,
    "nms at ops/boxes.py nms": 2,
    "nonzero at utils/misc.py filter_scores_and_topk": 10,
    "nonzero at students/condinst.py _above": 2,
}
WAITS = {  # of two images; 0 where a row is not here
    "mask2former_misa": MATCH,
    "mask2former_box2mask": MATCH,
    "mask2former, boxinst": MATCH,
    "mask2former, boxlevelset": MATCH,
    "mask2former, boxteacher": MATCH | TAKEN,
    "mask2former, discobox": MATCHES,  # the copy's, too
    "mask2former, discobox_bank": MATCHES,
    "mask2former, sim": MATCHES | PROTOTYPES,
    "mask2former, sim_paste": MATCHES | PROTOTYPES,
    "solov2, sim": PROTOTYPES,
    "condinst, sim": PROTOTYPES,
    "solov2, sim_paste": PROTOTYPES,
    "condinst, sim_paste": PROTOTYPES,
    "solov2, boxteacher": TAKEN | MATRIX_NMS,
    "condinst, boxteacher": TAKEN | FCOS_NMS,
}


def sample():
    """Two images with boxes, masks, label maps and a crowd."""
    data = copy.deepcopy(batch(*TWO))
    for own in data["data_samples"]:
        truth, (h, w) = own.gt_instances, own.img_shape
        masks = np.zeros((len(truth), h, w), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, truth.bboxes.int().tolist(), strict=True):
            mask[y1:y2, x1 : x2 - 4] = 1
        truth.masks = BitmapMasks(masks, h, w)
        own.ignored_instances = InstanceData(bboxes=torch.tensor([[70.0, 0, 90, 12]]), labels=torch.tensor([0]))
        own.gt_sem_seg = PixelData(sem_seg=torch.randint(0, 4, (1, h, w), generator=torch.Generator().manual_seed(0)))
    return data


def network(row):
    """Returns a row's student or teacher."""
    MMLogger.get_current_instance().setLevel("ERROR")
    row = row.smoke()
    if row.affinity is not None:
        row = row.but(affinity={"local_steps": 2})  # further steps are the same operations
    torch.manual_seed(0)
    model = MODELS.build(model_config(row, CLASSES))
    model.init_weights()
    if row.teacher:
        model.attach(build_teacher(teacher_row(row), CLASSES))
    return model.train(), row


def student(name):
    """Returns a row of the demo."""
    return network(find_row(f"demo:{name}"))


def at(model, iteration):
    """Tell the student the current iteration."""
    if isinstance(model, BoxSupervised):
        model.begin_step(Clock(iteration, 40))
    torch.manual_seed(iteration)
    return model


def losses(model):
    """Returns the training losses at iteration 21, the first step of `waits_of`."""
    data = at(model, 21).data_preprocessor(sample(), True)
    return model(**data, mode="loss")


def waits_of(name):
    """Returns the waits of the second step (the first one fills caches); checks its losses against the CPU."""
    model, row = network(ROWS[name])
    with choice.use("torch"):
        twin = copy.deepcopy(model)
        if getattr(model, "teacher", None) is not None:
            twin.attach(model.teacher)
        expected = {key: value.item() for key, value in losses(twin).items()}
    with pretended() as waits, choice.use("torch"):
        teacher = getattr(model, "teacher", None)
        model.to("cuda")
        if teacher is not None:
            model.attach(teacher)
        optimizer = build_optim_wrapper(model, optimizer_config(row))
        found = at(model, 21).train_step(sample(), optimizer)
        assert all(isinstance(p, Pretend) for p in model.parameters())
        assert {key: found[key].item() for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
        waits.clear()
        at(model, 22).train_step(sample(), optimizer)
    return Counter(waits)


@pytest.mark.parametrize("name", ROWS)
def test_a_step_waits_only_where_it_is_written_down(name):
    assert waits_of(name) == WAITS.get(name, {})


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton's interpreter
def test_the_kernels_wait_for_nothing():
    """On a map so small that the interpreter takes seconds; with a GPU, `pytest -m gpu` tests the compiled kernels."""
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


BIG = 2**14 + 1  # float32 values, slightly more than the driver stages without waiting
PLANTED = {
    "item": lambda there: there.sum().item(),
    "bool": lambda there: bool(there[0] > 1),
    "if": lambda there: 1 if (there > 1).any() else 0,
    "int": lambda there: int(there[1]),
    "float": lambda there: float(there[1]),
    "range": lambda there: range(there[2].long()),
    "max with a number": lambda there: max(there[0], 1.0),
    "tolist": lambda there: there.tolist(),
    "format": lambda there: f"{there[0]:.2f}",
    "repr": lambda there: str(there),
    "boolean index": lambda there: there[there > 1],
    "boolean index, set to several": lambda there: there.__setitem__(there > 1, torch.ones_like(there[:2])),
    "masked_select": lambda there: there.masked_select(there > 1),
    "nonzero": lambda there: (there > 1).nonzero(),
    "where of a condition": lambda there: torch.where(there > 1),
    "argwhere": lambda there: torch.argwhere(there > 1),
    "unique": lambda there: there.unique(),
    "unique_consecutive": lambda there: torch.unique_consecutive(there),
    "bincount": lambda there: there.long().bincount(minlength=9),
    "equal": lambda there: torch.equal(there, there),
    "repeat_interleave": lambda there: there.repeat_interleave(there.long()),
    "an element by a tensor": lambda there: there[there[1].long()],
    "index of the host": lambda there: there[torch.tensor([0])],
    "index by a list": lambda there: there[[0, 2]],
    "set by a list": lambda there: there.__setitem__([0, 2], 1.0),
    "cpu": lambda there: there.cpu(),
    "to the host": lambda there: there.to("cpu"),
    "copied to the host": lambda there: torch.zeros(4).copy_(there),
    "tensor": lambda there: torch.tensor([1.0], device="cuda"),
    "tensor of a number": lambda there: torch.tensor(1.0, device="cuda"),
    "as_tensor": lambda there: torch.as_tensor([1.0, 2.0], device="cuda"),
    "new_tensor": lambda there: there.new_tensor([1.0]),
    "to the device": lambda there: torch.zeros(3).to("cuda"),
    "to another's device": lambda there: torch.zeros(3).to(there),
    "cuda": lambda there: torch.zeros(3).cuda(),
    "pinned, but waiting": lambda there: torch.zeros(3).pin_memory().to("cuda"),
    "copied to the device": lambda there: there.copy_(torch.zeros(4)),
    "an element set to one of the host": lambda there: there.__setitem__(0, torch.tensor(3.0)),
    "large and pageable": lambda there: torch.zeros(BIG).to("cuda", non_blocking=True),
    "synchronize": lambda there: torch.cuda.synchronize(),
    "a stream's synchronize": lambda there: torch.cuda.current_stream().synchronize(),
    "an event's synchronize": lambda there: torch.cuda.Event().synchronize(),
}
FREE = {
    "set by a mask": lambda there: there.__setitem__(there > 1, 0),  # a masked_fill
    "set to a number": lambda there: there.__setitem__(0, 2.0),
    "a number of the host": lambda there: there * torch.tensor(2.0),
    "to the host without waiting": lambda there: there.to("cpu", non_blocking=True),
    "to the device without waiting": lambda there: torch.zeros(3).to("cuda", non_blocking=True),
    "large and pinned": lambda there: torch.zeros(BIG).pin_memory().to("cuda", non_blocking=True),
    "as it should be copied": lambda there: to_device(torch.zeros(BIG), there.device),
    "a part of what is pinned": lambda there: torch.zeros(2, BIG).pin_memory()[1].to("cuda", non_blocking=True),
    "made there": lambda there: torch.zeros(BIG, device="cuda"),
    "arithmetic": lambda there: torch.where(there > 1, there, 0).sum().sqrt(),
    "index of the device": lambda there: there[torch.arange(2, device="cuda")],
    "topk": lambda there: there.topk(2).indices,
    "an event": lambda there: torch.cuda.Event().query(),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_waits_is_noted(name):
    with pretended() as waits:
        there = torch.arange(4.0).to("cuda", non_blocking=True)
        assert not waits
        PLANTED[name](there)
    assert len(waits) == 1
    assert "test_waits.py" in waits[0]


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not_noted(name):
    with pretended() as waits:
        FREE[name](torch.arange(4.0).to("cuda", non_blocking=True))
    assert not waits


def test_what_cuda_refuses_is_refused():
    with pretended():
        there = torch.arange(4.0).to("cuda", non_blocking=True)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.zeros(4)
        for read in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="to numpy"):
                read()


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
