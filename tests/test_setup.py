"""pyproject.toml, constraints.txt and environment.yml agree, and `import misa` is fast."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ranges() -> dict[str, SpecifierSet]:
    """Returns the version ranges of pyproject.toml, extras included."""
    extras = PROJECT["optional-dependencies"]
    texts = PROJECT["dependencies"] + [text for name in ("notebooks", "photos", "docs", "dev") for text in extras[name]]
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, texts)}


def pins() -> dict[str, str]:
    """Returns the pinned versions of constraints.txt."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    found = [line.split("==") for line in lines if line]
    assert all(len(pair) == 2 for pair in found), "constraints.txt holds name==version only"
    assert len({canonicalize_name(name) for name, _ in found}) == len(found), "constraints.txt names a package twice"
    return {canonicalize_name(name): version for name, version in found}


def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def test_every_dependency_is_pinned_within_its_range():
    pinned = pins()
    for name, allowed in ranges().items():
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert pinned[name] in allowed, f"{name}: {pinned[name]} of constraints.txt is not in {allowed}"


def test_pyproject_gives_ranges_and_never_one_version():
    for name, allowed in ranges().items():
        assert allowed, f"pyproject.toml takes any version of {name}"
        assert not {spec.operator for spec in allowed} & {"==", "==="}, f"pyproject.toml pins {name}"


def test_torch_range_starts_at_2_4():
    assert "2.4.0" in ranges()["torch"]


def test_environment_installs_the_project_with_the_tested_versions():
    env = environment()
    assert env["name"] == "misa"
    assert env["channels"] == ["conda-forge"]
    python, pip, pip_part = env["dependencies"]
    assert pip == "pip"
    assert pip_part == {"pip": ["-c constraints.txt", "-e .[notebooks,photos,docs,dev]"]}
    assert set(env) == {"name", "channels", "dependencies"}

    extras = Requirement(f"misa{pip_part['pip'][1].removeprefix('-e .')}").extras
    optional = PROJECT["optional-dependencies"]
    contained = {"boundary": "dev", "timm": "photos"}
    assert extras == set(optional) - set(contained)
    assert all(set(optional[part]) <= set(optional[whole]) for part, whole in contained.items())
    name, _, version = python.partition("=")
    assert name == "python"
    assert f"{version}.0" in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize(("version", "allowed"), [("3.10", False), ("3.11", True), ("3.13", True), ("3.14", False)])
def test_python_range(version: str, allowed: bool):
    assert (f"{version}.1" in SpecifierSet(PROJECT["requires-python"])) is allowed


def test_the_installed_package_is_this_one():
    """A stale editable install would make `misa doctor` compare with outdated ranges."""
    import misa

    assert metadata.version("misa") == PROJECT["version"] == misa.__version__
    asked = {canonicalize_name(Requirement(text).name) for text in metadata.requires("misa") or []}
    assert asked == set(ranges()), "pyproject.toml has changed since misa was installed: run `make setup` again"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What `make setup` reads, and a Python whose environment has programs that write down how they are called."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/one.ipynb").write_text("as committed")
    program = '#!/bin/sh\necho "$(basename $0) $*" >> asked\n'
    copies = "".join(f"cp {tmp_path}/program .venv/bin/{name}; " for name in ("pip", "python", "jupyter"))
    (tmp_path / "program").write_text(program)
    (tmp_path / "python").write_text(f"{program}mkdir -p .venv/bin; {copies}\n")
    for name in ("program", "python"):
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(clone: Path, *targets: str, terminal: bool = False) -> str:
    """What make prints, into a pipe as in CI or to a terminal."""
    ours, theirs = os.openpty() if terminal else os.pipe()
    command = ["make", "--no-print-directory", "-C", str(clone), "PYTHON=./python", *targets]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.Popen(command, stdout=theirs, stderr=subprocess.STDOUT, env=environment)
    assert done.wait(60) == 0
    text = os.read(ours, 65536).decode()
    os.close(ours), os.close(theirs)
    return text


def test_setup_says_what_it_does_and_shows_pips_progress_on_a_terminal_alone(clone: Path):
    text = make(clone, "setup")
    places = [text.index(f"setup {stage} of 3: ") for stage in (1, 2, 3)]
    assert places == sorted(places)
    assert len(text.splitlines()) == 3
    venv, install, warm = (clone / "asked").read_text().splitlines()
    assert venv == "python -m venv .venv"
    assert install.startswith("pip install --quiet ")
    assert warm.startswith("python -c ")
    assert "of 3" not in make(clone, "setup")  # nothing is left to do
    (clone / ".venv/.ready").unlink()
    make(clone, "setup", terminal=True)
    assert (clone / "asked").read_text().splitlines()[4].startswith("pip install --disable")


def test_notebooks_are_opened_as_copies_that_stay(clone: Path):
    make(clone, "lab")
    assert (clone / "asked").read_text().splitlines()[-1] == "jupyter lab runs/notebooks"
    copy = clone / "runs/notebooks/one.ipynb"
    assert copy.read_text() == "as committed"
    copy.write_text("run and saved")
    (clone / "notebooks/two.ipynb").write_text("new")
    make(clone, "lab")
    assert copy.read_text() == "run and saved"
    assert copy.with_name("two.ipynb").read_text() == "new"
    assert (clone / "notebooks/one.ipynb").read_text() == "as committed"
    assert "/runs/" in (ROOT / ".gitignore").read_text().split()


def test_import_misa_is_light():
    """It loads none of the large packages."""
    code = "import sys, misa; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    heavy = {"torch", "torchvision", "numpy", "scipy", "cv2", "matplotlib", "mmengine", "mmcv", "mmdet", "pycocotools"}
    loaded = set(done.stdout.split())
    assert "misa" in loaded
    assert not loaded & heavy


def test_a_package_without_bytecode_is_compiled_in_a_test_without_an_error():
    """mmdet has an invalid escape in a string, a SyntaxWarning from Python 3.12 on, and warnings are errors here."""
    compile('"\\\\i"', "mmdet/file.py", "exec")
