"""Every objective on every student: it trains or is refused, as listed in the documentation."""

import dataclasses
import pkgutil
import re
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import misa.models
import misa.objectives
from experiments.demo import OBJECTIVES
from misa.errors import UserError
from misa.experiment import FRAMEWORKS, Experiment, Needs
from misa.models.students.base import Clock
from misa.objectives.misa import objective_of
from misa.rows import find_row
from tests.models.students.test_mask2former import build
from tests.models.students.test_shadow import SIZE, batch

SECTION = (Path(__file__).parents[3] / "docs/extending/objective.md").read_text(encoding="utf-8")
SECTION = SECTION.partition("## Objectives and students\n")[2]
(_, _, *STUDENTS), _, *LINES = (
    [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
    for line in re.findall(r"^\|.*\|$", SECTION, re.MULTILINE)
)
TABLE = {name: (needs, dict(zip(STUDENTS, cells, strict=True))) for name, needs, *cells in LINES}
# With open gates, so that every term has a gradient in the third step.
BANK = dataclasses.replace(OBJECTIVES["discobox_bank"].bank, gate=10.0, keys=1, least=2)
OPEN = {
    "discobox": dataclasses.replace(OBJECTIVES["discobox"], gate=10.0),
    "discobox_bank": dataclasses.replace(OBJECTIVES["discobox_bank"], gate=10.0, bank=BANK),
    "boxteacher": dataclasses.replace(OBJECTIVES["boxteacher"], overlap=0.0),
    "sim": dataclasses.replace(OBJECTIVES["sim"], nothing=0.9),
    "sim_paste": dataclasses.replace(OBJECTIVES["sim_paste"], nothing=0.9, paste=1, paste_rate=1.0, sure=0.1),
}
UNTRAINED = {"loss_match"}  # no two masks are similar enough for the bank
MASK_BRANCH = {"solov2": "mask_head.conv_kernel", "condinst": "bbox_head.controller"}
MASK_BRANCH["mask2former"] = "panoptic_head.mask_embed"  # used for masks and not for scores
NAMES = ("apro", "misa", *OBJECTIVES)


def row_of(student: str, name: str) -> Experiment:
    row = find_row({"apro": "demo:box", "misa": "demo:misa"}.get(name, "demo:discobox"))
    row = row.but(
        student=student, network=FRAMEWORKS[student].smoke, inference={"score": 0.001, "keep": 0.0, "mask": 0.3}
    )
    return row.but(objective=OPEN.get(name, OBJECTIVES[name])) if name in OBJECTIVES else row


def flat_objects(rng):
    """Returns images and objects of almost constant color, so that neighbors are similar."""
    images, samples = batch(rng)
    images *= 0.02
    for image, sample in zip(images, samples, strict=True):
        for x1, y1, x2, y2 in sample.gt_instances.bboxes.int().tolist():
            image[:, y1 + 4 : y2 - 4, x1 + 4 : x2 - 4] += 1
    return images, samples


def test_the_table_has_every_objective_and_every_student_that_takes_one():
    assert tuple(TABLE) == NAMES
    assert [name for name, framework in FRAMEWORKS.items() if framework.objectives] == STUDENTS
    kinds = {objective_of(row_of("solov2", name)).kind for name in NAMES}
    assert kinds == {file.name for file in pkgutil.iter_modules(misa.objectives.__path__)} - {"base"}
    for name, (needs, _) in TABLE.items():
        asked = objective_of(row_of("solov2", name)).needs
        assert needs.split(", ") == ([field for field in get_type_hints(Needs) if getattr(asked, field)] or [""]), name


@pytest.mark.parametrize("student", [name for name, framework in FRAMEWORKS.items() if not framework.objectives])
def test_a_student_with_losses_of_its_own_takes_no_objective(student):
    assert f"`{student}`" in SECTION
    with pytest.raises(ValueError, match=f"{student!r} is a baseline with losses of its own: .* no objective"):
        Experiment(student=student, affinity=None, objective=OBJECTIVES["boxinst"])


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_predicts_or_is_refused(rng, student, name):
    row, expected = row_of(student, name), TABLE[name][1][student]
    if expected == "no":
        objective = objective_of(row)
        assert objective.needs.per_box
        said = rf"{objective.kind}, as this row has it, needs one mask of every box.* cannot serve that: .*location.*\."
        with pytest.raises(UserError, match=said):
            build(row)
        return
    assert expected == "yes"
    model = build(row)
    images, samples = flat_objects(rng)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for iteration in (0, 30, 31):
        model.begin_step(Clock(iteration, 100, 0))
        losses = model.loss(images, samples)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(value.isfinite() for value in losses.values())
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert all(grad.isfinite().all() for grad in grads.values())
        branch = [grad for key, grad in grads.items() if key.startswith(MASK_BRANCH[student])]
        assert branch
        assert all(grad.any() for grad in branch)
        optimizer.step()
    assert {key for key, value in losses.items() if value <= 0} <= UNTRAINED
    shadow = None if model.memory is None else model.memory.shadow
    assert (shadow is not None) is bool(model.objective.needs.shadow or model.objective.needs.detections)
    if shadow is not None:
        assert all(p.grad is None for p in shadow.parameters())
        assert not shadow.copy.training
    with torch.no_grad():
        found = model.eval().predict(images, samples)
    assert [own.pred_instances.masks.shape[1:] for own in found] == [(SIZE, SIZE)] * 2
    assert len(found[0].pred_instances)
