"""Teacher and student in one command: the teacher is trained or reused, and either stage resumes."""

import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from misa.data.digest import digest_of
from misa.engine.reports.explore import open_networks
from misa.engine.reports.figures import Factory
from misa.engine.runs.folder import Run
from misa.engine.runs.places import teacher_folder, teacher_place
from misa.engine.runs.record import require_own, run_params
from misa.engine.training.train import main_score, train
from misa.errors import Stopped, UserError
from misa.experiment import Distillation, Semantic
from misa.rows import lineage
from tests.helpers import CPU, tiny_experiment

TEACHER = tiny_experiment(
    augmentation={"long_side": 96},
    scenes=(("size", 64), ("train", 6), ("val", 3), ("objects", (1, 2))),
    semantic=Semantic(),
)


@pytest.fixture(scope="module")
def place(module_path):
    return module_path


@pytest.fixture(scope="module")
def student(place):
    values = json.loads(json.dumps(TEACHER.values()))
    other = json.loads(json.dumps(TEACHER.but(scenes=(("size", 64),)).values()))
    (place / "rows.py").write_text(
        f"from misa.experiment import Experiment\nROWS = {{'teacher': Experiment.from_values({values!r}), "
        f"'other': Experiment.from_values({other!r})}}\n"
    )
    return TEACHER.but(
        semantic=None, teacher=f"{place / 'rows.py'}:teacher", distillation=Distillation(), affinity={"saliency": True}
    )


@pytest.fixture(scope="module")
def run(place, student):
    return train(student, data_root=place / "data", work_dir=place / "runs" / "misa", machine=CPU)


def test_both_stages_leave_their_run_folders(run, student):
    teacher = run.folder.parent / teacher_folder(student, 0)
    assert "miou" in json.loads((teacher / "metrics.json").read_text())
    assert "segm" in run.metrics
    first = json.loads((run.folder / "losses.jsonl").read_text().splitlines()[0])
    assert first["loss_distillation"] > 0


def test_the_next_student_finds_the_teacher(run, student, place, capsys):
    teacher = run.folder.parent / teacher_folder(student, 0)
    before = (teacher / "metrics.json").stat().st_mtime_ns
    train(
        student.but(distillation=None),
        data_root=place / "data",
        work_dir=run.folder.parent / "sepa",
        machine=CPU,
    )
    assert f"{teacher.name} is finished" in capsys.readouterr().out
    assert (teacher / "metrics.json").stat().st_mtime_ns == before


def test_a_teacher_that_was_trained_alone_is_found(run, student, place, capsys):
    own = place / "alone"
    trained = run.folder.parent / teacher_folder(student, 0)
    shutil.copytree(trained, own / "rows-teacher-seed0")
    capsys.readouterr()
    again = train(student, data_root=place / "data", work_dir=own / "misa", machine=CPU)
    assert "rows-teacher-seed0 is finished; nothing to train" in capsys.readouterr().out
    assert again.metrics == run.metrics
    shutil.rmtree(own / "misa")
    params = json.loads((own / "rows-teacher-seed0" / "params.json").read_text())
    (own / "rows-teacher-seed0" / "params.json").write_text(json.dumps(params | {"digest": "another"}))
    shutil.copytree(trained, own / trained.name)
    train(student, data_root=place / "data", work_dir=own / "misa", machine=CPU)
    assert f"{trained.name} is finished" in capsys.readouterr().out


def test_figures_and_explorers_find_a_teacher_that_was_trained_alone(run, student, place):
    own = place / "found_alone"
    shutil.copytree(run.folder.parent / teacher_folder(student, 0), own / "rows-teacher-seed0")
    shutil.copytree(run.folder, own / "misa")
    assert open_networks(own / "misa").folders == (own / "misa", own / "rows-teacher-seed0")
    assert [one.folder.name for one in Factory([own / "misa"]).sources.runs] == ["misa", "rows-teacher-seed0"]


def test_a_student_of_other_values_of_its_teachers_row_is_another_run(run, student, place):
    """The teacher's row is stored by name, but its values determine what the student learned from."""
    rows = Path(student.teacher.rpartition(":")[0])
    text, before = rows.read_text(), lineage(student)
    own = shutil.copytree(run.folder.parent, place / "other_values") / "misa"
    (own / "metrics.json").unlink()
    try:
        rows.write_text(text.replace("'epochs': 2", "'epochs': 3"))
        assert lineage(student) != before
        assert student.digest() == json.loads((own / "params.json").read_text())["digest"]
        with pytest.raises(UserError, match=r"holds another run \(teacher_digest is"):
            train(student, data_root=place / "data", work_dir=own, machine=CPU)
        params = json.loads((own / "params.json").read_text())
        del params["teacher_digest"]  # an old run, in which it was not recorded
        require_own(own, params)
    finally:
        rows.write_text(text)
    assert lineage(student) == before


def test_what_stops_the_teacher_is_what_is_said(student, tmp_path, monkeypatch):
    """The student's new folder is removed then, and the teacher's beside it stays."""

    def stop(config):
        (Path(config["work_dir"]).parent / "log.txt").write_text("the teacher had begun")
        raise Stopped("stopped by SIGTERM", status=143)

    monkeypatch.setattr("misa.engine.training.train.quiet_runner", stop)
    with pytest.raises(Stopped, match="SIGTERM"):
        train(student, data_root=tmp_path / "data", work_dir=tmp_path / "runs" / "misa", machine=CPU)


def test_a_student_stopped_between_epochs_ends_the_same(run, student, place):
    stopped = shutil.copytree(run.folder, run.folder.parent / "stopped")
    (stopped / "metrics.json").unlink()
    (stopped / "checkpoints" / "epoch_2.pth").unlink()
    again = train(student, data_root=place / "data", work_dir=stopped, machine=CPU)
    np.testing.assert_equal(again.metrics, run.metrics)
    assert (stopped / "losses.jsonl").read_bytes() == (run.folder / "losses.jsonl").read_bytes()


def test_a_teacher_stopped_between_epochs_ends_the_same(run, student, place):
    """The same command resumes the first stage, then trains the student."""
    own = place / "teacher_stopped"
    teacher = shutil.copytree(run.folder.parent / teacher_folder(student, 0), own / teacher_folder(student, 0))
    whole = json.loads((teacher / "metrics.json").read_text())
    (teacher / "metrics.json").unlink()
    (teacher / "checkpoints" / "epoch_2.pth").unlink()
    again = train(student, data_root=place / "data", work_dir=own / "misa", machine=CPU)
    assert json.loads((teacher / "metrics.json").read_text()) == whole
    np.testing.assert_equal(again.metrics, run.metrics)


def test_a_teacher_on_another_folder_of_data_is_not_taken(run, student, place):
    own = place / "moved"
    teacher = shutil.copytree(run.folder.parent / teacher_folder(student, 0), own / teacher_folder(student, 0))
    params = json.loads((teacher / "params.json").read_text())
    (teacher / "params.json").write_text(json.dumps(params | {"data_root": "/elsewhere", "data": {"train": "another"}}))
    with pytest.raises(UserError, match=r"learned from /elsewhere, and this run .* choose a work_dir in another"):
        train(student, data_root=place / "data", work_dir=own / "misa", machine=CPU)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_teacher_of_annotations_that_have_changed_is_not_taken(run, student, place, split, capsys):
    """A student in a new folder, as the message on changed annotations advises; the teacher has not read val."""
    own = place / f"changed {split}"
    teacher = shutil.copytree(run.folder.parent / teacher_folder(student, 0), own / teacher_folder(student, 0))
    params = json.loads((teacher / "params.json").read_text())
    assert params["data"].keys() == {"train", "val"}
    changed = json.dumps(params | {"data": params["data"] | {split: "another"}})
    (teacher / "params.json").write_text(changed)
    shutil.copytree(teacher, own / "rows-teacher-seed0")
    if split == "val":
        train(student, data_root=place / "data", work_dir=own / "misa", machine=CPU)
        assert "rows-teacher-seed0 is finished; nothing to train" in capsys.readouterr().out
        return
    with pytest.raises(UserError, match=r"learned from .* before its annotations changed, and this run"):
        train(student, data_root=place / "data", work_dir=own / "misa", machine=CPU)
    assert not (own / "misa").exists()


def test_a_student_does_not_go_on_with_other_weights_of_its_teacher(run, student, place):
    own = shutil.copytree(run.folder.parent, place / "another_teacher")
    (own / "misa" / "metrics.json").unlink()
    (own / "misa" / "checkpoints" / "epoch_2.pth").unlink()
    path = own / teacher_folder(student, 0) / "checkpoints" / "epoch_2.pth"
    content = torch.load(path, weights_only=True)
    next(v for v in content["state_dict"].values() if v.is_floating_point())[0] += 1
    torch.save(content, path)
    before = (own / "misa" / "losses.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"the weights of the teacher in .* have changed since the run in .* began"):
        train(student, data_root=place / "data", work_dir=own / "misa", machine=CPU)
    assert (own / "misa" / "losses.jsonl").read_bytes() == before
    shutil.move(path.parents[1], own / "elsewhere")
    with pytest.raises(UserError, match=r"the teacher that the run in .* began with is no longer in"):
        train(student, data_root=place / "data", work_dir=own / "misa", machine=CPU)
    assert not path.parents[1].exists()
    shutil.move(own / "elsewhere", path.parents[1])
    env = json.loads((own / "misa" / "env.json").read_text())
    assert len(env.pop("teacher")) == 12
    (own / "misa" / "env.json").write_text(json.dumps(env))  # of an older run
    assert train(student, data_root=place / "data", work_dir=own / "misa", machine=CPU).metrics


def test_a_teacher_for_other_data_or_none_at_all_is_refused(student, place):
    other = student.but(teacher=student.teacher.replace(":teacher", ":other"))
    with pytest.raises(UserError, match="other data"):
        train(other, data_root=place / "data", work_dir=place / "runs" / "wrong", machine=CPU)
    with pytest.raises(UserError, match="student's row"):
        train(
            student.but(teacher="demo:box"),
            data_root=place / "data",
            work_dir=place / "runs" / "wrong",
            machine=CPU,
        )


def test_a_teacher_of_a_students_labels_trains_that_student_first(place, tmp_path, monkeypatch, capsys):
    """By its row, beside the teacher; it is reused if trained under its own name."""
    monkeypatch.chdir(tmp_path)
    box = TEACHER.but(semantic=None)
    values = json.loads(json.dumps(box.values()))
    rows = tmp_path / "labelled.py"
    rows.write_text(f"from misa.experiment import Experiment\nROWS = {{'box': Experiment.from_values({values!r})}}\n")
    teacher = TEACHER.but(semantic={"labels": "student", "student": f"{rows}:box"})
    first = train(teacher, data_root=place / "data", work_dir=tmp_path / "a" / "teacher", machine=CPU)
    made = tmp_path / "a" / f"{box.digest()}-seed0"
    card = json.loads((first.folder / "labels" / "labels.json").read_text())
    assert card.pop("data") == digest_of(first.source.train.annotations)
    assert card == {"labels": "student", "student": {"digest": box.digest(), "seed": 0}}
    assert "segm" in json.loads((made / "metrics.json").read_text())
    assert json.loads((first.folder / "params.json").read_text())["student_digest"] == lineage(box)
    shutil.copytree(made, tmp_path / "b" / "labelled-box-seed0")
    capsys.readouterr()
    again = train(teacher, data_root=place / "data", work_dir=tmp_path / "b" / "teacher", machine=CPU)
    assert "labelled-box-seed0 is finished; nothing to train" in capsys.readouterr().out
    assert again.metrics == first.metrics
    # The student's row is stored by name, but its values determine what the teacher learned from.
    rows.write_text(rows.read_text().replace("'epochs': 2", "'epochs': 3"))
    with pytest.raises(UserError, match=r"holds another run \(student_digest is"):
        train(teacher, data_root=place / "data", work_dir=tmp_path / "a" / "teacher", machine=CPU)


def test_a_teacher_alone_is_taken_while_the_student_that_labelled_for_it_has_its_values(tmp_path):
    rows = tmp_path / "rows.py"
    box = json.loads(json.dumps(TEACHER.but(semantic=None).values()))
    teacher = TEACHER.but(semantic={"labels": "student", "student": f"{rows}:box"})
    values = {"box": box, "teacher": json.loads(json.dumps(teacher.values()))}
    made = f"{{n: Experiment.from_values(v) for n, v in {values!r}.items()}}"
    text = f"from misa.experiment import Experiment\nROWS = {made}"
    rows.write_text(text)
    student = TEACHER.but(semantic=None, teacher=f"{rows}:teacher", affinity={"saliency": True})
    alone = tmp_path / "runs" / "rows-teacher-seed0"
    alone.mkdir(parents=True)
    (alone / "metrics.json").write_text("{}")
    params = run_params(teacher, row="teacher", seed=0, data_root=tmp_path, data={"train": "a"}, classes=["disc"])
    (alone / "params.json").write_text(json.dumps(params))
    assert teacher_place(student, 0, tmp_path / "runs") == alone
    rows.write_text(text.replace("'epochs': 2", "'epochs': 3", 1))
    assert teacher_place(student, 0, tmp_path / "runs").name == teacher_folder(student, 0)
    (alone / "params.json").write_text(json.dumps({k: v for k, v in params.items() if k != "student_digest"}))
    assert teacher_place(student, 0, tmp_path / "runs") == alone  # a run that did not record it


def test_the_heads_of_three_parts_count_them_once_and_name_their_folders(place, tmp_path, monkeypatch, capsys):
    """A student learns from a teacher that learns from another student's masks."""
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "labelled.py"
    box = TEACHER.but(semantic=None)
    teacher = TEACHER.but(semantic={"labels": "student", "student": f"{rows}:box"})
    values = {name: json.loads(json.dumps(row.values())) for name, row in (("box", box), ("teacher", teacher))}
    rows.write_text(
        "from misa.experiment import Experiment\n"
        f"ROWS = {{name: Experiment.from_values(row) for name, row in {values!r}.items()}}\n"
    )
    student = box.but(teacher=f"{rows}:teacher", affinity={"saliency": True}).smoke()
    run = train(student, data_root=place / "data", work_dir="a/student", row="mine:student", machine=CPU)
    out = capsys.readouterr().out.splitlines()
    heads = [line for line in out if re.match(r"\d of \d", line)]
    assert [head.rpartition(", in ")[0] for head in heads] == [
        f"1 of 3: {rows}:box (smoke), seed 0, on cpu",
        f"2 of 3: {rows}:teacher (smoke), seed 0, on cpu",
        "3 of 3: mine:student (smoke), seed 0, on cpu",
    ]
    folders = [tmp_path / head.rpartition(", in ")[2] for head in heads]
    assert all((folder / "metrics.json").is_file() for folder in folders)
    assert folders[-1] == run.folder
    assert sum("learns in 3 parts" in line for line in out) == 1
    assert not any("learns in" in line and "3 parts" not in line for line in out)
    # The log has what the terminal showed of this part: from its head on, every line.
    logged = [line[20:] for line in (run.folder / "log.txt").read_text().splitlines()]
    assert logged[0].startswith("mine:student learns in 3 parts")
    assert re.match(rf"{rows}:teacher: IoU mean \d", logged[1])
    assert logged[2:] == out[out.index(heads[-1]) :]


def test_a_score_that_was_not_measured_says_why():
    def line(metrics, masks):
        return main_score(Run(TEACHER, Path("run"), types.SimpleNamespace(masks=masks), metrics))

    none = dict.fromkeys(("AP", "AP50"))
    assert line({"miou": None, "iou": {"cat": None}}, False) == (
        "IoU mean not measured, since the validation data has no true masks"
    )
    assert line({"bbox": none}, False) == "boxes AP not measured, since the validation data has no objects"
    assert line({"segm": none, "segm_as_rectangles": none}, True) == (
        "masks AP not measured, since the validation data has no objects"
    )
    assert line({"miou": 12.34, "iou": {"cat": 12.34}}, True) == "IoU mean 12.3"
