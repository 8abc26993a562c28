"""An exported student predicts the same, holds nothing of the training, and executes no code when loaded."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from PIL import Image

from misa.cli import main
from misa.data.pipeline import MEAN, at_test_size
from misa.engine.prediction import export
from misa.engine.prediction.export import compare_export, export_student, export_torchscript
from misa.engine.prediction.student import Student, find, for_inference, load_student
from misa.engine.runs.checkpoints import CARD, read_checkpoint, weights_digest
from misa.errors import UserError
from misa.experiment import Distillation
from misa.models.students.solov2_decode import decode, each_image
from misa.models.students.solov2_inference import as_instances, views
from misa.models.students.table import model_config
from tests.helpers import tiny_experiment


@pytest.fixture(scope="module")
def exported(small_run, module_path):
    return export_student(small_run.folder, module_path / "student.pth")


def images(run):
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(run.source.val.images.iterdir())]


def same(ours, theirs):
    assert len(ours) > 0
    assert ours.labels == theirs.labels
    assert np.array_equal(ours.scores, theirs.scores)
    assert ours.runs == theirs.runs


def test_it_predicts_the_same_to_the_bit(small_run, exported):
    run, file = load_student(small_run.folder, device="cpu"), load_student(exported, device="cpu")
    assert (file.classes, file.digest) == (run.classes, run.digest)
    for image in images(small_run):
        same(find(file, [image], score=0.0)[0], find(run, [image], score=0.0)[0])


def test_weights_of_any_type_have_a_digest():
    """That of stored float32 weights, in records of predictions, stays the hash of their names and NumPy bytes."""
    weights = {
        "b": torch.arange(6.0).reshape(2, 3).T,
        "a": torch.tensor(7),
        "c": torch.tensor([True]),
        "d": torch.ones(0),
    }
    plain = b"".join(name.encode() + np.ascontiguousarray(weights[name].numpy()).tobytes() for name in sorted(weights))
    assert weights_digest(weights) == hashlib.sha256(plain).hexdigest()[:12]
    brief = {"a": torch.tensor([1.0, -2.0]).bfloat16()}  # 0x3f80 and 0xc000, little-endian
    assert weights_digest(brief) == hashlib.sha256(b"a" + bytes.fromhex("803f00c0")).hexdigest()[:12]


def test_bfloat16_weights_predict_as_their_float32_values(small_run, exported, tmp_path):
    content = read_checkpoint(exported)
    brief = {k: v.bfloat16() if v.is_floating_point() else v for k, v in content["state_dict"].items()}
    wide = {k: v.float() if v.is_floating_point() else v for k, v in brief.items()}
    found = []
    for name, weights in (("brief", brief), ("wide", wide)):
        torch.save(content | {"state_dict": weights}, tmp_path / f"{name}.pth")
        student = load_student(tmp_path / f"{name}.pth", device="cpu")
        found.append(find(student, images(small_run)[:1], score=0.0)[0])
    same(*found)


def test_it_holds_the_student_alone_as_tensors_and_text(small_run, exported):
    content = torch.load(exported, weights_only=True)
    assert set(content) == {CARD, "state_dict"}
    assert all(isinstance(value, torch.Tensor) for value in content["state_dict"].values())
    card = json.loads(content[CARD])
    assert card["classes"] == list(small_run.source.classes)
    (checkpoint,) = (small_run.folder / "checkpoints").glob("epoch_8.pth")
    assert exported.stat().st_size < 0.5 * checkpoint.stat().st_size, "no optimiser"


def test_it_loads_without_the_run_and_without_any_teacher(exported, small_run, tmp_path):
    """In a new process, from another empty folder."""
    shutil.copy(exported, tmp_path / "only.pth")
    image = sorted(small_run.source.val.images.iterdir())[0]
    code = (
        "import sys, misa; from misa.engine.prediction.student import load_student, find; import mmcv; "
        f"s = load_student('only.pth', device='cpu'); x = mmcv.imread({str(image)!r}, channel_order='rgb'); "
        "print(len(find(s, [x], score=0.0)[0])); print('misa.models.teacher.semask' in sys.modules and "
        "any('Se' + 'Mask' in type(m).__name__ for m in s.model.modules()))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(export.__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    count, teacher = done.stdout.split()
    assert int(count) > 0
    assert teacher == "False"


def test_the_adapter_of_fsd_stays_behind(small_run, tmp_path):
    """For a checkpoint of a row with a teacher, parts used only in training are neither required nor written."""
    folder = shutil.copytree(small_run.folder, tmp_path / "run")
    params = json.loads((folder / "params.json").read_text())
    distilled = small_run.experiment.but(teacher="teacher:demo", distillation=Distillation())
    params["experiment"] = json.loads(json.dumps(distilled.values()))
    (folder / "params.json").write_text(json.dumps(params))
    path = folder / "checkpoints/epoch_8.pth"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["adapter.conv.weight"] = torch.zeros(3, 3)
    torch.save(content, path)
    out = export_student(folder, tmp_path / "student.pth")
    assert not any("adapter" in name for name in torch.load(out, weights_only=True)["state_dict"])
    for image in images(small_run)[:1]:
        same(
            find(load_student(out), [image], score=0.0)[0], find(load_student(small_run.folder), [image], score=0.0)[0]
        )


def test_nothing_is_overwritten(small_run, exported, tmp_path, capsys):
    before = exported.read_bytes()
    assert main(["export", str(small_run.folder), str(exported)]) == 2
    assert "exists already; give another name" in capsys.readouterr().err
    assert exported.read_bytes() == before
    assert main(["export", str(small_run.folder), str(tmp_path)]) == 2
    assert "is a folder; give the name of a new file" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["export", str(small_run.folder), str(tmp_path / "file" / "x.pth")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_earlier_export_is_renewed_and_no_other_file(small_run, exported, tmp_path):
    """As own_data.ipynb exports, after a run of other weights has been exported there."""
    out, pictures = tmp_path / "student.pth", images(small_run)[:2]
    content = torch.load(exported, weights_only=True)
    name = next(name for name in content["state_dict"] if name.startswith("mask_head") and name.endswith("weight"))
    content["state_dict"][name] = content["state_dict"][name] + 1
    torch.save(content, out)
    with pytest.raises(UserError, match=r"student\.pth has other weights than the student of .*; export it again"):
        compare_export(small_run.folder, out, pictures)
    assert export_student(small_run.folder, out, renew=True) == out
    assert load_student(out).digest == load_student(small_run.folder).digest
    count = sum(len(found) for found in find(load_student(out), pictures, score=0.0))
    assert count > 0
    said = compare_export(small_run.folder, out, pictures)
    assert said == f"the exported student has the same weights and finds the same {count} instances in 2 images"
    (checkpoint,) = (small_run.folder / "checkpoints").glob("epoch_8.pth")
    other = shutil.copy(checkpoint, tmp_path / "other.pth")
    with pytest.raises(UserError, match="exists already"):
        export_student(small_run.folder, other, renew=True)


def test_an_export_of_another_row_is_found_by_its_card(small_run, exported, tmp_path):
    """The thresholds of inference are the row's: the same weights find other instances."""
    content = torch.load(exported, weights_only=True)
    card = json.loads(content[CARD])
    card["classes"] = card["classes"][::-1]
    torch.save({**content, CARD: json.dumps(card)}, tmp_path / "student.pth")
    with pytest.raises(UserError, match="has other row or classes than"):
        compare_export(small_run.folder, tmp_path / "student.pth", [])


def test_torchscript_gives_the_same_instances(small_run, tmp_path, capsys):
    out = tmp_path / "student.ts"
    assert main(["export", str(small_run.folder), str(out), "--torchscript"]) == 0
    assert "from the student, at several sizes" in capsys.readouterr().out
    extra = {"card.json": ""}
    program = torch.jit.load(str(out), _extra_files=extra)
    assert json.loads(extra["card.json"])["classes"] == list(small_run.source.classes)
    student = load_student(small_run.folder, device="cpu")
    network, inference = student.experiment.network, student.experiment.inference
    for image in images(small_run):
        (view,) = views(student, [image])
        (h, w), padded = view.resized, view.padded
        pixels = torch.tensor(MEAN).view(3, 1, 1).repeat(1, *padded)
        resized = at_test_size(image, student.experiment.augmentation)
        pixels[:, :h, :w] = torch.from_numpy(resized.astype(np.float32)).permute(2, 0, 1)
        with torch.inference_mode():
            (dense,) = each_image(program(pixels[None]))
            found = decode(
                dense, grids=network.grids, strides=network.strides, score=inference.score, keep=0.0,
                mask=inference.mask, candidates=inference.candidates, per_image=inference.per_image,
            )  # fmt: skip
        ours = as_instances(student, found, type(view)(dense, view.resized, padded), image.shape[:2], inference.mask)
        theirs = find(student, [image], score=0.0)[0]
        assert ours.labels == theirs.labels
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)


def test_a_program_that_differs_is_not_written(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "differences", lambda *a: [0.0, 0.01])
    with pytest.raises(UserError, match=r"backbone resnet18 gives other values for other sizes \(by 1\.0e-02\)"):
        export_torchscript(small_run.folder, tmp_path / "x.ts")
    assert list(tmp_path.iterdir()) == []


def test_a_backbone_whose_trace_is_of_one_size_is_refused(tmp_path):
    """mmdet's Swin computes the masks of its windows in Python."""
    row = tiny_experiment(network={"backbone": "swin_t", "pretrained": False})
    torch.manual_seed(0)
    model = MODELS.build(model_config(for_inference(row), ("a", "b")))
    student = Student(model.eval().requires_grad_(False), row, ("a", "b"), tmp_path, "0")
    with pytest.raises(UserError, match="TorchScript of the backbone swin_t gives other values for other sizes"):
        export_torchscript(student, tmp_path / "x.ts")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop(CARD), "does not say what network it is of"),
        (lambda c: c.update({CARD: "{"}), "made by another version of misa"),
        (lambda c: c.update({CARD: "[]"}), "made by another version of misa"),
        (lambda c: c.update({CARD: 7}), "made by another version of misa"),
        (lambda c: card(c, classes=[]), "names no classes"),
        (lambda c: card(c, classes=["a", 3]), "names no classes"),
        (lambda c: card(c, classes=["a"]), "is a checkpoint of another model"),
        (lambda c: card(c, experiment={"zebra": 1}), "has no field 'zebra'"),
        (lambda c: network(c, base_channels=10**6), "is a checkpoint of another model"),
        (lambda c: network(c, base_channels="many"), "another version of misa .*base_channels is 'many'"),
        (lambda c: network(c, grids=[]), "names no network that can be built"),
        (lambda c: c["state_dict"].popitem(), "is missing"),
        (lambda c: c.update(state_dict={}), "is missing"),
        (lambda c: c["state_dict"].update({next(iter(c["state_dict"])): "text"}), "is missing"),
    ],
)
def test_a_strangers_card_is_judged_before_anything_is_built(exported, tmp_path, change, words):
    content = torch.load(exported, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=words):
        load_student(tmp_path / "x.pth")


def test_a_torchscript_program_is_no_checkpoint(tmp_path, recwarn):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "student.ts")
    recwarn.clear()
    with pytest.raises(UserError, match=r"student\.ts is a TorchScript program; give .* without --torchscript"):
        load_student(tmp_path / "student.ts")
    assert not recwarn


def test_a_damaged_archive_is_a_sentence(exported, tmp_path):
    """Its end says that it is a zip file, and its list of files cannot be read."""
    (tmp_path / "x.pth").write_bytes(exported.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))
    with pytest.raises(UserError, match=r"x\.pth cannot be read as a checkpoint"):
        load_student(tmp_path / "x.pth")


def card(content, **changes):
    content[CARD] = json.dumps(json.loads(content[CARD]) | changes)


def network(content, **changes):
    values = json.loads(content[CARD])
    values["experiment"]["network"] |= changes
    content[CARD] = json.dumps(values)
