"""Profile time and memory of a training step by parts; misa/commands/profile.py describes the method."""

import ctypes
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from mmengine.runner import Runner
from tqdm.auto import tqdm

import misa.losses.distillation
import misa.ops.guides
from misa.data.source import open_source
from misa.engine.training.config import run_config
from misa.engine.training.runner import quiet_runner
from misa.errors import UserError, counted
from misa.experiment import Experiment
from misa.models.students.base import BoxSupervised
from misa.models.teacher.contract import TeacherNetwork
from misa.models.teacher.table import untrained_teacher
from misa.ops.guides import Guides
from misa.rows import find_row

# Functions timed inside a step: owner, name, and the part that they belong to.
PARTS = (
    (BoxSupervised, "_prior", "teacher forward"),
    (misa.losses.distillation, "distillation_loss", "FSD"),
    (misa.ops.guides, "spanning_trees", "tree"),
    (Guides, "along_trees", "propagation, global"),
    (Guides, "along_masks", "propagation, global"),
    (Guides, "along_window", "propagation, local"),
)


def forms(row: Experiment) -> dict[str, Experiment]:
    """Variants of the row: mask-supervised, from boxes, with either prior, and with both."""
    if row.affinity is None or row.distillation is None or not row.teacher:
        raise UserError("misa profile takes a row with FSD and SEPA, such as demo:misa.")
    colors = row.but(affinity={"saliency": False, "feature": False})
    return {
        "mmdet, from masks": colors.but(supervision="mask", distillation=None, teacher=""),
        "box baseline": colors.but(distillation=None, teacher=""),
        "+ FSD": colors,
        "+ SEPA": row.but(distillation=None),
        "+ FSD + SEPA": row,
    }


@contextmanager
def named_parts() -> Iterator[None]:
    """Context in which a profiler records the parts by name; a nested part is called `misa: inner < outer`."""
    running: list[str] = []
    with ExitStack() as stack:
        for owner, name, part in PARTS:
            original = getattr(owner, name)

            def inner(*args: Any, _original: Any = original, _part: str = part, **kwargs: Any) -> Any:
                running.append(_part)
                try:
                    with torch.profiler.record_function(f"misa: {' < '.join(reversed(running))}"):
                        return _original(*args, **kwargs)
                finally:
                    running.pop()

            stack.enter_context(patch.object(owner, name, inner))
        yield


class Setup(NamedTuple):
    """Setup of the measurement: data folder, "cpu" or "cuda", and number of steps of each variant."""

    data_root: str
    device: str
    steps: int


class Step:
    """A variant that trains repeatedly on one batch."""

    def __init__(self, row: Experiment, teacher: TeacherNetwork | None, setup: Setup, folder: Path) -> None:
        source = open_source(row, setup.data_root)
        row = row.but(network={"pretrained": False})  # the time does not depend on the weights
        self.runner: Runner = quiet_runner(run_config(row, source, folder=folder, seed=0))
        self.model: Any = self.runner.model.to(setup.device)
        self.model.init_weights()
        if row.teacher:
            assert teacher is not None
            self.model.attach(teacher)
        loader = Runner.build_dataloader(self.runner._train_dataloader, seed=0)
        self.batch = next(iter(loader))
        self.optimizer = self.runner.build_optim_wrapper(self.runner.optim_wrapper)
        self.model.train()

    def __call__(self) -> None:
        """Run one step."""
        self.model.train_step(self.batch, self.optimizer)


def build(row: Experiment, setup: Setup, folder: Path) -> dict[str, Step]:
    """Build every variant; the teacher has random weights, which does not affect the time."""
    torch.manual_seed(0)
    every = forms(row)
    source = open_source(row, setup.data_root)
    teacher = untrained_teacher(row, source.classes)
    return {name: Step(form, teacher, setup, folder / str(i)) for i, (name, form) in enumerate(every.items())}


def timed(step: Callable[[], None], device: str) -> tuple[float, float]:
    """Wall-clock and CPU time of a step in ms."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def memory(step: Step, device: str) -> float:
    """Peak memory of a step in MB, beyond what is allocated between steps."""
    if device != "cuda":
        return peak_memory(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def parts(step: Step, device: str) -> dict[str, float]:
    """Time in ms of every part of one profiled step's forward pass, on a GPU the device's."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Profiler clears events.*")  # there is only one cycle
        with named_parts(), torch.profiler.profile(activities=activities) as trace:
            step()
        events = trace.key_averages()
    spent = {
        event.key.removeprefix("misa: "): (event.device_time_total if device == "cuda" else event.cpu_time_total) / 1e3
        for event in events
        if event.key.startswith("misa: ")
    }
    return own_times(spent)


def own_times(spent: dict[str, float]) -> dict[str, float]:
    """Subtract the time of nested parts from each part, and sum nested parts by their own name.

    >>> own_times({"tree": 1.0, "propagation": 5.0, "tree < propagation": 2.0})
    {'tree': 3.0, 'propagation': 3.0}
    """
    found: dict[str, float] = {}
    for name, time_spent in spent.items():
        inner, *outer = name.split(" < ")
        found[inner] = found.get(inner, 0.0) + time_spent
        if outer:
            found[outer[0]] = found.get(outer[0], 0.0) - time_spent
    return found


def report(steps: dict[str, Step], setup: Setup) -> None:
    """Measure the variants in turn and print the report."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    teacher_times: list[tuple[float, float]] = []
    whole = steps["+ FSD + SEPA"]
    images = whole.model.data_preprocessor(whole.batch, True)["inputs"]
    # Warm-up and measured turns, then a step of each variant for its memory and one under the profiler.
    bar = tqdm(total=(setup.steps + 2) * len(steps) + 1, desc="measuring", unit="step", leave=False)
    for turn in range(setup.steps + 1):
        for name, step in steps.items():
            spent = timed(step, setup.device)
            bar.update()
            if turn:
                seen[name].append(spent)
        spent = timed(lambda: whole.model.teacher.prior(images), setup.device)
        if turn:
            teacher_times.append(spent)
    peaks = {}
    for name, step in steps.items():
        peaks[name] = memory(step, setup.device)
        bar.update()
    inside = parts(whole, setup.device)
    bar.close()
    medians = {name: tuple(statistics.median(v[k] for v in values) for k in (0, 1)) for name, values in seen.items()}
    teacher = tuple(statistics.median(v[k] for v in teacher_times) for k in (0, 1))
    print(f"\n{'a whole step':<22} {'wall ms':>9} {'CPU ms':>9} {'to baseline':>12} {'peak MB':>9}")
    base = medians["box baseline"]
    for name, (wall, cpu) in medians.items():
        print(f"{name:<22} {wall:9.0f} {cpu:9.0f} {wall / base[0]:11.2f}x {peaks[name]:9.0f}")
    which = 0 if setup.device == "cuda" else 1
    misa_step = medians["+ FSD + SEPA"][which]
    costs = {
        "teacher forward": teacher[which],
        "FSD": medians["+ FSD"][which] - base[which] - teacher[which],
        "SEPA": medians["+ SEPA"][which] - base[which] - teacher[which],
    }
    print(f"\nof MISA's step ({'wall' if which == 0 else 'CPU time'}), forward and backward:")
    for name, cost in costs.items():
        print(f"  {name:<20} {cost:8.0f} ms {cost / misa_step:7.1%}")
    print("\nparts of one profiled step's forward pass (the profiler slows small operations down):")
    for name, took in inside.items():
        print(f"  {name:<20} {took:8.1f} ms")


def profile(row: str, setup: Setup, *, batch: int | None = None, smoke: bool = False) -> None:
    """Measure a row and print the report. batch: replaces the row's; smoke: small images and networks.

    Raises UserError: a row without FSD or SEPA, or a missing CUDA device.
    """
    if setup.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device; leave --device out, or see `misa doctor`.")
    experiment = find_row(row).smoke() if smoke else find_row(row)
    experiment = experiment.but(schedule={"batch": batch}) if batch else experiment
    with tempfile.TemporaryDirectory() as folder:
        steps = build(experiment, setup, Path(folder))
        images = steps["box baseline"].batch["inputs"]
        print(
            f"{row}: {counted(len(images), 'image')}, the first {tuple(images[0].shape[-2:])}, {setup.device}, "
            f"{counted(torch.get_num_threads(), 'thread')}, medians of {counted(setup.steps, 'step')} in turn, "
            f"torch {torch.__version__}"
        )
        report(steps, setup)


def peak_memory(task: Callable[[], object]) -> float:
    """Peak growth of the process's memory in MB while the task runs (Linux)."""
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    # The allocator keeps memory freed by earlier work, whose reuse would not count as growth.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before, peak, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    task()
    done.set()
    watcher.join()
    return peak[0] - before
