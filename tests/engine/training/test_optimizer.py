"""Learning rates and weight decay of parameters, read from the optimiser of a row's network."""

import dataclasses
import itertools

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm

from misa.commands.train import Train, experiment_of
from misa.engine.training.optimizer import learning_rates, optimizer_config, schedule_faults
from misa.experiment import FRAMEWORKS, TINY, Experiment, Schedule, Semantic
from misa.models.students.table import model_config
from misa.rows import find_row

BOX = ("solov2", "mask2former", "boxinst")


def smallest(student):
    row = Experiment(student=student, supervision="box" if student in BOX else "mask", data="coco").smoke()
    return row.but(affinity=None, network={"pretrained": False}, schedule={"lr": 0.01, "weight_decay": 0.1})


def built(row):
    with torch.device("cpu" if row.semantic or "swin" in row.network.backbone else "meta"):
        return MODELS.build(model_config(row, ("disc", "bar")))


def rates(row):
    """Returns name -> (learning rate, weight decay) from the optimiser."""
    model = built(row)
    optimizer = build_optim_wrapper(model, optimizer_config(row)).optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    norms = {
        f"{n}.{part}" for n, m in model.named_modules() if isinstance(m, _BatchNorm) for part in ("weight", "bias")
    }
    return found, norms


@pytest.mark.parametrize("student", FRAMEWORKS)
def test_the_backbone_of_every_student_learns_slower_where_the_row_says_so(student):
    row = smallest(student)
    plain, norms = rates(row)
    slow, _ = rates(row.but(schedule={"backbone_lr": 0.1}))
    assert plain.keys() == slow.keys()
    mine = {name for name in slow if name.startswith("backbone.")}
    assert mine
    assert all(slow[name][0] == pytest.approx(0.001 if name in mine else 0.01) for name in slow)
    assert {rate for rate, _ in plain.values()} == {0.01}
    if student != "mask2former":  # mmdet's own recipe applies weight decay to the norms of the backbone
        assert all(slow[name][1] == plain[name][1] for name in slow)
        assert all(slow[name][1] == 0 for name in norms & mine)
        assert all(slow[name][1] == 0.1 for name in mine - norms)


@pytest.mark.parametrize("student", FRAMEWORKS)
@pytest.mark.parametrize("backbone_lr", [1.0, 0.1])
def test_norms_decay_where_the_row_says_so(student, backbone_lr):
    row = smallest(student).but(network={"backbone": "swin_t"}, schedule={"backbone_lr": backbone_lr})
    model = built(row)
    layers = (_BatchNorm, torch.nn.GroupNorm, torch.nn.LayerNorm)
    norms = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, layers)}
    assert any(".stages." in name for name in norms)
    assert {rates(row)[0][name][1] for name in norms} == {0}
    assert {rates(row.but(schedule={"norm_decay": True}))[0][name][1] for name in norms} == {0.1}


def test_the_stochastic_depth_of_a_swin_is_that_of_the_row():
    """Rising from 0 in the first block to the rate in the last."""
    for rate in (0.3, 0.2):
        row = smallest("condinst").but(network={"backbone": "swin_t", "drop_path": rate})
        found = [m.drop_prob for m in built(row).backbone.modules() if type(m).__name__ == "DropPath"]
        assert found[0] == 0
        assert max(found) == found[-1] == pytest.approx(rate)


def test_the_backbone_of_the_teacher_learns_slower_too():
    row = smallest("solov2").but(semantic=Semantic(), schedule={"backbone_lr": 0.1})
    found, _ = rates(row)
    assert {name for name, (rate, _) in found.items() if rate < 0.01} == {n for n in found if ".backbone." in n}


def test_an_unknown_backbone_is_refused_before_a_teacher_is_trained(tmp_path):
    from misa.engine.training.train import train
    from misa.errors import UserError

    row = Experiment(network=TINY).but(
        network={"backbone": "resnet20"}, teacher="teacher:demo", affinity={"saliency": True}
    )
    with pytest.raises(UserError, match="no backbone 'resnet20'"):
        train(row, data_root=tmp_path, work_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def by_step(schedule, steps):
    """The learning rate of every step, by mmengine's own schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule.lr)
    schedulers = []
    for config in learning_rates(schedule, steps):
        kind = config.pop("type")
        schedulers.append((config["by_epoch"], kind(optimizer, **config)))
    found = []
    for step in range(schedule.epochs * steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for by_epoch, scheduler in schedulers:
            if not by_epoch or (step + 1) % steps == 0:
                scheduler.step()
    return found


@pytest.mark.parametrize("epochs", [1, 3, 4, 9])
@pytest.mark.parametrize("warmup", [0, 4, 20, 40])
@pytest.mark.parametrize("milestones", [(3, 6), (3,), (8,), ()])
@pytest.mark.parametrize("decay", ["step", "cosine"])
def test_what_lies_beyond_the_end_of_a_training_is_told(epochs, warmup, milestones, decay):
    schedule = Schedule(epochs=epochs, batch=2, lr=0.5, decay=decay, milestones=milestones, warmup=warmup)
    rates, faults = by_step(schedule, 5), schedule_faults(schedule, 5)
    rising = by_step(dataclasses.replace(schedule, decay="step", milestones=()), 5)
    assert any("the warm-up" in fault for fault in faults) == (max(rising) < 0.499)
    if decay == "step":
        falls = sum(after < before for before, after in itertools.pairwise(rates))
        assert any("was to fall" in fault for fault in faults) == (falls < len(milestones))
    else:
        assert not any("was to fall" in fault for fault in faults)


def test_with_other_epochs_the_learning_rate_falls_at_the_same_shares():
    row = "table1_coco:misa_r50"
    assert experiment_of(Train(row=row)).schedule.milestones == (27, 33)
    assert experiment_of(Train(row=row, epochs=12)).schedule.milestones == (9, 11)
    assert experiment_of(Train(row=row, epochs=6)).schedule.milestones == (4, 5)
    assert experiment_of(Train(row=row, epochs=3)).schedule.milestones == (2, 2)
    assert experiment_of(Train(row=row, epochs=1)).schedule.milestones == (1, 1)
    assert experiment_of(Train(row="demo:box", epochs=3)).digest() == (
        find_row("demo:box").but(schedule={"epochs": 3}).digest()
    ), "a cosine has no milestones"
