"""MISA: which parameters are trained, which are frozen, and the baseline with all terms switched off."""

import copy
import itertools
import math

import pytest
import torch
from mmengine.structures import InstanceData

import misa.models  # noqa: F401  (imports mmdet silently)
from misa.data.pipeline import MEAN, STD
from misa.errors import Diverged
from misa.experiment import Experiment, Semantic
from misa.losses.inputs import shrink, union_of_boxes
from misa.models.students.base import pooled_colors
from misa.models.students.table import model_config
from misa.models.teacher.table import build_teacher
from misa.ops.boxes import box_masks
from misa.rows import find_row, teacher_row

SIZE = (96, 128)
CLASSES = ("a", "b", "c")
MISA = find_row("demo:misa")


def build(row):
    from mmdet.registry import MODELS

    torch.manual_seed(0)
    model = MODELS.build(model_config(row, CLASSES))
    model.init_weights()
    if row.teacher:
        torch.manual_seed(1)
        teacher = build_teacher(teacher_row(row), CLASSES)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))  # an untrained attention has zero gain
        model.attach(teacher)
    return model.train()


@pytest.fixture(scope="module")
def batch():
    from mmdet.structures import DetDataSample

    generator = torch.Generator().manual_seed(0)
    samples = []
    for boxes in ([(10.0, 10, 60, 50)], [(20.0, 30, 90, 80), (5, 5, 40, 40)]):
        sample = DetDataSample(metainfo={"img_shape": SIZE, "ori_shape": SIZE, "scale_factor": (1.0, 1.0)})
        labels = torch.arange(len(boxes)) % 3
        sample.gt_instances = InstanceData(bboxes=torch.tensor(boxes), labels=labels)
        samples.append(sample)
    inputs = [torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8) for _ in samples]
    return {"inputs": inputs, "data_samples": samples}


def losses(model, batch):
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    return model.loss(data["inputs"], data["data_samples"])


def test_every_part_is_logged(batch):
    assert list(losses(build(MISA), batch)) == [
        "loss_cls",
        "loss_projection",
        "loss_global",
        "loss_local",
        "loss_distillation",
    ]


def test_the_loss_reaches_student_and_adapter_and_not_the_teacher(batch):
    model = build(MISA)
    before = {name: value.clone() for name, value in model.teacher.state_dict().items() if torch.is_tensor(value)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sum(losses(model, batch).values()).backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.adapter.parameters())
    assert all(p.grad is not None for p in model.backbone.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    after = {name: value for name, value in model.teacher.state_dict().items() if torch.is_tensor(value)}
    assert all(torch.equal(value, after[name]) for name, value in before.items())  # BatchNorm statistics too
    assert not model.teacher.training


def test_the_teacher_is_no_part_of_the_student():
    model = build(MISA)
    assert not any("teacher" in name for name in model.state_dict())
    assert {id(p) for p in model.teacher.parameters()}.isdisjoint({id(p) for p in model.parameters()})


def test_prediction_needs_no_teacher(batch):
    model = build(MISA).eval()
    object.__setattr__(model, "teacher", None)
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    with torch.no_grad():
        assert len(model.predict(data["inputs"], data["data_samples"])) == 2
    with pytest.raises(RuntimeError, match="attach one"):
        losses(model.train(), batch)


def test_a_crowd_is_neither_object_nor_background(batch):
    """FSD ignores pixels that lie only in a crowd's box; boxes of objects inside it still count."""
    model = build(MISA.but(affinity={"saliency": False}))
    plain = losses(model, batch)
    crowded, around = copy.deepcopy(batch), copy.deepcopy(batch)
    for sample, all_crowds in zip(crowded["data_samples"], ([(60.0, 0, 128, 96)], []), strict=True):
        sample.ignored_instances = InstanceData(bboxes=torch.tensor(all_crowds).reshape(-1, 4))
    assert losses(model, crowded)["loss_distillation"] != plain["loss_distillation"]
    for sample in around["data_samples"]:  # crowds that cover objects only change nothing
        sample.ignored_instances = InstanceData(bboxes=sample.gt_instances.bboxes.clone())
    assert torch.equal(losses(model, around)["loss_distillation"], plain["loss_distillation"])

    # With everything outside the boxes a crowd, there is no background: its weight has no effect.
    for sample in crowded["data_samples"]:
        sample.ignored_instances = InstanceData(bboxes=torch.tensor([[0.0, 0, 128, 96]]))
    heavy = build(MISA.but(affinity={"saliency": False}, distillation={"bg_weight": 60.0}))
    assert torch.equal(losses(heavy, crowded)["loss_distillation"], losses(model, crowded)["loss_distillation"])
    assert losses(heavy, batch)["loss_distillation"] > plain["loss_distillation"]


def test_a_box_at_the_edge_of_the_image_is_no_padding():
    """The last two pixels of 125 x 93 lie in cells with centres outside the image; the terms still use the box."""
    images, shapes = torch.rand(2, 3, 96, 128), [(96, 128), (93, 125)]
    boxes = [torch.tensor([[0.0, 0, 40, 40]]), torch.tensor([[10.0, 10, 30, 30], [123.5, 91.5, 125, 93]])]
    features = torch.zeros(2, 1, 24, 32)
    union = union_of_boxes(boxes, features, 4)
    shrunk = shrink(images, shapes, union)
    assert not (union[:, 0] & ~shrunk.valid).any()
    assert shrunk.valid[0].all()
    expected = torch.zeros(24, 32, dtype=torch.bool)
    expected[:23, :31] = True
    expected[23, 31] = True
    assert torch.equal(shrunk.valid[1], expected)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_cells_in_the_padding_are_those_with_their_center_outside(stride):
    """As in a box as large as the image: also where the image ends exactly at a center."""
    for h, w in itertools.product(range(9, 33, 3), range(10, 33, 2)):
        size = (32 // stride, 32 // stride)
        valid = shrink(torch.zeros(1, 3, 32, 32), [(h, w)], torch.zeros(1, 1, *size, dtype=torch.bool)).valid
        whole = box_masks(torch.tensor([[0.0, 0.0, w, h]]), *size, stride=stride)
        assert torch.equal(valid, whole), (h, w)


def test_a_loss_that_is_no_number_ends_the_training_by_name(batch):
    model = build(MISA)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.mul_(1e25)
    with pytest.raises(Diverged, match=r"distillation_loss is not finite.*Lower the learning rate"):
        losses(model, batch)


def test_switched_off_it_is_the_baseline_to_the_bit(batch):
    """Rows with the same seed start from the same student, and their common terms are equal."""
    baseline, full = build(find_row("demo:box")), build(MISA)
    for name, value in baseline.state_dict().items():
        assert torch.equal(value, full.state_dict()[name]), name
    off = MISA.but(distillation=None, affinity={"saliency": False}, teacher="")
    expected, got = losses(baseline, batch), losses(build(off), batch)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    only_fsd = losses(build(MISA.but(affinity={"saliency": False})), batch)
    assert all(torch.equal(expected[name], only_fsd[name]) for name in expected)


def test_saliency_and_feature_change_the_pairwise_terms_alone(batch):
    rows = {
        "color": find_row("demo:box"),
        "saliency": MISA.but(distillation=None),
        "feature": MISA.but(distillation=None, affinity={"saliency": False, "feature": True}),
    }
    got = {name: losses(build(row), batch) for name, row in rows.items()}
    for term in ("loss_cls", "loss_projection"):
        assert torch.equal(got["color"][term], got["saliency"][term])
    values = {name: terms["loss_local"].item() for name, terms in got.items()}
    assert len(set(values.values())) == 3, values


@pytest.mark.parametrize(
    "reading",
    [
        {"semantic_values": "class"},
        {"semantic_values": "class", "semantic_factors": "contrast", "local_form": "sum", "global_form": "sum"},
        {"semantic_values": "probability", "semantic_scale": 0.3},
        {"semantic_norm": "channel"},
        {"semantic_norm": "pixel", "semantic_factors": "positive"},
        {"window_share": 0.01},
        {"mode": "pamr", "semantic_values": "class", "pamr_dilations": (1, 2), "pamr_steps": 2},
    ],
)
def test_a_reading_of_s_changes_the_pairwise_terms_alone(batch, reading):
    """Distillation still learns S itself, and the terms have a gradient."""
    model = build(MISA.but(affinity=reading))
    plain, read = losses(build(MISA), batch), losses(model, batch)
    for term in ("loss_cls", "loss_projection", "loss_distillation"):
        assert torch.equal(plain[term], read[term])
    changed = set(read) - {"loss_cls", "loss_projection", "loss_distillation"}
    assert all(not torch.equal(read[name], plain.get(name, torch.zeros(()))) for name in changed - {"loss_global"})
    sum(read.values()).backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_readings_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="semantic_values is of saliency"):
        MISA.but(affinity={"saliency": False, "feature": True, "semantic_values": "class"})
    with pytest.raises(ValueError, match=r"stretch is 1\.0"):
        MISA.but(affinity={"stretch": 1.0})
    with pytest.raises(ValueError, match="window_share is 0"):
        MISA.but(affinity={"window_share": 0.0})
    with pytest.raises(ValueError, match="probabilities are of S and K as they are"):
        MISA.but(affinity={"semantic_values": "probability", "semantic_norm": "channel"})
    with pytest.raises(ValueError, match="semantic_norm is 'batch'; choose one of none, channel, pixel"):
        MISA.but(affinity={"semantic_norm": "batch"})


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        *(("affinity", "local_steps", value) for value in (0, -3)),
        *(
            ("affinity", name, value)
            for name in ("tree_bandwidth", "local_bandwidth")
            for value in (0.0, -0.1, math.nan)
        ),
        *(("affinity", name, -1.0) for name in ("refine_bandwidth", "semantic_scale", "balance", "global_weight")),
        *(("affinity", "window", value) for value in (1, 4, -3)),
        *(("affinity", "pamr_dilations", value) for value in ((), (0, 1))),
        *(("distillation", "radius", value) for value in (-1.0, math.inf)),
        *(("distillation", "scale", value) for value in (-0.1, 1.5, math.nan)),
        *(("distillation", name, -1.0) for name in ("weight", "bg_weight", "fg_weight")),
        *(("schedule", name, value) for name in ("lr", "backbone_lr", "weight_decay") for value in (-1.0, math.inf)),
        *(("schedule", name, 0) for name in ("epochs", "batch", "clip", "lr")),
        *(("augmentation", "flip", value) for value in (-0.1, 1.1, math.nan)),
        *(("augmentation", name, 0) for name in ("long_side", "test_short_side", "crop")),
        *(("augmentation", "short_sides", value) for value in ((), (64, 0))),
        *(("augmentation", "jitter", value) for value in ((0.0, 1.0), (2.0, 0.1), (0.1, math.inf))),
        *(("inference", name, value) for name in ("score", "keep", "mask") for value in (-0.1, 1.5)),
        *(("inference", name, 0) for name in ("candidates", "per_image")),
    ],
)
def test_a_row_with_an_impossible_value_is_refused_before_it_trains(part, name, value):
    """Zero or a negative number of steps would leave the masks as they are, in silence."""
    with pytest.raises(ValueError, match=rf"{part.capitalize()}.*{name}"):
        MISA.but(**{part: {name: value}})


def test_a_weight_below_zero_is_refused():
    """It would train away from what the loss asks for."""
    for name in ("stage_weight", "outside_weight", "class_weight", "sure_weight"):
        with pytest.raises(ValueError, match=rf"Semantic\.{name} is -1"):
            Experiment(semantic=Semantic(**{name: -1.0}))
        assert getattr(Semantic(**{name: 0.0}), name) == 0
    with pytest.raises(ValueError, match=r"Semantic\.loss_stride is 0"):
        Semantic(loss_stride=0)
    with pytest.raises(ValueError, match=r"Experiment\.projection_weight is -1"):
        Experiment(projection_weight=-1.0)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_ends_of_the_ranges_are_allowed(scale):
    affinity = {"local_steps": 1, "window": 3, "balance": 0.0, "global_weight": 0.0, "refine_bandwidth": None}
    row = MISA.but(affinity=affinity, distillation={"radius": 0.0, "scale": scale, "weight": 0.0, "bg_weight": 0.0})
    assert {name: getattr(row.affinity, name) for name in affinity} == affinity
    ends = {"flip": scale, "short_sides": (1,), "long_side": 1, "crop": 1, "jitter": (0.5, 0.5)}
    row = row.but(augmentation=ends, schedule={"backbone_lr": 0.0, "weight_decay": 0.0, "epochs": 1, "warmup": 0})
    row = row.but(inference={"score": scale, "keep": scale, "mask": scale, "candidates": 1, "per_image": 1})
    assert {name: getattr(row.augmentation, name) for name in ends} == ends
    assert row.but(projection_weight=0.0).inference.mask == scale


def test_distillation_has_a_weight(batch):
    once, twice = (losses(build(MISA.but(distillation={"weight": w})), batch) for w in (1.0, 2.0))
    torch.testing.assert_close(twice["loss_distillation"], 2 * once["loss_distillation"])


def test_union_of_boxes_is_what_any_box_covers():
    boxes = [torch.tensor([[0.0, 0, 8, 8], [4, 4, 16, 12]]), torch.zeros(0, 4)]
    union = union_of_boxes(boxes, torch.zeros(2, 5, 4, 6), 4)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:2, :2] = True
    expected[1:3, 1:4] = True
    assert torch.equal(union[0, 0], expected)
    assert not union[1].any()


def test_a_row_that_lacks_its_teacher_is_refused():
    with pytest.raises(ValueError, match="belong together"):
        MISA.but(teacher="")
    with pytest.raises(ValueError, match="belong together"):
        find_row("demo:box").but(teacher="teacher:demo")


def test_colors_are_the_whole_numbers_of_the_image():
    """Float32 gives back 61 as 60.99999, and objectives in L*a*b* cut the fraction off, as published."""
    levels = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    assert torch.equal(pooled_colors((levels - mean) / std, (16, 16)), levels)
