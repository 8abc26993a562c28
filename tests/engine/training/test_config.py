"""A row as an mmengine config: batch, hooks and components of each kind of row."""

import pytest

from misa.data.source import open_source
from misa.engine.runs.teacher import TeacherCard
from misa.engine.training.config import run_config
from misa.engine.training.resume import StepClock, WholeBatches
from misa.engine.training.watch import Health
from misa.evaluation.metric import Detections, LabelMaps
from misa.experiment import Semantic
from misa.machine import Machine, split_batch
from misa.objectives.boxlevelset import BoxLevelSet
from tests.helpers import tiny_experiment


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(tiny_experiment(), tmp_path_factory.mktemp("data"))


def config_of(source, folder, *, row=None, **options):
    return run_config(row or tiny_experiment(), source, folder=folder, seed=3, **options)


def hooks(config):
    return [hook["type"] for hook in config.custom_hooks]


@pytest.mark.parametrize(
    ("processes", "per_gpu", "images", "accumulate"), [(1, None, 8, 1), (2, None, 4, 1), (2, 2, 2, 2)]
)
def test_the_batch_is_split_and_accumulated(source, tmp_path, processes, per_gpu, images, accumulate):
    row = tiny_experiment(schedule={"batch": 8})
    config = config_of(source, tmp_path, row=row, split=split_batch(8, processes, per_gpu))
    assert config.train_dataloader.batch_size == images
    assert config.train_dataloader.sampler == {"type": WholeBatches, "batch": 8, "seed": 3}
    assert config.optim_wrapper.get("accumulative_counts", 1) == accumulate
    assert config.default_hooks.param_scheduler.accumulate == accumulate
    assert ("model_wrapper_cfg" in config) == (processes > 1)
    assert ("collect_dir" in config.test_evaluator) == (processes > 1)


def test_the_schedule_counts_whole_batches(source, tmp_path):
    row = tiny_experiment(schedule={"batch": 2, "epochs": 5, "warmup": 4})
    warmup, decay = config_of(source, tmp_path, row=row).param_scheduler
    assert (warmup["begin"], warmup["end"]) == (0, 4)
    assert decay["T_max"] == 5 * (source.images // 2)


def test_a_checkpoint_is_resumed(source, tmp_path):
    config = config_of(source, tmp_path, checkpoint=tmp_path / "epoch_1.pth")
    assert config.resume
    assert config.load_from == str(tmp_path / "epoch_1.pth")
    assert not config_of(source, tmp_path).resume


def test_each_kind_of_row_has_its_own_hooks_and_data(source, tmp_path):
    box = config_of(source, tmp_path)
    assert Health in hooks(box)
    assert StepClock not in hooks(box)
    assert box.test_evaluator.type is Detections
    assert not box.train_dataloader.dataset.masks
    masks = config_of(source, tmp_path, row=tiny_experiment(supervision="mask"))
    assert Health not in hooks(masks)
    assert masks.train_dataloader.dataset.masks
    other = config_of(source, tmp_path, row=tiny_experiment(affinity=None, objective=BoxLevelSet()))
    assert {Health, StepClock} <= set(hooks(other))
    teacher = config_of(source, tmp_path, row=tiny_experiment(semantic=Semantic(labels="rectangles")))
    assert TeacherCard in hooks(teacher)
    assert Health not in hooks(teacher)
    assert teacher.test_evaluator.type is LabelMaps
    assert teacher.train_dataloader.dataset.data_prefix.seg.startswith(str(tmp_path))
    assert TeacherCard not in hooks(box)


def test_parts_that_a_batch_may_leave_out_are_searched_for(source, tmp_path):
    split = split_batch(2, 2)
    for student, branches in (("solov2", False), ("condinst", True)):
        config = config_of(source, tmp_path, row=tiny_experiment(student=student), split=split)
        assert config.model_wrapper_cfg.find_unused_parameters is branches


def test_the_machine_says_how_images_are_loaded_and_shown(source, tmp_path):
    config = config_of(source, tmp_path, machine=Machine(workers=3, interactive=True))
    assert config.train_dataloader.num_workers == config.test_dataloader.num_workers == 3
    (progress,) = [hook for hook in config.custom_hooks if "interactive" in hook]
    assert progress["interactive"]
    assert config.train_dataloader.dataset.indices is None
    limited = config_of(source, tmp_path, row=tiny_experiment(limit=2))
    assert limited.train_dataloader.dataset.indices == limited.test_dataloader.dataset.indices == 2
