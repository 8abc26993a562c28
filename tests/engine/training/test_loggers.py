"""Losses and scores in external loggers."""

import hashlib
import shutil
import sys
import threading
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from misa.engine.training.runner import run_id, visualizer_config
from misa.engine.training.train import train
from misa.errors import UserError
from misa.machine import Machine, logger_names
from tests.helpers import tiny_experiment

TOY = tiny_experiment(schedule={"warmup": 1})


class FakeWandb(types.ModuleType):
    """Records what mmengine's backend sends to W&B."""

    def __init__(self):
        super().__init__("wandb")
        self.ended = 0
        self.started, self.logged, self.config = {}, [], types.SimpleNamespace(update=lambda *a, **k: None)
        self.run = types.SimpleNamespace(log_code=lambda *a, **k: None)

    def init(self, **options):
        self.started = options

    def log(self, values, **_):
        self.logged.append(values)

    def join(self):
        self.ended += 1

    def define_metric(self, *_, **__):
        pass


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    module.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_run_keeps_its_id_and_another_one_in_the_same_place_has_its_own(tmp_path):
    run = tmp_path / "run"
    first = run_id(run)
    assert run_id(run) == first
    shutil.rmtree(run)
    assert run_id(run) != first
    (tmp_path / "old" / "wandb" / "run-1").mkdir(parents=True)  # begun by a version that kept none
    assert run_id(tmp_path / "old") == hashlib.sha256(str(tmp_path / "old").encode()).hexdigest()[:16]


def test_tensorboard_has_every_step_and_the_scores_and_so_has_wandb(tmp_path, wandb):
    run = train(
        TOY,
        data_root=tmp_path / "data",
        work_dir=tmp_path / "run",
        machine=Machine(gpus=0, loggers=logger_names("wandb")),
    )
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert {"loss", "loss_cls", "loss_local", "lr", "segm/AP", "segm_any_class/AP"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert events.Scalars("segm/AP")[0].value == pytest.approx(run.metrics["segm"]["AP"])
    assert wandb.started["project"] == "misa"
    assert wandb.started["id"] == run_id(run.folder)
    assert sum("loss_cls" in values for values in wandb.logged) == 4
    assert any("segm/AP" in values for values in wandb.logged)
    assert wandb.ended == 1


def test_loggers_are_closed_when_a_training_fails(tmp_path, wandb, monkeypatch):
    """TensorBoard's thread would write to a folder that may be deleted by then, W&B and MLflow would keep the run."""
    others = set(threading.enumerate())

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("misa.engine.training.train.write_scores", stop)
    with pytest.raises(KeyboardInterrupt):
        train(
            TOY,
            data_root=tmp_path / "data",
            work_dir=tmp_path / "run",
            machine=Machine(gpus=0, loggers=logger_names("wandb")),
        )
    assert not [thread for thread in set(threading.enumerate()) - others if "AsyncWriter" in type(thread).__name__]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert wandb.ended == 1


def test_loggers_that_cannot_be_closed_hide_neither_result_nor_error(tmp_path, wandb, monkeypatch, capsys):
    def lost():
        raise OSError("no connection")

    def stop(*_):
        raise UserError("broken on purpose.")

    wandb.join = lost
    machine = Machine(gpus=0, loggers=logger_names("wandb"))
    assert train(TOY, data_root=tmp_path / "data", work_dir=tmp_path / "run", machine=machine).metrics
    assert "warning: a logger could not be closed (no connection)." in capsys.readouterr().err
    monkeypatch.setattr("misa.engine.training.train.write_scores", stop)
    with pytest.raises(UserError, match=r"^broken on purpose\.$"):
        train(TOY, data_root=tmp_path / "data", work_dir=tmp_path / "other", machine=machine)
    assert "warning: a logger could not be closed (no connection)." in capsys.readouterr().err


def test_a_logger_that_is_not_there_is_told(monkeypatch):
    assert logger_names("") == ()
    assert logger_names("tensorboard") == ()
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        logger_names("wandbb")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install mlflow"):
        logger_names("mlflow")


def test_every_training_has_its_own_also_in_one_folder(tmp_path):
    one, two, again = (visualizer_config(tmp_path / name, ("wandb", "mlflow")) for name in ("a", "b", "a"))
    assert len({one["name"], two["name"], again["name"]}) == 3
    assert [backend["type"].__name__ for backend in one["vis_backends"]] == [
        "TensorboardVisBackend",
        "WandbVisBackend",
        "MLflowVisBackend",
    ]
    assert visualizer_config(tmp_path, None)["vis_backends"] is None


def test_mlflow_writes_into_the_run_folder_or_to_the_named_server(tmp_path, monkeypatch):
    """MLflow 3 refuses plain files, and must not create a folder in the working directory."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    own = visualizer_config(tmp_path / "a b", ("mlflow",))["vis_backends"][1]
    assert own["tracking_uri"] == f"sqlite:///{tmp_path}/a b/mlflow/mlflow.db"
    assert own["artifact_location"] == f"file://{tmp_path}/a%20b/mlflow/artifacts"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    shared = visualizer_config(tmp_path / "a b", ("mlflow",))["vis_backends"][1]
    assert shared["tracking_uri"] == "http://server:5000"
    assert "artifact_location" not in shared


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from MLflow's dependencies
def test_mlflow_has_every_step_and_the_scores(tmp_path, monkeypatch):
    import mlflow  # takes seconds

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = train(
        TOY, data_root=tmp_path / "data", work_dir=tmp_path / "run", machine=Machine(gpus=0, loggers=("mlflow",))
    )
    client = mlflow.MlflowClient(f"sqlite:///{run.folder}/mlflow/mlflow.db")
    (kept,) = client.search_runs([client.get_experiment_by_name("misa").experiment_id])
    assert [point.step for point in client.get_metric_history(kept.info.run_id, "loss")] == [1, 2, 3, 4]
    assert kept.data.metrics["segm/AP"] == pytest.approx(run.metrics["segm"]["AP"])
