"""Atomic writes, JSON and locks under a kill, a full disk or a second process."""

import json
import subprocess
import sys

import pytest

from misa.errors import UserError
from misa.files import IN_USE, atomic_write, locked, read_json, write_first, write_json


def test_a_file_is_the_old_one_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "below" / "file.txt"
    with atomic_write(path) as partial:
        partial.write_text("old")
        assert not path.exists()
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == path.parent  # os.replace is atomic within one file system only
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def _fail(path, error):
    with atomic_write(path) as partial:
        partial.write_text("ne")
        raise error


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)):
        _fail(path, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    code = (
        "import os, pathlib, sys; from misa.files import atomic_write\n"
        "with atomic_write(pathlib.Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('{'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert read_json(path) == {"a": 1}
    write_json(path, {"a": 2})  # the leftovers of the kill do not interfere
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_json_comes_back(tmp_path):
    value = {"text": "Größe", "numbers": [1, 2.5, -3e-7], "nested": {"none": None}}
    for indent in (2, None):
        write_json(tmp_path / "a.json", value, indent=indent)
        assert read_json(tmp_path / "a.json") == value
    assert read_json(tmp_path / "absent.json") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_words_for_nan(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"AP": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "1", json.dumps("text")])
def test_a_file_without_values_is_a_sentence(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json .*restore it, or choose another folder"):
        read_json(tmp_path / "a.json")


def test_a_locked_folder_is_refused_to_another_process_until_it_is_let_go(tmp_path):
    folder = tmp_path / "run"
    code = "import pathlib, sys; from misa.files import locked\nwith locked(pathlib.Path(sys.argv[1])): print('mine')"
    other = [sys.executable, "-c", code, str(folder)]
    with locked(folder):
        (folder / "log.txt").touch()
        refused = subprocess.run(other, check=False, capture_output=True, text=True)
        assert IN_USE in refused.stderr
        assert not refused.stdout
    assert subprocess.run(other, check=True, capture_output=True, text=True).stdout == "mine\n"


def test_a_lock_leaves_no_folder_in_which_nothing_happened(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()  # it existed before


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    sentence = r"^out .*file cannot be written .*; choose another out\.$"
    with pytest.raises(UserError, match=sentence), locked(tmp_path / "file", "out"):
        pass


def test_the_first_of_several_processes_writes(tmp_path):
    write_first(tmp_path / "a.json", {"score": 0.3})
    write_first(tmp_path / "a.json", {"score": 0.4})
    assert read_json(tmp_path / "a.json") == {"score": 0.3}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
