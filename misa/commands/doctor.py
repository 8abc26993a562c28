"""Check the installation, the device and the data, and say how to fix each problem.

example: misa doctor --data-root datasets/coco datasets/VOCdevkit
"""

# Each check examines one thing and returns a `Finding`. A check never raises: any exception becomes its finding.
# The allowed versions come from the metadata of the installed package, that is from pyproject.toml.

import contextlib
import importlib
import io
import os
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from misa.errors import counted
from misa.parameters import Parameters, option

_INSTALL = "run `make setup`, or: python -m pip install -c constraints.txt -e '.[notebooks,photos,dev]'"
_LEAST_DISK = 2 * 2**30  # for the embedded data and a few run folders with checkpoints
_LEAST_SHM = 2**30  # for images sent by the data loader's workers
_ORIGINALS = ("mmengine", "mmcv", "mmcv-lite", "mmcv-full", "mmdet")


@dataclass(frozen=True)
class Finding:
    """The result of a check. detail: what was found or is wrong; advice: how to fix it, or if `ok` a hint or ""."""

    name: str
    ok: bool
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        """Returns one line, with line breaks of error messages removed."""
        line = f"{'ok' if self.ok else 'FAIL':<5}{self.name:<12} {self.detail}"
        return " ".join((line + (f" -> {self.advice}" if self.advice else "")).splitlines())


def examine(data_roots: Sequence[str | Path] = ()) -> list[Finding]:
    """Run all checks, in the order of an installation.

    Imports torch, mmdet and papermill, and computes a few numbers on the device. Writes nothing.

    data_roots: folders or files that should hold a data set in any format of docs/data.md, or VOC2012.
    """
    findings = [
        finding_of("Python", check_python, "use Python 3.11, 3.12 or 3.13, in a new virtual environment"),
        finding_of("torch", check_torch, _INSTALL),
        finding_of("torchvision", check_torchvision, f"it has to fit torch: {_INSTALL}"),
        finding_of("mmdet", check_mmdet, _INSTALL),
        finding_of("mmcv ops", check_mmcv_ops, _INSTALL),
        finding_of("propagation", check_propagation, _INSTALL),
        finding_of("Jupyter", check_jupyter, _INSTALL),
        finding_of("papermill", check_papermill, _INSTALL),
        finding_of("disk", check_disk, "start misa in a folder that you can read and write"),
    ]
    if not data_roots:
        hint = "bring your own with --data-root PATH or MISA_DATA=PATH"
        findings.append(Finding("data", True, "no data folder is given; the demo needs none", hint))
    for root in data_roots:
        findings.append(finding_of("data", partial(check_data_root, Path(root)), "make the folder readable for you"))
    return findings


class Doctor(Parameters):
    """Options of `misa doctor`."""

    data_root: tuple[str, ...] = option(
        (), "data in any format of docs/data.md, or VOC2012 (default: that of MISA_DATA, separated as in PATH)"
    )


def run(options: Doctor) -> int:
    """Print one line per finding; returns 1 if there is a problem."""
    named = [path for path in os.environ.get("MISA_DATA", "").split(os.pathsep) if path]
    findings = examine(options.data_root or named)
    print(*findings, sep="\n")
    return 0 if all(finding.ok for finding in findings) else 1


def finding_of(name: str, check: Callable[[], Finding], advice: str) -> Finding:
    """Run a check; an exception becomes a finding with `advice`. Output of libraries on import is suppressed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check()
    except metadata.PackageNotFoundError as error:
        return Finding(name, False, f"the package {error.name} is not installed", _INSTALL)
    except Exception as error:
        reason = str(error)
        if "libGL" in reason or "libgthread" in reason or "libglib" in reason:  # OpenCV in a slim container
            advice = "apt-get install -y libgl1 libglib2.0-0"
        return Finding(name, False, f"{type(error).__name__}: {reason}", advice)


def _require(*packages: str) -> list[str]:
    """Returns the versions of installed packages.

    Raises PackageNotFoundError: a package is not installed; RuntimeError: a version is outside the range of
    pyproject.toml.
    """
    from packaging.requirements import Requirement

    ranges = {r.name.lower(): r.specifier for r in map(Requirement, metadata.requires("misa") or [])}
    versions = [metadata.version(package) for package in packages]
    for package, version in zip(packages, versions, strict=True):
        allowed = ranges.get(package.lower())
        if allowed is not None and not allowed.contains(version, prereleases=True):
            raise RuntimeError(f"{package} {version} is outside of what misa works with ({allowed})")
    return versions


def check_python() -> Finding:
    """Check that the package supports this Python."""
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    allowed = metadata.metadata("misa")["Requires-Python"]
    if version not in SpecifierSet(allowed):
        raise RuntimeError(f"Python {version} is outside of what misa works with ({allowed})")
    return Finding("Python", True, f"{version} at {sys.executable}")


def check_torch() -> Finding:
    """Check torch, and that it computes on every GPU that it lists."""
    (version,) = _require("torch")
    import torch

    if torch.cuda.is_available():
        torch.ones(2, device="cuda").sum().item()  # a torch that was not built for this GPU fails only at a kernel
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
        return Finding("torch", True, f"{version}, CUDA {torch.version.cuda}, {names}")
    detail = f"{version}, no CUDA device, CPU threads: {torch.get_num_threads()}"
    if shutil.which("nvidia-smi") is None:
        return Finding("torch", True, detail)
    hint = f"there is an NVIDIA driver, but torch (CUDA {torch.version.cuda}) finds no device: compare with nvidia-smi"
    return Finding("torch", True, detail, hint)


def check_torchvision() -> Finding:
    """Check torchvision, and that it was built for this torch."""
    (version,) = _require("torchvision")
    import torch
    import torchvision

    # If built for another torch, its import may succeed but its operators are missing.
    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    return Finding("torchvision", True, version)


def check_mmdet() -> Finding:
    """Check the onedl packages: not overwritten by the originals, and with their configuration files."""
    mmengine, mmcv, mmdet = _require("onedl-mmengine", "onedl-mmcv", "onedl-mmdetection")
    strangers = [name for name in _ORIGINALS if _installed(name)]
    if strangers:
        return Finding(
            "mmdet",
            False,
            f"{', '.join(strangers)} installed over the onedl packages of the same import names",
            f"pip uninstall -y {' '.join(strangers)}, then pip install --force-reinstall --no-deps "
            "-c constraints.txt onedl-mmengine onedl-mmcv onedl-mmdetection",
        )
    importlib.import_module("mmdet.models")
    files = Path(importlib.import_module("mmdet").__file__ or "").parent / ".mim"
    if missing := [name for name in ("model-index.yml", "configs") if not (files / name).exists()]:
        return Finding(
            "mmdet",
            False,
            f"its configuration files, of which students are built, are missing: there is no {files / missing[0]}",
            "pip install --force-reinstall --no-deps -c constraints.txt onedl-mmdetection",
        )
    return Finding("mmdet", True, f"mmengine {mmengine}, mmcv {mmcv}, mmdet {mmdet}")


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_mmcv_ops() -> Finding:
    """Check mmcv's compiled operators or our replacements by running NMS."""
    import torch

    from misa.mmcv_ext import REBUILD, compiled_spec, is_ours

    ext = importlib.import_module("mmcv._ext")
    ops = importlib.import_module("mmcv.ops")
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0]])
    kept = ops.nms(boxes, torch.tensor([0.1, 0.9]), 0.5)[1].tolist()
    if kept != [1]:
        return Finding("mmcv ops", False, f"{ext.__file__} computes a wrong nms: {kept} instead of [1]", _INSTALL)
    if is_ours(ext):
        detail = "our equivalents in PyTorch, for CPU and CUDA (misa.mmcv_ext)"
        broken = compiled_spec(importlib.import_module("mmcv").__path__)
        if broken is None:
            return Finding("mmcv ops", True, detail)
        return Finding("mmcv ops", True, f"{detail}, as {broken.origin} does not load", f"to be rid of it: {REBUILD}")
    return Finding("mmcv ops", True, f"compiled, for CUDA {ops.get_compiling_cuda_version()}: {ext.__file__}")


def check_propagation() -> Finding:
    """Check the CPU kernels, which compiles them unless an earlier process on this machine has cached them."""
    import torch

    from misa.ops.backends.choice import backend, warm
    from misa.ops.propagation import propagate_local

    if not warm():
        hint = "python -m pip install -c constraints.txt numba makes it ten times faster"
        return Finding("propagation", True, "torch operations on the CPU, as numba is not installed", hint)
    means = propagate_local(torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 1, 2), steps=1).flatten().tolist()
    if means != [0.5, 0.5]:
        return Finding("propagation", False, f"the mean of 0 and 1 comes out as {means}", "set MISA_KERNELS=torch")
    how = "compiled loops" if backend(torch.empty(0)).__name__.endswith("cpu") else "torch operations"
    return Finding("propagation", True, f"{how} on the CPU, numba {metadata.version('numba')}")


def check_jupyter() -> Finding:
    """Check Jupyter, and that its kernel python3 is this interpreter."""
    lab, kernel, _ = _require("jupyterlab", "ipykernel", "ipywidgets")
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    advice = f"{sys.executable} -m ipykernel install --sys-prefix --name python3"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return Finding("Jupyter", False, "there is no kernel named python3, which the notebooks ask for", advice)
    if not _is_this_interpreter(spec.argv[0]):
        detail = f"the kernel python3 at {spec.resource_dir} starts {spec.argv[0]}, not {sys.executable}"
        return Finding("Jupyter", False, detail, f"remove that folder, then {advice}")
    return Finding("Jupyter", True, f"lab {lab}, kernel python3 (ipykernel {kernel}) starts this Python")


def _is_this_interpreter(command: str) -> bool:
    # Jupyter replaces these names by its own interpreter.
    if command in {"python", "python3", f"python3.{sys.version_info.minor}"}:
        return True
    # python, python3 and python3.11 in one folder are one interpreter. Links are not resolved completely: those of all
    # virtual environments end at the same file.
    found = shutil.which(command)
    return found is not None and Path(found).parent.resolve() == Path(sys.executable).parent.resolve()


def check_papermill() -> Finding:
    """Check the packages that execute notebooks and write their pages."""
    version, _, _ = _require("papermill", "nbformat", "nbconvert")
    importlib.import_module("papermill")
    return Finding("papermill", True, version)


def check_disk() -> Finding:
    """Check free space on the disk and in shared memory."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    detail = f"{free / 2**30:.1f} GiB free at {here}"
    if free < _LEAST_DISK:
        advice = f"make room: {_LEAST_DISK / 2**30:.0f} GiB are enough for the demo, a COCO run needs 10 or more"
        return Finding("disk", False, detail, advice)
    if not os.access(here, os.W_OK):
        return Finding("disk", False, f"{here} is not writable", "start misa where you can write, or set --work-dir")
    shared = Path("/dev/shm")
    if shared.is_dir() and (shm := shutil.disk_usage(shared).free) < _LEAST_SHM:
        hint = f"{shared} has {shm / 2**20:.0f} MiB free, data loaders with workers may fail: docker run --shm-size=8g"
        return Finding("disk", True, detail, hint)
    return Finding("disk", True, detail)


def check_data_root(root: Path) -> Finding:
    """Check which data set a folder or file holds, mostly by file names; `misa check` examines the contents."""
    from misa.data.formats.coco import DataError
    from misa.data.formats.convert import find_format
    from misa.data.formats.table import FORMATS

    root = root.expanduser()
    finding = _published(root)
    if finding.ok or any(root.glob("annotations/instances_*2017.json")):
        return finding
    try:
        found = find_format(root)
    except DataError as error:
        return Finding("data", False, str(error), f"misa check {shlex.quote(str(root))}")
    if found is None:
        return finding
    name = next(name for name, row in FORMATS.items() if row is found[0])
    files = counted(len({file for part in found[1] for file in part.files}), "file")
    detail = f"{root} has annotations in the format {name}: {files}"
    return Finding("data", True, detail, f"misa check {shlex.quote(str(root))} examines them")


def _published(root: Path) -> Finding:
    """Look for COCO's own layout and VOC2012, as they are published."""
    name = "data"
    advice = "docs/data.md shows every format; COCO's is annotations/instances_train2017.json and train2017/"
    if not root.is_dir():
        return Finding(name, False, f"{root} is {'a file' if root.exists() else 'not there'}", advice)
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir() and (folder / "ImageSets").is_dir():
            return _voc(folder)
    splits = sorted(path.stem.removeprefix("instances_") for path in root.glob("annotations/instances_*.json"))
    if not splits:
        names = sorted(path.name for path in root.iterdir())
        listing = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"
        return Finding(name, False, f"{root} has no annotations that misa reads: it holds {listing}", advice)
    places = {split: [root / split, root / "images" / split] for split in splits}
    images = {split: next(filter(Path.is_dir, folders), None) for split, folders in places.items()}
    bare = [split for split, folder in images.items() if folder is None]
    if bare:
        detail = f"{root} has annotations/instances_{bare[0]}.json, but no images of it"
        return Finding(name, False, detail, f"put the images into {root / bare[0]}, or remove the annotation file")
    counts = [f"{split} ({counted(_count(folder), 'image')})" for split, folder in images.items() if folder is not None]
    return Finding(name, True, f"{root} has COCO layout: {', '.join(counts)}")


def _voc(folder: Path) -> Finding:
    missing = [part for part in ("ImageSets/Segmentation", "SegmentationObject") if not (folder / part).is_dir()]
    if missing:
        advice = "unpack the whole of VOCtrainval_11-May-2012.tar"
        return Finding("data", False, f"{folder} has VOC2012 layout without {' and '.join(missing)}", advice)
    return Finding("data", True, f"{folder} has VOC2012 layout: {counted(_count(folder / 'JPEGImages'), 'image')}")


def _count(folder: Path) -> int:
    """Returns the number of files in a folder (COCO's train2017: 118287), without sorting their names."""
    with os.scandir(folder) as entries:
        return sum(1 for entry in entries if not entry.name.startswith("."))
