"""Each check of `misa doctor` on a working installation, and on one with the fault that the check detects."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from misa.cli import main
from misa.commands import doctor
from misa.commands.doctor import Doctor, Finding
from tests.data.formats.test_round_trip import SCENES
from tests.data.formats.writers import WRITERS

NAMES = ["Python", "torch", "torchvision", "mmdet", "mmcv ops", "propagation", "Jupyter", "papermill", "disk", "data"]


def find(check: Callable[[], Finding], advice: str = "the advice") -> Finding:
    return doctor.finding_of("thing", check, advice)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Fake package versions; None for a missing package."""
    pretended: dict[str, str | None] = {}
    real = doctor.metadata.version

    def version(package: str) -> str:
        value = pretended[package] if package in pretended else real(package)
        if value is None:
            raise doctor.metadata.PackageNotFoundError(package)
        return value

    monkeypatch.setattr(doctor.metadata, "version", version)
    return pretended


def test_a_good_installation_passes_with_one_line_each(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from misa.cli import main; sys.exit(main(['doctor']))"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()  # without the two lines that mmdet prints when imported
    assert [line[5:17].strip() for line in lines] == NAMES
    assert all(line.startswith("ok ") for line in lines)
    assert "our equivalents" in lines[4] or "compiled" in lines[4]


def test_every_problem_has_a_cure_and_the_exit_status_says_so(monkeypatch, capsys):
    def broken() -> Finding:
        raise RuntimeError("two\nlines")

    for check in (
        "check_python",
        "check_torch",
        "check_torchvision",
        "check_mmdet",
        "check_mmcv_ops",
        "check_jupyter",
        "check_papermill",
        "check_disk",
    ):
        monkeypatch.setattr(doctor, check, broken)
    findings = doctor.examine()
    assert [finding.name for finding in findings] == NAMES
    assert all(finding.advice for finding in findings if not finding.ok)
    assert doctor.run(Doctor()) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(NAMES)
    assert out[0].startswith("FAIL Python       RuntimeError: two lines -> use Python 3.11, 3.12 or 3.13")


def test_wrong_arguments_exit_with_2_and_help_with_0(capsys):
    for arguments, status in ((["--data-rot", "x"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(["doctor", *arguments])
        assert stop.value.code == status
    printed = capsys.readouterr()
    assert "there is no option --data-rot; did you mean '--data-root'?" in printed.err
    assert "example: misa doctor" in printed.out


def test_python_out_of_range(monkeypatch):
    assert find(doctor.check_python).ok
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.18")
    finding = find(doctor.check_python)
    assert not finding.ok
    assert "Python 3.9.18 is outside" in finding.detail


@pytest.mark.parametrize(
    ("check", "package"),
    [
        (doctor.check_torch, "torch"),
        (doctor.check_torchvision, "torchvision"),
        (doctor.check_mmdet, "onedl-mmcv"),
        (doctor.check_jupyter, "jupyterlab"),
        (doctor.check_papermill, "papermill"),
    ],
)
def test_a_package_that_is_absent_or_too_old_is_named(installed, check, package):
    installed[package] = None
    finding = find(check)
    assert not finding.ok
    assert finding.detail == f"the package {package} is not installed"
    assert "make setup" in finding.advice
    installed[package] = "0.0.1"
    finding = find(check)
    assert not finding.ok
    assert finding.detail.startswith(f"RuntimeError: {package} 0.0.1 is outside of what misa works with (")
    assert finding.advice == "the advice"


def test_cuda_device_is_named_and_tried(monkeypatch):
    import torch

    gpu = SimpleNamespace(name="Test GPU", total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: real(*size))
    assert find(doctor.check_torch).detail.endswith("Test GPU (8 GiB)")

    def no_kernel(*_: int, device: str) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", no_kernel)
    finding = find(doctor.check_torch)
    assert not finding.ok
    assert "no kernel image" in finding.detail


def test_a_driver_that_torch_does_not_reach_is_mentioned(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    finding = find(doctor.check_torch)
    assert finding.ok
    assert "no CUDA device" in finding.detail
    assert "nvidia-smi" in finding.advice


def test_torchvision_without_its_operators(monkeypatch):
    import torchvision

    def missing(*_: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", missing)
    finding = find(doctor.check_torchvision)
    assert not finding.ok
    assert "torchvision::nms" in finding.detail


def test_originals_beside_the_forks(installed):
    installed["mmcv-lite"] = "2.1.0"
    finding = find(doctor.check_mmdet)
    assert not finding.ok
    assert finding.detail.startswith("mmcv-lite installed over")
    assert finding.advice.startswith("pip uninstall -y mmcv-lite, then pip install --force-reinstall")


@pytest.mark.parametrize("there", [(), ("configs",), ("model-index.yml",)])
def test_mmdet_without_its_configuration_files(monkeypatch, tmp_path, there):
    import mmdet

    (tmp_path / ".mim").mkdir()
    for name in there:
        (tmp_path / ".mim" / name).mkdir()
    monkeypatch.setattr(mmdet, "__file__", str(tmp_path / "__init__.py"))
    finding = find(doctor.check_mmdet)
    assert not finding.ok
    assert "its configuration files, of which students are built, are missing: there is no" in finding.detail
    assert finding.advice.endswith("onedl-mmdetection")


def test_opencv_without_its_system_libraries(monkeypatch):
    def broken(name: str) -> ModuleType:
        raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    finding = find(doctor.check_mmdet)
    assert not finding.ok
    assert finding.advice == "apt-get install -y libgl1 libglib2.0-0"


def test_compiled_ops_are_told_from_ours(monkeypatch):
    import mmcv.ops

    ours = find(doctor.check_mmcv_ops)
    compiled = ModuleType("mmcv._ext")
    compiled.__file__ = "/somewhere/_ext.so"
    monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)
    monkeypatch.setattr(mmcv.ops, "get_compiling_cuda_version", lambda: "13.0")
    theirs = find(doctor.check_mmcv_ops)
    assert ours.ok
    assert theirs.ok
    assert "our equivalents" in ours.detail or ours.detail.startswith("compiled, for CUDA")
    assert theirs.detail == "compiled, for CUDA 13.0: /somewhere/_ext.so"


def test_a_compiled_extension_that_does_not_load_is_mentioned(monkeypatch, tmp_path):
    import mmcv

    (tmp_path / "_ext.py").write_text("")
    monkeypatch.setattr(mmcv, "__path__", [*mmcv.__path__, str(tmp_path)])
    finding = find(doctor.check_mmcv_ops)
    assert finding.ok
    assert f"{tmp_path / '_ext.py'} does not load" in finding.detail
    assert "pip cache remove onedl_mmcv" in finding.advice


def test_ops_that_compute_nonsense(monkeypatch):
    import mmcv.ops
    import torch

    monkeypatch.setattr(mmcv.ops, "nms", lambda *_: (None, torch.tensor([0, 1])))
    finding = find(doctor.check_mmcv_ops)
    assert not finding.ok
    assert "[0, 1] instead of [1]" in finding.detail


@pytest.mark.parametrize("interpreter", ["python", sys.executable])
def test_the_kernel_of_this_interpreter(monkeypatch, tmp_path, interpreter):
    assert find_kernel(monkeypatch, tmp_path, interpreter).ok


@pytest.mark.parametrize("interpreter", ["/opt/elsewhere/bin/python", "/bin/sh"])
def test_a_kernel_of_another_interpreter(monkeypatch, tmp_path, interpreter):
    finding = find_kernel(monkeypatch, tmp_path, interpreter)
    assert not finding.ok
    assert f"starts {interpreter}, not {sys.executable}" in finding.detail
    assert f"{sys.executable} -m ipykernel install" in finding.advice


def find_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interpreter: str) -> Finding:
    """Returns the doctor's finding for a kernel python3 that starts `interpreter`."""
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {"argv": [interpreter, "-m", "ipykernel_launcher"], "display_name": "x", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    return find(doctor.check_jupyter)


def test_no_kernel(monkeypatch):
    from jupyter_client import kernelspec

    def none(_: object, name: str) -> None:
        raise kernelspec.NoSuchKernel(name)

    monkeypatch.setattr(kernelspec.KernelSpecManager, "get_kernel_spec", none)
    finding = find(doctor.check_jupyter)
    assert not finding.ok
    assert "no kernel named python3" in finding.detail


def test_disk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    free = {tmp_path: 5 * 2**30, Path("/dev/shm"): 64 * 2**20}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    finding = find(doctor.check_disk)
    assert finding.ok
    assert finding.detail == f"5.0 GiB free at {tmp_path}"
    assert not Path("/dev/shm").is_dir() or "64 MiB" in finding.advice
    free[tmp_path] = 2**20
    finding = find(doctor.check_disk)
    assert not finding.ok
    assert "make room" in finding.advice
    free[tmp_path] = 5 * 2**30
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert "not writable" in find(doctor.check_disk).detail


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    for split, folder, images in (("train2017", "train2017", 2), ("val2017", "images/val2017", 1)):
        (root / folder).mkdir(parents=True)
        for i in range(images):
            (root / folder / f"{i}.jpg").touch()
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").touch()
    return root


def test_coco_layout(coco):
    finding = doctor.check_data_root(coco)
    assert finding.ok
    assert finding.detail == f"{coco} has COCO layout: train2017 (2 images), val2017 (1 image)"


def test_coco_annotations_without_images(coco):
    (coco / "annotations" / "instances_test2017.json").touch()
    finding = doctor.check_data_root(coco)
    assert not finding.ok
    assert "instances_test2017.json, but no images" in finding.detail
    assert f"put the images into {coco / 'test2017'}" in finding.advice


@pytest.mark.parametrize("inside", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_layout(tmp_path, inside):
    folder = tmp_path / inside
    for part in ("JPEGImages", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    (folder / "JPEGImages" / "2007_000032.jpg").touch()
    finding = doctor.check_data_root(tmp_path)
    assert not finding.ok
    assert "without SegmentationObject" in finding.detail
    assert "unpack" in finding.advice
    (folder / "SegmentationObject").mkdir()
    finding = doctor.check_data_root(tmp_path)
    assert finding.ok
    assert finding.detail == f"{folder} has VOC2012 layout: 1 image"


def test_folders_that_are_no_data(tmp_path):
    file = tmp_path / "coco.zip"
    file.touch()
    for root, detail in (
        (tmp_path / "nowhere", "is not there"),
        (file, "is a file"),
        (tmp_path, "has no annotations that misa reads: it holds coco.zip"),
    ):
        finding = doctor.check_data_root(root)
        assert not finding.ok
        assert finding.detail == f"{root} {detail}"
        assert "instances_train2017.json" in finding.advice


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_that_is_trained_on_is_accepted(form, tmp_path):
    WRITERS[form][0](tmp_path / "my data", SCENES)
    finding = doctor.check_data_root(tmp_path / "my data")
    assert finding.ok, str(finding)
    assert "COCO layout" in finding.detail or f"misa check '{tmp_path}/my data'" in finding.advice


def test_a_file_of_annotations_is_accepted_and_an_ambiguous_folder_is_not(tmp_path):
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2,label\n")
    assert doctor.check_data_root(tmp_path / "boxes.csv").detail.endswith("in the format csv: 1 file")
    (tmp_path / "more.csv").write_text("image,x1,y1,x2,y2,label\n")
    finding = doctor.check_data_root(tmp_path)
    assert not finding.ok
    assert "several csv files (boxes.csv, more.csv)" in finding.detail


def test_data_roots_come_from_the_arguments_or_the_environment(monkeypatch, coco, tmp_path):
    seen: list[list[str]] = []

    def examine(data_roots: list[str]) -> list[Finding]:
        seen.append(data_roots)
        return []

    monkeypatch.setattr(doctor, "examine", examine)
    monkeypatch.setenv("MISA_DATA", f"{coco}:{tmp_path}")
    main(["doctor"])
    main(["doctor", "--data-root", "a", "b"])
    monkeypatch.delenv("MISA_DATA")
    main(["doctor"])
    assert [list(roots) for roots in seen] == [[str(coco), str(tmp_path)], ["a", "b"], []]
