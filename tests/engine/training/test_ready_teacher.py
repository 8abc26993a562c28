"""A row with a teacher of torchvision: it is not trained, and its classes are matched by name."""

import json
import shutil
import urllib.error

import numpy as np
import pytest
import torch

from misa.cli import main
from misa.data.source import open_source
from misa.engine.reports.explore import open_networks
from misa.engine.reports.profile import forms
from misa.engine.runs.teacher import ready_teacher, teacher_line
from misa.engine.training.estimate import measure
from misa.engine.training.train import train
from misa.errors import UserError
from misa.experiment import Affinity, Distillation
from misa.models.teacher.table import teacher_channels
from misa.models.teacher.torchvision import match_names, named_teacher
from misa.rows import described, lineage
from tests.helpers import CPU, tiny_experiment

NETWORK = "deeplabv3_mobilenet_v3_large"
NAMES = ("Cat", "potted plant", "airplane", "kite")  # of the embedded classes' places


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in a file, as torchvision stores them; different from those of "untrained"."""
    path = tmp_path_factory.mktemp("weights") / "own.pth"
    state = named_teacher(NETWORK, weights=None).model.state_dict()
    generator = torch.Generator().manual_seed(1)
    last = state["classifier.4.weight"]
    state["classifier.4.weight"] = torch.randn(last.shape, generator=generator)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The embedded scenes as a user's folder, with class names of which VOC has three."""
    source = open_source(tiny_experiment(), tmp_path_factory.mktemp("data"))
    for split in (source.train, source.val):
        content = json.loads(split.annotations.read_text())
        for category, name in zip(content["categories"], NAMES, strict=True):
            category["name"] = name
        split.annotations.write_text(json.dumps(content))
    return source.root


def student_of(teacher):
    return tiny_experiment(
        data="coco",
        scenes=(),
        teacher=teacher,
        distillation=Distillation(unit="spread", radius=1.5),
        affinity=Affinity(saliency=True),
    )


@pytest.fixture(scope="module")
def student(weights):
    return student_of(f"torchvision:{NETWORK}:{weights}")


@pytest.fixture(scope="module")
def run(student, data, tmp_path_factory):
    return train(student, data_root=data, work_dir=tmp_path_factory.mktemp("runs") / "run", machine=CPU)


@pytest.mark.slow
def test_it_trains_alone_and_says_which_classes_are_known(student, data, tmp_path, capsys):
    run = train(student.smoke(), data_root=data, work_dir=tmp_path / "run", machine=CPU)
    out = capsys.readouterr().out
    assert "it knows 3 of 4 classes: Cat (cat), potted plant (pottedplant), airplane (aeroplane)" in out
    assert "by its background alone it sees kite" in out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # no teacher beside it
    assert run.metrics["segm"]


def test_a_run_that_was_stopped_ends_the_same(run, student, data):
    stopped = shutil.copytree(run.folder, run.folder.parent / "stopped")
    (stopped / "metrics.json").unlink()
    (stopped / "checkpoints" / "epoch_2.pth").unlink()
    again = train(student, data_root=data, work_dir=stopped, machine=CPU)
    np.testing.assert_equal(again.metrics, run.metrics)
    assert (stopped / "losses.jsonl").read_bytes() == (run.folder / "losses.jsonl").read_bytes()


def test_it_does_not_go_on_with_other_weights(run, student, data, weights, tmp_path):
    stopped = shutil.copytree(run.folder, tmp_path / "stopped")
    (stopped / "metrics.json").unlink()
    params = json.loads((stopped / "params.json").read_text())
    (stopped / "params.json").write_text(json.dumps(params | {"teacher_digest": "0123456789ab"}))
    with pytest.raises(UserError, match="teacher_digest is 0123456789ab there"):
        train(student, data_root=data, work_dir=stopped, machine=CPU)


def test_its_networks_open_again(run, student, data, weights):
    networks = open_networks(run.folder)
    state = torch.load(weights, weights_only=True)
    assert torch.equal(networks.teacher.model.classifier[-1].weight, state["classifier.4.weight"])
    example = networks.example(networks.image_ids()[0])
    assert example.features is not None
    assert example.saliency_factors.shape == (4, example.features.shape[0])
    assert example.adapted.shape == example.features.shape


def test_figures_and_its_line_name_it(run, student, tmp_path, capsys):
    assert main(["figures", str(run.folder), "--out", str(tmp_path / "figures"), "--images", "1"]) == 0
    assert described("mine", student).endswith(f"taught by {student.teacher}")


def test_its_cost_is_measured(student):
    assert teacher_channels(student) == 256
    work = measure(student, sides=(64, 96))
    assert work.small.frozen == sum(value.numel() for value in named_teacher(NETWORK, weights=None).parameters())
    assert set(forms(student)) >= {"+ FSD", "+ FSD + SEPA"}


@pytest.mark.slow
def test_it_is_profiled(student, data, tmp_path, capsys):
    file = tmp_path / "mine.py"
    values = json.loads(json.dumps(student.values()))
    file.write_text(f"from misa.experiment import Experiment\nROWS = {{'own': Experiment.from_values({values!r})}}\n")
    assert main(["profile", f"{file}:own", "--steps", "1", "--data-root", str(data)]) == 0
    assert "teacher forward" in capsys.readouterr().out


def test_without_internet_it_is_one_sentence_before_the_data_is_read(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(
        UserError, match=rf"weights of {NETWORK} cannot be downloaded \(no route\).*torchvision:{NETWORK}:"
    ):
        train(student_of(f"torchvision:{NETWORK}"), data_root=tmp_path / "none", work_dir=tmp_path / "run", machine=CPU)
    assert not (tmp_path / "run").exists()


def test_a_smoke_run_says_that_the_weights_are_random(student, monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)
    row = student_of(f"torchvision:{NETWORK}")
    teacher = ready_teacher(row.smoke(), NAMES)
    assert teacher_line(row.smoke(), teacher).endswith(
        "sees kite; random weights in a smoke run; a real run downloads them"
    )
    assert teacher_line(row, teacher).endswith("sees kite")
    assert teacher_line(student.smoke(), ready_teacher(student.smoke(), NAMES)).endswith("sees kite")  # of a file


@pytest.mark.slow
def test_a_smoke_run_downloads_nothing_and_repeats(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)
    row = student_of(f"torchvision:{NETWORK}").smoke()
    first, second = (train(row, data_root=data, work_dir=tmp_path / name, machine=CPU).folder for name in "ab")
    assert (first / "losses.jsonl").read_bytes() == (second / "losses.jsonl").read_bytes()
    assert capsys.readouterr().out.count("random weights in a smoke run") == 2


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("torchvision:deeplabv4", "has no segmentation network 'deeplabv4'"),
        ("torchvision:lraspp_mobilenet_v3_large", "has no segmentation network"),
        ("torchvision:fcn_resnet50:missing.pth", "no file of weights missing.pth"),
    ],
)
def test_what_is_no_teacher_is_one_sentence(teacher, message, data, tmp_path):
    with pytest.raises(UserError, match=message):
        train(student_of(teacher), data_root=data, work_dir=tmp_path / "run", machine=CPU)


def test_where_no_class_is_known_it_is_one_sentence(weights):
    with pytest.raises(UserError, match="knows none of the classes disc, kite; it knows aeroplane"):
        named_teacher(f"{NETWORK}:{weights}", classes=("disc", "kite"))


def test_names_match_by_their_letters():
    voc = ("aeroplane", "diningtable", "tvmonitor", "cat")
    classes = ("airplane", "Dining Table", "dining_table", "tv", "cat", "cats", "---")
    assert match_names(classes, voc) == {
        "airplane": "aeroplane", "Dining Table": "diningtable", "dining_table": "diningtable",
        "tv": "tvmonitor", "cat": "cat",
    }  # fmt: skip


def test_a_class_without_a_name_is_what_is_not_background(weights):
    teacher = named_teacher(f"{NETWORK}:{weights}", classes=("kite", "cat"))
    last = teacher.model.classifier[-1]
    categories = ["__background__", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"]
    prior, layer = teacher.prior(torch.zeros(1, 3, 32, 32)), teacher.last_layer()
    expected = torch.stack([-last.weight[0], last.weight[categories.index("cat")]]).flatten(1)
    assert torch.equal(prior.saliency_factors, expected)
    assert torch.equal(layer.factors, expected)
    assert torch.equal(layer.bias, torch.stack([-last.bias[0], last.bias[categories.index("cat")]]))


def test_the_lineage_of_a_row_is_its_own_hash(student):
    assert lineage(student) == student.digest()
