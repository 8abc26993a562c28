"""The rows of Tables 1 and 2: the paper's numbers, and that each row runs."""

import csv
import json
import resource
import shutil

import pytest

from experiments import table1_coco, table2_voc
from misa.commands.train import Train, train_with
from misa.experiment import Expected
from misa.rows import find_row

BACKBONES = {"R-50": "resnet50", "R-101": "resnet101", "Swin-B": "swin_b"}
STUDENTS = {
    "SOLOv2": "solov2",
    "Mask2Former": "mask2former",
    "SOLO": "solo",
    "Mask R-CNN": "mask_rcnn",
    "PolarMask": "polarmask",
    "CondInst": "condinst",
}
TABLES = {"1": table1_coco.ROWS, "2": table2_voc.ROWS}
ROWS = [
    f"{name}:{row}" for name, table in zip(("table1_coco", "table2_voc"), TABLES.values(), strict=True) for row in table
]


def kind(row):
    """Returns method, framework and backbone of an experiment, as named in the paper's tables."""
    method = "MISA" if row.teacher else "APro" if row.supervision == "box" else row.student
    if row.student == "boxinst":
        method = "BoxInst"
    if row.objective is not None:
        method = type(row.objective).__name__
    return method, row.student, row.network.backbone


@pytest.mark.shared
@pytest.mark.parametrize("table", TABLES)
def test_every_row_of_the_table_is_here_with_its_numbers(table, shared):
    expected = {}
    with (shared / "data" / "golden" / "paper_tables.csv").open() as file:
        for line in csv.DictReader(file):
            if line["table"] != table:
                continue
            student = "boxinst" if line["method"] == "BoxInst" else STUDENTS[line["framework"]]
            method = student if line["supervision"] == "mask" else line["method"]
            numbers = [
                float(line[name]) if line[name] else None for name in ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
            ]
            expected[method, student, BACKBONES[line["backbone"]]] = Expected(*numbers)
    printed = [row for row in TABLES[table].values() if row.expected]  # others are readings of our own
    ours = {kind(row): row.expected for row in printed}
    assert ours == expected
    assert len(ours) == len(printed)


def test_a_row_of_misa_is_that_of_apro_with_both_modules():
    """Except for the optimiser: the paper states its own, and APro's rows use APro's."""
    for name in ROWS:
        row = find_row(name)
        if not row.teacher:
            continue
        apro = find_row(name.replace("misa", "apro"))
        off = row.but(distillation=None, teacher="", affinity={"saliency": False}, schedule=apro.schedule)
        assert off.but(inference=apro.inference, expected=apro.expected) == apro, name
        assert (row.schedule.lr, row.schedule.weight_decay, row.schedule.batch) == (1.2e-4, 0.05, 16), name
        assert find_row(row.teacher).network.backbone == row.network.backbone, name


@pytest.fixture(scope="module")
def places(shared, module_path):
    """A data folder and a runs folder for each table, so that rows share their teacher."""
    from misa.data.formats.voc import write_voc

    voc = module_path / "voc"
    write_voc(shared / "data" / "voc_mini" / "VOC2012", voc, train="trainval", val="trainval")
    return {"table1_coco": shared / "data" / "coco_mini", "table2_voc": voc, "runs": module_path}


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains_and_predicts_in_small(name, places):
    """Two steps on a few images; prints the peak memory of the process so far."""
    table, _, row = name.partition(":")
    run = train_with(
        Train(
            row=name,
            data_root=str(places[table]),
            work_dir=str(places["runs"] / table / row),
            smoke=True,
            epochs=2 if table == "table2_voc" else None,  # three images give one step per epoch
            gpus=0,
        )
    )
    steps = (run.folder / "losses.jsonl").read_text().splitlines()
    assert len(steps) == 2
    assert all(json.loads(step)["loss"] > 0 for step in steps)
    assert run.metrics["segm"]["AP"] is not None
    assert (run.folder / "predictions" / "val.json").exists()
    print(f"{name}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")
    shutil.rmtree(run.folder)  # the shared teacher beside it stays
