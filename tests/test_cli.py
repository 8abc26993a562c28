"""The command line: exit status 0, 2 with one sentence, examples in every --help."""

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types

import pytest
from PIL import Image

import misa
from misa import commands
from misa.cli import main, names, options
from misa.commands.train import Train, next_step, train_with
from misa.data.scenes.scenes import Scenes, write_scenes
from misa.engine.prediction.predict import Predictions
from misa.engine.runs.folder import Run
from misa.errors import Diverged, Stopped, UserError
from misa.files import shorter, write_json
from misa.rows import find_row, table_module, table_names


@pytest.fixture
def root(tmp_path):
    return write_scenes(tmp_path / "toy", Scenes(size=48, train=4, val=2, classes=2))


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["check", "mydat"], "misa check: there is no folder mydat; did you mean 'mydata'?"),
        (["check", "mydata/aa.csv"], "misa check: there is no file or folder mydata/aa.csv; did you mean 'a.csv'?"),
        (["convert", "elsewhere", "out"], "misa convert: there is no folder elsewhere; give the folder or file of"),
        (["evaluate", "rums/x"], "misa evaluate: there is no run folder rums/x; did you mean 'runs'?"),
        (["evaluate", "mydata"], "misa evaluate: mydata is not a run folder: it has no params.json;"),
        (["predict", "x", "y", "--out", "z"], "misa predict: there is no run folder or checkpoint x; give one made by"),
        (["predict", "runs", "mydata/a.cvs", "--out", "z"], "video mydata/a.cvs; did you mean 'a.csv'?"),
        (
            ["train", "photos:box", "--data-root", "mydat"],
            "misa train: there is no folder mydat; did you mean 'mydata'",
        ),
        (
            ["train", "photos:box"],
            "misa train: photos:box learns from a folder of your images and their boxes; give it with --data-root (",
        ),
    ],
)
def test_a_wrong_path_is_shown_as_it_was_typed(words, hint, capsys, tmp_path, monkeypatch):
    """The message has a similar name, but not the other files in the folder."""
    for place in ("mydata/a.csv", "runs/demo/log.txt", "unrelated/b"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).touch()
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert hint in error
    assert "unrelated" not in error
    assert "data_root" not in error


@pytest.mark.parametrize(
    "words", [["guidance", "runs/demo", "--out"], ["figures", "runs/demo", "--out"], ["tables", "3", "--save"]]
)
@pytest.mark.parametrize("place", ["boxes.csv", "boxes.csv/below"])
def test_a_file_in_place_of_a_folder_is_refused_before_the_work(words, place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boxes.csv").write_text("mine")
    assert main([*words, place]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"misa {words[0]}: {words[-1]} is a folder; boxes.csv is a file.\n"
    assert not shown.out
    assert (tmp_path / "boxes.csv").read_text() == "mine"


def test_drawn_scenes_are_not_suggested_to_a_row_of_photographs(tmp_path, capsys, monkeypatch):
    drawn = tmp_path / "datasets/demo-0123abcd/annotations"
    drawn.mkdir(parents=True)
    (drawn / "instances_train2017.json").touch()
    monkeypatch.chdir(tmp_path)
    sentence = (
        "photos:box learns from a folder of your images and their boxes; give it with {} (docs/data.md shows every"
    )
    assert main(["train", "photos:box"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"misa train: {sentence.format('--data-root')}")
    with pytest.raises(UserError) as caught:
        train_with(Train(row="photos:box"))
    assert str(caught.value).startswith(sentence.format("data_root"))
    assert main(["train", "photos:box", "--data-root", str(tmp_path / "datasets")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "datasets holds drawn scenes alone; give the folder or file of your annotations" in error


def test_a_smoke_run_in_the_folder_is_refused_in_the_words_of_the_caller(tmp_path, capsys):
    params = {"seed": 0, "experiment": find_row("demo:box").smoke().values(), "row": "demo:box"}
    write_json(tmp_path / "params.json", params)
    assert main(["train", "demo:box", "--work-dir", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    end = "holds a smoke run, a test of the installation; choose another {} or delete that one."
    assert error == f"misa train: --work-dir {tmp_path} {end.format('--work-dir')}"
    with pytest.raises(UserError) as caught:
        train_with(Train(row="demo:box", work_dir=str(tmp_path)))
    assert str(caught.value) == f"work_dir {tmp_path} {end.format('work_dir')}"
    assert [path.name for path in tmp_path.iterdir()] == ["params.json"]


def edit(root, change, split="train"):
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first(root, split="train"):
    return min((root / f"{split}2017").iterdir())


def box(*values):
    return lambda root: edit(root, lambda c: c["annotations"][0].update(bbox=list(values)))


# How the file is corrupted, and the reason that the message must give, in words that occur in no path.
BAD = {
    "no such folder": (lambda root: shutil.rmtree(root), "there is no folder"),
    "no annotation file": (
        lambda root: (root / "annotations/instances_train2017.json").unlink(),
        "instances_train2017.json is missing",
    ),
    "an image is absent": (lambda root: first(root).unlink(), "000000000001.png is missing"),
    "an image is cut": (lambda root: cut(first(root)), "000000000001.png is truncated or not an image"),
    "an image of another size": (
        lambda root: edit(root, lambda c: c["images"][0].update(width=47)),
        "is 48 x 48 pixels, but 47 x 48 are listed",
    ),
    "a box without area": (box(3, 3, 0, 5), "bbox [3, 3, 0, 5] has no area"),
    "a negative box": (box(9, 9, -4, 5), "bbox [9, 9, -4, 5] has negative size"),
    "a box outside": (box(500, 3, 4, 5), "bbox [500, 3, 4, 5] lies outside the image"),
    "no objects": (lambda root: edit(root, lambda c: c.update(annotations=[])), "no object to learn from"),
    "no objects in val": (lambda root: edit(root, lambda c: c.update(annotations=[]), "val"), "no object to score on"),
    "no images": (lambda root: edit(root, lambda c: c.update(images=[], annotations=[])), "it lists no images"),
    "other classes": (
        lambda root: edit(root, lambda c: [x.update(name=x["name"] + "s") for x in c["categories"]], "val"),
        "is expected, but found are",
    ),
    "no masks in val": (
        lambda root: edit(root, lambda c: c["annotations"][0].pop("segmentation"), "val"),
        "it has no 'segmentation', and scoring compares with true masks",
    ),
    "a mask in val that does not decode": (
        lambda root: edit(root, lambda c: c["annotations"][0]["segmentation"].update(counts="nonsense"), "val"),
        "segmentation has counts that cannot be decoded",
    ),
    "cut json": (
        lambda root: cut(root / "annotations/instances_train2017.json"),
        "the file ends too early; copy or download it again",
    ),
}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_sentence_before_any_work(name, root, tmp_path, capsys):
    spoil, message = BAD[name]
    spoil(root)
    run = tmp_path / "run"
    assert main(["train", "coco_mini:box", "--smoke", "--data-root", str(root), "--work-dir", str(run)]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    assert message in error
    assert not run.exists()


def test_check_lists_problems_and_exits_with_2(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where its picture is drawn
    assert main(["check", str(root)]) == 0
    assert "4 images" in capsys.readouterr().out
    next((root / "train2017").iterdir()).unlink()
    assert main(["check", str(root)]) == 2
    assert "error:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["estimate", "demo:box", "--gpus", "0"], "misa estimate: --gpus must be at least 1, not 0."),
        (["estimate", "demo:box", "--per-gpu", "-1"], "misa estimate: --per-gpu must be at least 1, not -1."),
        (["profile", "--batch", "0"], "misa profile: --batch must be at least 1, not 0."),
        (["profile", "--threads", "-2"], "misa profile: --threads must be from 1 to 256, not -2."),
        (["predict", "a", "b", "--out", "c", "--masks", "all"], "--masks must be one of map, each, none, not 'all'."),
        (["tarin"], "misa: there is no command 'tarin'; did you mean 'train'?"),
        (["data", "vco"], "misa data: there is no command 'vco'; did you mean 'voc'?"),
    ],
)
def test_wrong_values_are_one_sentence(arguments, sentence, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert sentence in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["estimate", "demo:box", "--images", "many"],
            "argument --images: 'many' is not a whole number; see misa",
        ),
        (["train"], "the following arguments are required: row; see misa train --help."),
        (["train", "demo:box", "--epoch", "3"], "no option --epoch; did you mean '--epochs'? See misa train --help."),
        (["predict", "a", "b"], "the following arguments are required: --out"),
        (["predict", "a", "b", "--ouu", "c"], "no option --ouu; did you mean '--out'? See misa predict --help."),
        (["predict", "a", "b", "--ouu=c"], "no option --ouu; did you mean '--out'?"),
    ],
)
def test_wrong_options_are_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert sentence in error


def every_command():
    """Returns the words of every command, including those in groups."""
    groups = {(name,): importlib.import_module(f"misa.commands.{name}") for name in names(commands)}
    folders = [(words, group) for words, group in groups.items() if hasattr(group, "__path__")]
    for words in [(*outer, name) for outer, group in folders for name in names(group)]:
        groups[words] = importlib.import_module(f"misa.commands.{'.'.join(words)}")
    return {" ".join(words): module for words, module in groups.items() if hasattr(module, "run")}


@pytest.mark.parametrize("command", every_command())
def test_help_shows_an_example_that_can_be_parsed(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    example = capsys.readouterr().out.partition("example: ")[2].splitlines()[0]
    module = every_command()[command]
    assert example.startswith(f"misa {command}")
    options(module, f"misa {command}", shlex.split(example.removeprefix(f"misa {command}")))


@pytest.mark.parametrize("group", [[], ["data"]])
def test_without_a_command_all_are_listed(group, capsys):
    assert main(group) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{' '.join(['misa', *group])}: a command is missing.\n")
    assert main([*group, "--help"]) == 0
    assert error.endswith(f"\n\n{capsys.readouterr().out}")
    assert ("first steps:\n  misa doctor " in error) == (not group)


def test_the_first_steps_can_be_parsed():
    steps = [line.split("  ")[1] for line in (commands.__doc__ or "").partition("first steps:\n")[2].splitlines()]
    assert len(steps) == 4
    for step in steps:
        _, command, *rest = step.split()
        options(every_command()[command], f"misa {command}", rest)


def test_the_overview_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in names(commands))
    assert "Train a row" in out
    assert "whence" not in out
    assert main(["data", "--help"]) == 0
    assert "voc" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"misa {misa.__version__}\n"


def test_a_command_is_one_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy.py").write_text(
        '''"""Add two numbers.

example: misa toy 1 --more 2
"""
from misa.errors import UserError
from misa.parameters import Parameters, argument, option


class Toy(Parameters):
    """What `misa toy` takes."""

    number: int = argument("a number")
    more: int = option(0, "another", low=0)


def run(options: Toy) -> int:
    if options.number == 13:
        raise UserError("13 is unlucky; take another.")
    print(options.number + options.more)
    return 0
'''
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "misa.commands.toy", raising=False)
    assert main(["toy", "1", "--more", "2"]) == 0
    assert capsys.readouterr().out == "3\n"
    assert main(["toy", "13"]) == 2
    assert capsys.readouterr().err == "misa toy: 13 is unlucky; take another.\n"
    assert main(["--help"]) == 0
    assert "toy          Add two numbers." in capsys.readouterr().out
    monkeypatch.delattr(commands, "toy")
    monkeypatch.delitem(sys.modules, "misa.commands.toy")


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (Stopped("stopped by SIGTERM.", status=143), 143, "misa rows: stopped by SIGTERM.\n"),
        (Diverged("the loss is NaN."), 1, "misa rows: diverged: the loss is NaN.\n"),
        (
            OSError(28, "No space left on device", "/x"),
            1,
            "No space left on device: /x; fix that, and the",
        ),
        (BrokenPipeError(32, "Broken pipe"), 1, "misa rows: Broken pipe; fix that"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on from what was saved"),
    ],
)
def test_how_a_command_ends(error, status, sentence, capsys, monkeypatch):
    from misa.commands import rows

    def fail(options: rows.Rows) -> int:
        raise error

    monkeypatch.setattr(rows, "run", fail)
    monkeypatch.setattr("misa.cli.reader_closed", lambda: False)
    assert main(["rows"]) == status
    assert sentence in capsys.readouterr().err


def test_a_reader_that_ends_early_is_no_traceback():
    late = "import sys, time; from misa.cli import main; time.sleep(1); sys.exit(main(['rows']))"  # `true` has exited
    command = f'{sys.executable} -c "{late}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 141
    assert done.stderr == ""


def test_a_terminal_without_unicode_gets_ascii():
    code = "import sys, misa.cli; misa.cli.main(['--version']); print('34.4 ± 1.6 − é 字')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "34.4 +/- 1.6 - e ?"


def test_rows_are_found_by_words(capsys):
    assert main(["rows"]) == 0
    out = capsys.readouterr().out
    every = [f"{table}:{name}" for table in table_names() for name in table_module(table).ROWS]
    assert all(f"  {name} " in out for name in every)
    assert main(["rows", "Table 3:", "demo_sepa"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Table 3:")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == ["table3_components:demo_sepa"]
    assert "taught by teacher:demo_tables" in out
    assert "\n1 of " in out
    assert main(["rows", "own:"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["own:small", "own:medium"]
    assert main(["rows", "teacher:"]) == 0  # the rows of the table, not the students that name one as their teacher
    assert len(table_module("teacher").ROWS) == capsys.readouterr().out.count("\n  teacher:")
    assert main(["rows", "demo", "sepa"]) == 0
    assert "`misa rows demo:` lists the rows of the table demo alone." in capsys.readouterr().out


def test_rows_that_do_not_exist_are_a_sentence_with_a_similar_name(capsys):
    for words, sentence in (
        (["no-such-row"], r"no row has no-such-row; `misa rows` lists all \d+\."),
        (["photos", "spea"], r"no row has photos and spea; did you mean 'sepa'\? `misa rows` lists all \d+\."),
        (["demo:", "own:"], r"no row has demo: and own:; `misa rows` lists all \d+\."),
    ):
        assert main(["rows", *words]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert re.fullmatch(f"misa rows: {sentence}\n", said.err)


def test_an_argument_too_many_is_named_as_such(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "demo:box", "demo:mask"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "misa train: demo:mask is one argument too many; see misa train --help.\n"


def test_files_that_are_no_images_are_counted(tmp_path, capsys, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    done = Predictions(tmp_path, 1, 0, {}, given=(1, 0), predicted=1, skipped=(photos / "notes.txt",))
    monkeypatch.setattr("misa.engine.prediction.predict.predict", lambda *_, **__: done)
    words = ["predict", str(tmp_path), str(photos), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"1 file that is no image skipped: {shorter(photos / 'notes.txt')}"
    ]
    done = dataclasses.replace(done, skipped=(photos / "a.txt", photos / "b.xml"))
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"2 files that are no image skipped, such as {shorter(photos / 'a.txt')}"
    ]


def test_rows_that_have_a_word_in_their_description_only_come_last(capsys):
    assert main(["rows", "SEMANTIC"]) == 0
    named, _, described = capsys.readouterr().out.partition("In the description only:\n")
    names = [line.split()[0] for line in named.splitlines() if line.startswith("  ")]
    assert "table3_components:demo_sepa" in names, "a row of the table on the two semantic priors"
    lines = [line for line in described.splitlines() if line.startswith("  ")]
    assert "photos:teacher" in [line.split()[0] for line in lines]
    assert all("semantic" in line and "semantic" not in line.split()[0] for line in lines)
    assert f"{len(names) + len(lines)} of " in described
    assert f" rows, {len(lines)} by the description only; train" in described
    assert main(["rows", "grabcut", "teacher"]) == 0
    assert "description only" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("demo:discobox_bank", "solov2 (resnet18, 12 epochs) from boxes, objective DiscoBox with object bank\n"),
        ("table1_coco:sim_paste_swin_b", "from boxes, objective SIM with pasting\n"),
        ("table1_coco:sim_swin_b", "from boxes, objective SIM\n"),
        ("demo:boxlevelset", "from boxes, objective BoxLevelSet"),
        ("table4_distillation:demo_plain", "apro with affinity of color, distillation, taught by teacher:demo_tables"),
        ("table4_distillation:demo_space", "distillation by space, taught"),
        ("table5_affinity:demo_pamr_feature", "pamr with affinity of color × feature, taught"),
        ("demo:mask", "solov2 (resnet18, 12 epochs) from masks"),
        ("photos:box", "solov2 (efficientnet_lite0, pretrained, 6 epochs) from boxes"),
        ("photos:sepa", "apro with affinity of color × class probability"),
        ("teacher:demo_grabcut", "semantic teacher (resnet18, 12 epochs) from GrabCut in the boxes"),
    ],
)
def test_a_row_is_described_by_what_sets_it_apart(row, words, capsys):
    assert main(["rows", row]) == 0
    assert words in next(line for line in capsys.readouterr().out.splitlines(True) if line.split()[0] == row)


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "misa", "--help"], capture_output=True, text=True, check=True)
    assert "Train a row" in done.stdout


def boxes_only(root):
    """Write the same data as csv files, which hold no masks."""
    for split in ("train", "val"):
        content = json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())
        file = {image["id"]: f"{split}2017/{image['file_name']}" for image in content["images"]}
        name = {category["id"]: category["name"] for category in content["categories"]}
        lines = ["image,x,y,w,h,label"]
        for a in content["annotations"]:
            lines.append(",".join(map(str, [file[a["image_id"]], *a["bbox"], name[a["category_id"]]])))
        (root / f"{split}.csv").write_text("\n".join(lines))
    shutil.rmtree(root / "annotations")


def test_boxes_in_csv_files_train_from_the_same_command(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    boxes_only(root)
    run = tmp_path / "run"
    assert main(["check", str(root), "--picture", str(tmp_path / "check.png")]) == 0
    assert (tmp_path / "check.png").is_file()
    assert "(train split): 4 images" in capsys.readouterr().out
    assert main(["train", "coco_mini:box", "--smoke", "--data-root", str(root), "--work-dir", str(run)]) == 0
    out = capsys.readouterr().out
    assert "the val split has no masks; the score compares boxes" in out
    metrics = json.loads((run / "metrics.json").read_text())
    assert "segm" not in metrics
    assert set(metrics["bbox"]) == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    assert main(["evaluate", str(run)]) == 0
    assert "boxes" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--miou"]) == 2
    assert "mean IoU compares with true masks" in capsys.readouterr().err


def checked(root, capsys, *lines, head="image,xmin,ymin,xmax,ymax,label"):
    """Returns the output lines of `misa check` on a csv with these lines and six small images."""
    root.mkdir()
    for i in range(6):
        Image.new("RGB", (80, 60), (40 * i, 9, 9)).save(root / f"{i}.png")
    (root / "boxes.csv").write_text("\n".join([head, *lines]))
    status = main(["check", str(root), "--no-picture"])
    return status, capsys.readouterr().out.splitlines()


GOOD = [f"{i}.png,1,2,30,40,cat" for i in range(6)]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("0.png,abc,2,30,40,cat", "line 2: its box abc, 2, 30, 40 is not four numbers; correct it"),
        ("0.png,9,2,3,40,cat", "line 2: its box 9, 2, 3, 40 ends before it begins; give x1 < x2 and y1 < y2."),
        ("0.png,9,2,9,40,cat", "line 2: its box (x 9 to 9, y 2 to 40 in pixels from 0) has no area; give it"),
        ("0.png,90,2,99,40,cat", "line 2: its box (x 90 to 99, y 2 to 40 in pixels from 0) lies outside the image"),
        ("zz.png,1,2,30,40,cat", "zz.png is missing; add it, or remove what is said of it here."),
    ],
)
@pytest.mark.parametrize("others", [GOOD[1:2], GOOD[1:]], ids=["two lines", "six lines"])
def test_a_bad_line_is_one_error_in_the_words_of_its_format(line, sentence, others, tmp_path, capsys, monkeypatch):
    """Consequences are not reported: no images, no categories, an image without objects."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    status, said = checked(tmp_path / "data", capsys, line, *others)
    assert status == 2
    (error,) = [text for text in said if text.startswith(("error:", "note:")) and "not listed in" not in text]
    assert sentence in error
    assert not {"bbox", "image_id", "categories"} & set(error.replace("'", " ").split())


def test_what_differs_between_the_splits_is_warned_of_once(tmp_path, capsys, monkeypatch):
    """A class only in the val split, names that are nearly equal, and missing images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    boxes = [("0.png", "cat", "train"), ("1.png", "Cat", "train"), ("2.png", "dog", "val"), ("2.png", "dog", "val")]
    lines = [f"{image},{i},2,30,40,{label},{split}" for i, (image, label, split) in enumerate(boxes)]
    head = "image,xmin,ymin,xmax,ymax,label,split"
    status, said = checked(tmp_path / "data", capsys, *lines, "03.png,1,2,30,40,cat,train", head=head)
    assert status == 2
    place = f"{tmp_path / 'data'} (train split)"
    assert f"{place}: 3 images (1 of them missing, 0 without objects), 3 objects in 3 classes, 0 crowds" in said
    assert not any("now:" in text for text in said)
    (error,) = [text for text in said if text.startswith("error:")]
    assert error.endswith("03.png is missing; did you mean '3.png'?")
    warnings = [text for text in said if text.startswith("warning:")]
    alike = "the class 'cat' differs from 'Cat' in case, spaces or Unicode form only"
    alike = f"{alike}; give both one name, if they are one class."
    other = "3 images have no annotations or no split, such as 3.png; nothing to do, if they are not meant."
    assert warnings == [f"warning: {tmp_path / 'data'}: {other}", f"warning: {place}: {alike}"]
    (tmp_path / "data/3.png").rename(tmp_path / "data/03.png")
    assert main(["check", str(tmp_path / "data"), "--no-picture"]) == 0
    (warning,) = [text for text in capsys.readouterr().out.splitlines() if "not learned" in text]
    alone = "the val split has boxes of dog (2) and the train split none, so that they are not learned"
    assert warning == f"warning: {place}: {alone}; bring images of each class into the train split."


def test_a_csv_of_bad_lines_alone_has_no_second_fault(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    status, said = checked(tmp_path / "data", capsys, "0.png,abc,2,30,40,cat", "1.png,1,2,,40,cat")
    assert status == 2
    errors = [text for text in said if text.startswith("error:")]
    assert len(errors) == 2
    assert all("is not four numbers" in text for text in errors)
    assert not any("for validation" in text for text in said), "there is nothing to split"


def test_check_warns_of_fewer_images_than_a_batch(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    status, said = checked(tmp_path / "data", capsys, *GOOD)
    assert status == 0
    (warning,) = [text for text in said if text.startswith("warning:") and "batch" in text]
    assert (
        "(train split): 5 images cannot fill a batch of own:small (8); add images, or train it with --batch 5"
        in warning
    )
    assert any("(val split): 1 image (0 without objects), 1 object in 1 class, 0 crowds" in text for text in said)
    assert said[-1] == f"now: misa train photos:box --data-root {tmp_path / 'data'}"
    root, run = str(tmp_path / "data"), str(tmp_path / "run")
    assert main(["train", "own:small", "--data-root", root, "--work-dir", run]) == 2
    sentence = f"a batch takes 8 images and the train split of {root} has 5; set --batch to 5 or less."
    assert sentence in capsys.readouterr().err


def test_what_check_advises_for_few_images_is_taken(tmp_path, capsys, monkeypatch):
    """Also where the suggested row's batch is larger than the train split."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    status, said = checked(tmp_path / "data", capsys, *[f"{i}.png,1,2,30,40,cat" for i in range(3)])
    assert status == 0
    (warning,) = [text for text in said if text.startswith("warning:") and "batch" in text]
    images = re.search(r"(\d) images cannot fill a batch of photos:box \(4\) or own:small \(8\)", warning)[1]
    assert warning.endswith(f"add images, or train them with --batch {images}.")
    command = shlex.split(said[-1].partition("now: ")[2])
    assert command[-2:] == ["--batch", images]
    parsed = options(importlib.import_module("misa.commands.train"), "misa train", command[2:])
    assert parsed.batch == int(images) < find_row(parsed.row).schedule.batch


def test_check_of_good_data_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    split = [(i, "train") for i in range(8)] + [(8, "val")]
    lines = [f"{i}.png,1,2,30,40,cat,{which}" for i, which in split]
    checked(tmp_path / "data", capsys, *lines, head="image,xmin,ymin,xmax,ymax,label,split")
    for i in range(6, 9):
        Image.new("RGB", (80, 60), (9, 9, 20 * i)).save(tmp_path / f"data/{i}.png")
    assert main(["check", str(tmp_path / "data"), "--no-picture"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"no problems; now: misa train photos:box --data-root {tmp_path / 'data'}"
    )


def test_check_of_one_json_and_what_it_tells(root, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(first(root), root / "val2017" / first(root, "val").name)  # an image of both splits
    edit(root, lambda c: c["annotations"].append({**c["annotations"][0], "id": 999}))
    edit(root, lambda c: c["categories"].append({"id": 77, "name": " ".join(c["categories"][0]["name"]).upper()}))
    json_file = root / "annotations/instances_train2017.json"
    assert main(["check", str(json_file), "--images", str(root / "train2017")]) == 0
    out = capsys.readouterr().out
    assert "has the same box; remove one of them" in out
    assert "differs from" in out
    inside = "-".join(json_file.relative_to(tmp_path).parts)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [f"check-{inside}.png"]
    monkeypatch.chdir(root)  # the data is where one is: its whole path, not a name such as data
    assert main(["check", "."]) == 0
    assert (root / "runs" / f"check-{'-'.join(root.resolve().parts[1:])}.png").is_file()
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(root), "--no-picture"]) == 0
    assert "has the same content as" in capsys.readouterr().out
    assert main(["check", str(root), "--images", str(root)]) == 2
    assert "--images goes with one COCO json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("misa tr", {"train"}),
        ("misa train photos:sc", {"photos:scratch"}),
        ("misa train demo:box --prec", {"--precision"}),
        ("misa train demo:box --precision b", {"bfloat16"}),
        ("misa data v", {"voc"}),
        ("misa completion f", {"fish"}),
    ],
)
def test_a_shell_is_told_what_may_come_next(line, answers, tmp_path):
    """In a fresh process, called the way argcomplete's shell code calls it."""
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answers"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    subprocess.run([sys.executable, "-m", "misa"], env=os.environ | asked, timeout=60, check=True)
    assert {word.strip() for word in (tmp_path / "answers").read_text().split("\v")} == answers


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "misa" in capsys.readouterr().out


def test_another_shell_is_refused(capsys):
    assert main(["completion", "csh"]) == 2
    assert "csh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "masks", "smoke", "commands"),
    [
        ("demo:box", True, False, ["inspect", "predict", "export"]),
        ("demo:box", False, False, ["predict", "export"]),
        ("teacher:demo", True, False, ["evaluate", "figures"]),
        ("demo:box", True, True, []),
    ],
)
def test_a_training_ends_with_what_to_do_now(row, masks, smoke, commands, tmp_path):
    """Commands that exist and take these words; a smoke run's results serve nothing."""
    experiment = find_row(row).smoke() if smoke else find_row(row)
    line = next_step(Run(experiment, tmp_path / "my run", types.SimpleNamespace(masks=masks), {}))
    found = [shlex.split(part.partition("(")[0]) for part in line.removeprefix("now: ").split(", ") if part]
    assert [words[:3] for words in found] == [["misa", name, shorter(tmp_path / "my run")] for name in commands]
    for _, name, *words in found:
        options(importlib.import_module(f"misa.commands.{name}"), name, words)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["check", ""], "the path of the data"),
        (["convert", "", "out"], "the path of the data"),
        (["convert", ".", ""], "the path of the new folder"),
        (["label", "", "--out", "masks.json"], "the path of the data"),
        (["train", "photos:box", "--data-root", ""], "--data-root"),
        (["train", "demo:box", "--data-root", " "], "--data-root"),
        (["tables", "3", "--data-root", ""], "--data-root"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(words, what, capsys, tmp_path, monkeypatch):
    """As `--data-root "$UNSET"` in a shell."""
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"misa {words[0]}: {what} is empty; give a path, or . for this folder."
    ]
    assert list(tmp_path.iterdir()) == []
