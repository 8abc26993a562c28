"""Every row of the comparison, and of the demo with another paper's objective, in small size: train, load, export."""

import json
import resource
import shutil

import numpy as np
import pytest

from experiments import comparators, demo, photos
from misa.commands.train import Train, train_with
from misa.engine.prediction.export import export_student
from misa.engine.prediction.student import find, load_student

ROWS = [f"comparators:{name}" for name in comparators.ROWS if name.startswith("demo_")]
ROWS += [f"demo:{name}" for name, row in demo.ROWS.items() if row.objective is not None or name == "polarmask"]


def test_every_objective_has_a_row_on_both_data_sets_and_one_schedule():
    for data, base in (("demo", demo.BARE.but(scenes=demo.MANY)), ("photos", photos.BASE)):
        for name, objective in demo.OBJECTIVES.items():
            row = comparators.ROWS[f"{data}_{name}"]
            assert row.objective == objective
            assert row.student == "solov2"
            shared = ("network", "schedule", "augmentation", "scenes", "data")
            assert all(getattr(row, field) == getattr(base, field) for field in shared), name
        assert {f"{data}_{name}" for name in comparators.TABLE.rows} <= comparators.ROWS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains_predicts_and_is_exported_in_small(name, module_path):
    """Two steps on a few scenes; prints the peak memory of the process so far."""
    place = module_path / name.replace(":", "-")
    run = train_with(
        Train(row=name, data_root=str(module_path / "data"), work_dir=str(place / "run"), smoke=True, gpus=0)
    )
    steps = [json.loads(line) for line in (run.folder / "losses.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert all(np.isfinite(step["loss"]) and step["loss"] > 0 for step in steps)
    assert run.metrics["segm"]["AP"] is not None
    export_student(run.folder, place / "student.pth")
    mine, theirs = load_student(run.folder), load_student(place / "student.pth")
    assert mine.digest == theirs.digest
    image = np.random.default_rng(0).integers(0, 256, (90, 128, 3), dtype=np.uint8)
    (one,), (other,) = (find(student, [image], score=0.0) for student in (mine, theirs))
    assert one.runs == other.runs
    assert (one.scores == other.scores).all()
    assert all(runs["size"] == [90, 128] for runs in one.runs)
    print(f"{name}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")
    shutil.rmtree(place)
