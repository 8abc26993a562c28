"""A training that begins with another one's weights."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

from misa.commands.train import Train, experiment_of, train_with
from misa.engine.prediction.export import export_student
from misa.engine.prediction.student import load_student
from misa.engine.runs.checkpoints import last_checkpoint, read_checkpoint
from misa.engine.runs.start import begin, find_start, start_file
from misa.engine.training.train import train
from misa.errors import UserError
from misa.experiment import Semantic
from misa.files import shorter
from misa.models.students.table import model_config
from misa.objectives.boxteacher import BoxTeacher
from misa.objectives.sim import SIM
from tests.helpers import CPU


def weights(path):
    return read_checkpoint(path)["state_dict"]


def begun(row, path, classes):
    """The modules that begin anew, the network's weights before, and those after."""
    row = row.but(start=str(path))
    start = find_start(row, classes)
    model = MODELS.build(model_config(row.but(network={"pretrained": False}), classes))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    begin(model, start)
    return {name.rpartition(".")[0] for name in start.anew}, before, model.state_dict()


def copied(run, place, **changed):
    """A run folder with the checkpoint and the record of another one, but for these values of the record."""
    path = last_checkpoint(run.folder)
    (place / "checkpoints").mkdir(parents=True)
    (place / "checkpoints" / path.name).write_bytes(path.read_bytes())
    record = json.loads((run.folder / "params.json").read_text())
    (place / "params.json").write_text(json.dumps(record | changed))
    return place


def test_all_weights_of_the_same_network_are_taken(small_row, small_run):
    anew, _, after = begun(small_row, small_run.folder, small_run.source.classes)
    assert anew == set()
    there = weights(last_checkpoint(small_run.folder))
    for name, value in after.items():
        assert torch.equal(value, there[name]), name


def others(classes):
    return {"more": (*classes, "kite"), "others": ("kite", *classes[1:]), "order": (*classes[1:], classes[0])}


@pytest.mark.parametrize("case", ["more", "others", "order"])
def test_layers_of_other_classes_begin_anew_and_are_named(case, small_row, small_run):
    """With as many classes of other names, or in another order, the shapes alone would fit."""
    classes = others(small_run.source.classes)[case]
    anew, before, after = begun(small_row, small_run.folder, classes)
    assert anew == {"mask_head.conv_cls"}
    there = weights(last_checkpoint(small_run.folder))
    for name, value in after.items():
        assert torch.equal(value, before[name] if "conv_cls" in name else there[name]), name


def test_a_bare_checkpoint_is_assumed_to_be_of_these_classes(small_row, small_run, tmp_path):
    path = tmp_path / "bare.pth"
    torch.save({"state_dict": weights(last_checkpoint(small_run.folder))}, path)
    assert begun(small_row, path, others(small_run.source.classes)["others"])[0] == set()
    assert begun(small_row, path, others(small_run.source.classes)["more"])[0] == {"mask_head.conv_cls"}


def test_an_exported_student_is_a_start_as_its_run_is(small_row, small_run, tmp_path):
    classes, out = small_run.source.classes, export_student(small_run.folder, tmp_path / "student.pth")
    anew, _, after = begun(small_row, out, classes)
    assert anew == set()
    for name, value in begun(small_row, small_run.folder, classes)[2].items():
        assert torch.equal(value, after[name]), name
    assert begun(small_row, out, others(classes)["others"])[0] == {"mask_head.conv_cls"}
    digests = {find_start(small_row.but(start=str(path)), classes).digest for path in (out, small_run.folder)}
    assert digests == {load_student(out).digest}


@pytest.mark.parametrize("case", ["others", "order"])
def test_the_classifier_of_a_teacher_of_other_classes_begins_anew(case, small_row, small_run, tmp_path):
    """Its checkpoint states its classes, and would refuse others if it were loaded as it is."""
    classes, path = small_run.source.classes, tmp_path / "teacher.pth"
    row = small_row.but(affinity=None, semantic=Semantic())
    teacher = MODELS.build(model_config(row, classes))
    torch.save(
        {"state_dict": {n: v + 1 if v.is_floating_point() else v for n, v in teacher.state_dict().items()}}, path
    )
    same = begun(row, path, classes)[0]
    assert same == set()
    anew, before, after = begun(row, path, others(classes)[case])
    assert anew == begun(row, path, others(classes)["more"])[0], "what has another shape with one class more"
    assert "network.classifier" in anew
    assert not [name for name in anew if name.startswith(("backbone", "neck"))]
    there = weights(path)
    for name, value in after.items():
        if not name.endswith("_extra_state"):
            taken = name.rpartition(".")[0] not in anew
            assert torch.equal(value, there[name] if taken else before[name]), name


def test_another_backbone_is_refused(small_row, small_run):
    row = small_row.but(network={"backbone": "resnet50"}, start=str(small_run.folder))
    with pytest.raises(UserError, match=r"of another network: backbone\..* has another shape, or only one"):
        find_start(row, small_run.source.classes)


@pytest.mark.parametrize("backbone", ["resnet34", "resnet50"])
def test_another_backbone_of_a_teacher_is_refused(backbone, small_row, small_run, tmp_path):
    classes, path = small_run.source.classes, tmp_path / "teacher.pth"
    row = small_row.but(affinity=None, semantic=Semantic(), network={"pretrained": False})
    teachers = {name: row.but(network={"backbone": name}) for name in (row.network.backbone, backbone)}
    for there, own in (teachers.values(), reversed(teachers.values())):
        torch.save({"state_dict": MODELS.build(model_config(there, classes)).state_dict()}, path)
        with pytest.raises(UserError, match=r"of another network: network\.backbone\."):
            find_start(own.but(start=str(path)), classes)


def test_a_network_of_another_kind_is_refused(small_row, small_run, tmp_path):
    classes, path = small_run.source.classes, tmp_path / "teacher.pth"
    row = small_row.but(affinity=None, semantic=Semantic(), network={"pretrained": False})
    torch.save({"state_dict": MODELS.build(model_config(row, classes)).state_dict()}, path)
    with pytest.raises(UserError, match=r"is a teacher's checkpoint and the row is a student; .* of the same kind"):
        find_start(small_row.but(start=str(path)), classes)
    with pytest.raises(
        UserError, match=r"is not a teacher's .*network\.…\) and the row is a teacher; .* of the same kind"
    ):
        find_start(row.but(start=str(small_run.folder)), classes)


def test_a_backbone_with_more_blocks_is_refused(small_row, small_run, tmp_path):
    """A ResNet-34 has all names and shapes of a ResNet-18."""
    classes, path = small_run.source.classes, tmp_path / "deeper.pth"
    deeper = MODELS.build(model_config(small_row.but(network={"backbone": "resnet34"}), classes))
    torch.save({"state_dict": deeper.state_dict()}, path)
    with pytest.raises(UserError, match=r"of another network: backbone\.layer1\.2\."):
        find_start(small_row.but(start=str(path)), classes)


def test_the_state_of_an_objective_begins_anew(small_row, small_run, tmp_path):
    """Its prototypes, counters and EMA model are of the other run's steps and classes."""
    row, classes, path = small_row.but(affinity=None, objective=SIM()), small_run.source.classes, tmp_path / "sim.pth"
    other = MODELS.build(model_config(row, classes))
    torch.save({"state_dict": {name: value + 1 for name, value in other.state_dict().items()}}, path)
    anew, before, after = begun(row, path, classes)
    assert anew == set()
    assert any(name.startswith("memory.own.") for name in before)
    there = weights(path)
    for name, value in after.items():
        assert torch.equal(value, before[name] if name.startswith("memory.") else there[name]), name


def test_of_a_run_whose_ema_model_predicts_its_weights_are_taken(small_row, small_run, tmp_path):
    classes = small_run.source.classes
    row = small_row.but(affinity=None, objective=BoxTeacher(), inference={"from_shadow": True})
    model = MODELS.build(model_config(row, classes))
    place = copied(small_run, tmp_path / "run", experiment=row.values())
    there = {name: value + name.startswith("memory.shadow.") for name, value in model.state_dict().items()}
    torch.save({"state_dict": there}, last_checkpoint(place))
    anew, _, after = begun(small_row, place, classes)
    assert anew == set()
    for name, value in after.items():
        assert torch.equal(value, there[f"memory.shadow.copy.{name}"]), name
        assert not torch.equal(value, there[name]), name


def test_a_record_of_another_version_is_named(small_row, small_run, tmp_path):
    place = copied(small_run, tmp_path / "run", experiment=[])
    with pytest.raises(UserError, match="another version of misa"):
        find_start(small_row.but(start=str(place)), small_run.source.classes)


def test_a_start_is_a_folder_or_a_file(small_run, tmp_path):
    path = last_checkpoint(small_run.folder)
    assert start_file(str(small_run.folder)) == start_file(str(path)) == path
    with pytest.raises(UserError, match="nowhere"):
        start_file(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no checkpoint"):
        start_file(str(tmp_path))


def test_a_start_that_changes_before_the_first_step_is_refused(small_row, small_run, tmp_path):
    path, classes = tmp_path / "start.pth", small_run.source.classes
    there = weights(last_checkpoint(small_run.folder))
    torch.save({"state_dict": there}, path)
    start = find_start(small_row.but(start=str(path)), classes)
    model = MODELS.build(model_config(small_row.but(network={"pretrained": False}), classes))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"state_dict": {n: v + 1 if "conv_cls" in n else v for n, v in there.items()}}, path)
    with pytest.raises(UserError, match=rf"have changed since .* \({start.digest} then, \w+ now\); run the same again"):
        begin(model, start)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unfinished_and_a_smoke_start_are_remarked(small_row, small_run, tmp_path):
    """A user who names a checkpoint knows that it may be an early one."""

    def remarks(start):
        return find_start(small_row.but(start=str(start)), small_run.source.classes).remarks

    values = small_run.experiment.values()
    place = copied(small_run, tmp_path / "run", experiment=values | {"limit": 4})
    assert remarks(small_run.folder) == remarks(last_checkpoint(place)) == ()
    smoke, unfinished = remarks(place)
    assert smoke.startswith(f"{place} is a smoke run")
    epochs = values["schedule"]["epochs"]
    assert unfinished == f"{place} has not ended its training; what follows is of epoch {epochs} of {epochs}."
    (place / "metrics.json").write_bytes((small_run.folder / "metrics.json").read_bytes())
    assert remarks(place) == (smoke,)


@pytest.mark.parametrize("link", [True, False])
def test_the_record_is_found_beside_a_link_and_a_bare_name(link, small_row, small_run, tmp_path, monkeypatch):
    """Without it, layers of other classes would be taken as they are."""
    path = last_checkpoint(small_run.folder)
    if link:
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path if link else path.parent)
    classes = others(small_run.source.classes)["others"]
    assert begun(small_row, path.name, classes)[0] == {"mask_head.conv_cls"}


def test_a_training_begins_there_and_resumes_without_it(small_row, small_run, module_path, tmp_path, capsys):
    """With steps too small to change a weight in single precision, its weights are those that it began with."""
    start = tmp_path / "start5.pth"
    start.write_bytes(last_checkpoint(small_run.folder).read_bytes())
    row = small_row.but(
        start=str(tmp_path / "start{seed}.pth"), schedule={"epochs": 1, "lr": 1e-12}, network={"norm_eval": True}
    )
    assert row.digest() != small_row.digest()
    options = {"data_root": module_path / "data", "work_dir": tmp_path / "run", "machine": CPU, "seed": 5}
    run = train(row, **options)
    assert "begins with the weights of" in capsys.readouterr().out
    digest = find_start(row, run.source.classes, 5).digest
    log = (run.folder / "log.txt").read_text().replace("\n", " ")
    assert f"begins with the weights of {shorter(start)} ({digest})" in log
    assert json.loads((run.folder / "env.json").read_text())["start"] == digest
    after, before = weights(last_checkpoint(run.folder)), weights(start)
    names = [name for name in after if name.endswith("weight")]
    assert names
    for name in names:
        torch.testing.assert_close(after[name], before[name], atol=1e-8, rtol=1e-5)
    assert train(row, **options).metrics == run.metrics
    assert capsys.readouterr().err == ""
    changed = {name: value + 1 if "conv_cls" in name else value for name, value in before.items()}
    torch.save({"state_dict": changed}, start)
    assert train(row, **options).metrics == run.metrics
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"have changed since the run in .* began with them \({digest} then, \w+ now\)", line), line
    start.write_text("no checkpoint")
    train(row, **options)
    start.unlink()
    train(row, **options)
    assert capsys.readouterr().err == ""
    (run.folder / "metrics.json").unlink()
    again = train(row, **options)
    assert again.metrics == run.metrics
    assert "begins with" not in capsys.readouterr().out


def test_what_is_scored_are_the_trained_weights(small_row, small_run, module_path, tmp_path):
    """mmengine loads once more before the test: resumed there, a run without its start predicts the same."""
    row = small_row.but(start=str(small_run.folder), schedule={"epochs": 1, "lr": 0.05})
    options = {"data_root": module_path / "data", "work_dir": tmp_path / "run", "machine": CPU}
    train(row, **options)
    file = Path("predictions/val.json")
    found = (tmp_path / "run" / file).read_bytes()
    assert found != (small_run.folder / file).read_bytes()
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "run" / file).unlink()
    train(row, **options)
    assert (tmp_path / "run" / file).read_bytes() == found


def test_a_start_that_does_not_fit_is_found_before_any_work(small_row, small_run, module_path, tmp_path):
    row = small_row.but(start=str(small_run.folder), network={"backbone": "resnet50"})
    with pytest.raises(UserError, match="of another network"):
        train(row, data_root=module_path / "data", work_dir=tmp_path / "run", machine=CPU)
    assert not (tmp_path / "run" / "params.json").exists()


def test_a_missing_start_leaves_no_folder_and_the_new_one_is_not_suggested(small_row, module_path, tmp_path):
    row = small_row.but(start=str(tmp_path / "missing" / "small-box-seed0"))
    (tmp_path / "missing").mkdir()
    folder = tmp_path / "missing" / "small-box-seed1"
    with pytest.raises(UserError, match=r"there is no run folder or checkpoint .*small-box-seed0; give one made by"):
        train(row, data_root=module_path / "data", work_dir=folder, machine=CPU)
    assert not folder.exists()


def test_the_log_names_four_of_many_new_layers(small_row, small_run, module_path, tmp_path, capsys):
    start = copied(small_run, tmp_path / "start")  # without its scores, as while it is trained
    row = small_row.but(start=str(start), schedule={"epochs": 1}, network={"neck_channels": 32})
    run = train(row, data_root=module_path / "data", work_dir=tmp_path / "run", machine=CPU)
    out = capsys.readouterr().out
    for text in (out, (run.folder / "log.txt").read_text().replace("\n", " ")):
        assert f"warning: {start} has not ended its training" in text
    (line,) = [line for line in out.splitlines() if line.startswith("begins with")]
    assert re.search(r", but for [\w.]+, [\w.]+, [\w.]+, [\w.]+, \d+ more layers$", line), line


def test_the_option_changes_the_row_and_its_folder(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = Train(row="demo:box", start=str(small_run.folder))
    assert experiment_of(options).start == str(small_run.folder)
    assert experiment_of(Train(row="demo:box", start="there", smoke=True)).start == "", "its network is another"
    with pytest.raises(UserError, match="nowhere"):
        train_with(Train(row="demo:box", start="nowhere", smoke=True))
    with pytest.raises(UserError, match="nowhere"):
        train_with(Train(row="demo:box", start="nowhere"))
    for smoke in (True, False):
        with pytest.raises(UserError, match=r"checkpoint no\{where\}3_3;"):
            train_with(Train(row="demo:box", start="no{where}{seed}_{seed}", seed=3, smoke=smoke))
    assert not (tmp_path / "runs" / "demo-box-seed0-start" / "params.json").exists()


def test_a_smoke_run_says_that_it_begins_with_nothing(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("misa.engine.training.train.train", lambda experiment, **_: experiment.start)
    given = Train(row="demo:box", smoke=True, start=str(small_run.folder), work_dir=str(tmp_path / "run"))
    assert train_with(given) == ""
    assert "smoke: trained from scratch, start was only read" in capsys.readouterr().out
    with pytest.raises(UserError, match="none"):
        train_with(dataclasses.replace(given, start=str(tmp_path / "none")))
