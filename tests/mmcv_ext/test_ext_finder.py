"""Which module becomes `mmcv._ext`: in fresh processes, with a small fake package instead of mmcv."""

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import misa.mmcv_ext as mmcv_ext


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh process in which `folder` is searched before everything else."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.fixture
def fake_mmcv(tmp_path: Path) -> Path:
    """The folder of an empty package named mmcv."""
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").write_text("")
    return package


def test_without_an_extension_ours_is_found(fake_mmcv: Path):
    done = run("import misa, mmcv._ext; print(mmcv._ext.__name__, mmcv._ext.__file__)", fake_mmcv.parent)
    assert done.stdout.split() == ["mmcv._ext", str(mmcv_ext.OPS)]
    assert done.stderr == ""


def test_a_compiled_extension_is_preferred(fake_mmcv: Path):
    (fake_mmcv / "_ext.py").write_text("def nms(): return 'compiled'\n")
    code = """
import misa, importlib.util
print(importlib.util.find_spec("mmcv._ext").origin, "torch" in sys.modules)
import mmcv._ext
print(mmcv._ext.nms(), misa.mmcv_ext.is_ours(mmcv._ext), "torch" in sys.modules)
"""
    done = run(code, fake_mmcv.parent)
    assert done.stdout.split() == [str(fake_mmcv / "_ext.py"), "False", "compiled", "False", "True"]
    assert done.stderr == ""


@pytest.mark.parametrize("kind", ["undefined symbol", "not a library"])
def test_a_broken_extension_is_replaced_with_one_warning(fake_mmcv: Path, kind: str):
    if kind == "undefined symbol":
        (fake_mmcv / "_ext.py").write_text("raise ImportError('undefined symbol: _ZN2at4_ops')\n")
        reason = kind
    else:
        (fake_mmcv / f"_ext{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF" + bytes(200))
        reason = "ImportError"
    code = """
import misa, torch, mmcv._ext, importlib.util
print(misa.mmcv_ext.is_ours(mmcv._ext), importlib.util.find_spec("mmcv._ext").origin == mmcv._ext.__file__)
print(mmcv._ext.nms(torch.ones(1, 4), torch.ones(1), iou_threshold=0.5, offset=0).tolist())
"""
    done = run(code, fake_mmcv.parent)
    assert done.stdout.split("\n") == ["True True", "[0]", ""]
    assert done.stderr.count("Warning: mmcv's compiled ops at ") == 1
    assert reason in done.stderr
    assert "pip cache remove onedl_mmcv" in done.stderr


def test_an_imported_extension_stays(fake_mmcv: Path):
    (fake_mmcv / "_ext.py").write_text("")
    done = run("import mmcv._ext as early, misa, mmcv._ext as late; print(early is late)", fake_mmcv.parent)
    assert done.stdout == "True\n"
    assert done.stderr == ""


def test_mmcv_imported_before_misa_works(tmp_path: Path):
    code = """
import mmcv
try:
    import mmcv.ops
except ImportError:
    pass
import misa, mmcv.ops, torch
print(mmcv.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)[1].tolist())
"""
    done = run(code, tmp_path)
    assert done.stdout == "[0]\n", done.stderr


def test_the_name_is_found_without_importing_it():
    """mmengine's Runner checks for the ops this way, for its report on the environment."""
    spec = importlib.util.find_spec("mmcv._ext")
    assert spec is not None
    assert spec.loader is not None
    assert spec.name == "mmcv._ext"


def test_other_names_are_left_to_others(tmp_path: Path):
    (tmp_path / "_ext.py").write_text("")
    assert mmcv_ext.MmcvExtFinder().find_spec("other._ext", [str(tmp_path)]) is None
    assert mmcv_ext.MmcvExtFinder().find_spec("mmcv", None) is None


def test_installing_twice_installs_once():
    before = list(sys.meta_path)
    mmcv_ext.install()
    assert sys.meta_path == before
    assert sum(isinstance(finder, mmcv_ext.MmcvExtFinder) for finder in before) == 1


def test_an_unknown_op_raises_and_names_itself():
    from misa.mmcv_ext import ops

    with pytest.raises(NotImplementedError, match=r"carafe_forward.*misa/mmcv_ext/ops\.py.*compiled ops"):
        ops.carafe_forward(1, 2, features=3)
    assert ops.carafe_forward.__name__ == "carafe_forward"
    assert not hasattr(ops, "__wrapped__")


def test_mmcv_says_that_there_is_no_compiler():
    from mmcv.ops import get_compiler_version, get_compiling_cuda_version

    assert "misa" in get_compiler_version()
    assert "misa" in get_compiling_cuda_version()
