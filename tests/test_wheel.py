"""The installed wheel holds the package with its tables, and nothing else at the top level."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(module_path):
    """The wheel, built from this checkout with the tools of the environment."""
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(module_path)]
    subprocess.run([sys.executable, "-m", *command, str(ROOT)], check=True, timeout=300)
    (built,) = module_path.glob("misa-*.whl")
    return built


def test_a_wheel_holds_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"misa"}
    tables = {f"misa/experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py")}
    assert tables <= set(names)
    assert "misa/py.typed" in names
    templates = (ROOT / "misa").rglob("*.j2")
    assert {str(path.relative_to(ROOT)) for path in templates} <= set(names)


@pytest.mark.slow
def test_a_row_trains_from_an_installed_wheel(wheel, tmp_path):
    """Even in a folder with another project's `experiments`."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "misa", "train", "demo:misa", "--smoke", "--work-dir", "runs/demo", "--gpus", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "demo" / "metrics.json").is_file()
    where = "import misa, misa.engine; print(misa.__file__)"
    used = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert used.stdout.startswith(str(tmp_path / "site"))
