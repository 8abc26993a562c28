"""Profile time and memory of a training step by parts; misa/commands/profile.py describes the method."""

import ctypes
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from mmengine.runner import Runner
from tqdm.auto import tqdm

import misa.losses.distillation
import misa.ops.guides
from misa.data.check.annotations import has_masks
from misa.data.source import open_source
from misa.engine.training.config import run_config
from misa.engine.training.labels import prepare_labels
from misa.engine.training.runner import quiet_runner
from misa.engine.training.train import require_batch, require_precision, steps_of
from misa.errors import UserError, counted
from misa.experiment import Experiment
from misa.models.students.base import BoxSupervised, Clock
from misa.models.teacher.config import label_folder
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


FROM_MASKS = "mmdet, from masks"
WARM_UP = 2  # the first step of a training and one of its middle


def has_parts(row: Experiment) -> bool:
    """Whether a row has FSD and an affinity of more than color, so that it has the variants of `forms`."""
    if row.affinity is None or row.distillation is None or not row.teacher:
        return False
    return row.affinity.saliency or row.affinity.feature


def forms(row: Experiment) -> dict[str, Experiment]:
    """Variants of the row: mask-supervised, from boxes, with either prior, and with both."""
    colors = row.but(affinity={"saliency": False, "feature": False})
    return {
        FROM_MASKS: colors.but(supervision="mask", distillation=None, teacher=""),
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
    """A variant that trains repeatedly on one batch, as in the middle of a training: by then all terms have begun."""

    def __init__(self, row: Experiment, teacher: TeacherNetwork | None, setup: Setup, folder: Path) -> None:
        source = open_source(row, setup.data_root)
        require_batch(row, source)
        require_precision(row, setup.device)
        self.count, self.total = 0, max(steps_of(row, source.images), 2)
        row = row.but(network={"pretrained": False})  # the time does not depend on the weights
        labeled = label_folder(row, folder) is not None
        if labeled and row.supervision == "box":
            # Nor on the labels: filled boxes need no student and no GrabCut.
            row = row.but(semantic={"labels": "rectangles", "student": ""})
        self.runner: Runner = quiet_runner(run_config(row, source, folder=folder, seed=0))
        self.model: Any = self.runner.model.to(setup.device)
        self.model.init_weights()
        if row.teacher:
            assert teacher is not None
            self.model.attach(teacher)
        loader = Runner.build_dataloader(self.runner._train_dataloader, seed=0)
        if labeled:
            drawn = Runner.build_dataloader(self.runner._train_dataloader, seed=0)  # its sampler cannot be rewound
            images = [drawn.dataset.get_data_info(index)["img_id"] for index in next(iter(drawn.batch_sampler))]
            prepare_labels(row, source, folder, only=images)
        self.batch = next(iter(loader))
        self.optimizer = self.runner.build_optim_wrapper(self.runner.optim_wrapper)
        self.model.train()

    def __call__(self) -> None:
        """Run one step."""
        if isinstance(self.model, BoxSupervised):
            # The first step makes the EMA model.
            self.model.begin_step(Clock(self.total // 2 if self.count else 0, self.total))
        self.count += 1
        self.model.train_step(self.batch, self.optimizer)

    @property
    def images(self) -> str:
        """Number and padded size of the batch's images, in pixels."""
        height, width = (max(image.shape[k] for image in self.batch["inputs"]) for k in (-2, -1))
        return f"{len(self.batch['inputs'])} of {height} x {width}"


def build(row: Experiment, setup: Setup, folder: Path) -> dict[str, Step]:
    """Build every variant; the teacher has random weights, which does not affect the time."""
    torch.manual_seed(0)
    every = forms(row)
    source = open_source(row, setup.data_root)
    if not has_masks(source.train.annotations):
        print(f"{FROM_MASKS} is left out: the training images have no masks")
        del every[FROM_MASKS]
    teacher = untrained_teacher(row, source.classes)
    return {name: Step(form, teacher, setup, folder / str(i)) for i, (name, form) in enumerate(every.items())}


def build_each(rows: Mapping[str, Experiment], setup: Setup, folder: Path) -> dict[str, Step]:
    """Build the rows as they are; teachers have random weights."""
    steps: dict[str, Step] = {}
    for number, (name, row) in enumerate(rows.items()):
        torch.manual_seed(0)
        classes = open_source(row, setup.data_root).classes
        teacher = untrained_teacher(row, classes) if row.teacher else None
        steps[name] = Step(row, teacher, setup, folder / str(number))
    return steps


def timed(step: Callable[[], None], device: str) -> tuple[float, float]:
    """Wall-clock and CPU time of a step in ms."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def memory(step: Callable[[], None], device: str) -> float:
    """Peak memory of a step in MiB, beyond what is allocated between steps."""
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


class Cost(NamedTuple):
    """Medians of a step's wall-clock and CPU time in ms, and its peak memory in MiB."""

    wall: float
    cpu: float
    peak: float


def costs(steps: Mapping[str, Callable[[], None]], setup: Setup) -> dict[str, Cost]:
    """Run the steps in turn, twice to warm up, then `setup.steps` times; then each once for its memory."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    with tqdm(total=(setup.steps + WARM_UP + 1) * len(steps), desc="measuring", unit="step", leave=False) as bar:
        for turn in range(setup.steps + WARM_UP):
            for name, step in steps.items():
                spent = timed(step, setup.device)
                bar.update()
                if turn >= WARM_UP:
                    seen[name].append(spent)
        peaks = {}
        for name, step in steps.items():
            peaks[name] = memory(step, setup.device)
            bar.update()
    return {
        name: Cost(statistics.median(v[0] for v in values), statistics.median(v[1] for v in values), peaks[name])
        for name, values in seen.items()
    }


def print_costs(found: Mapping[str, Cost], against: str, heading: str, images: Mapping[str, str] | None = None) -> None:
    """Print the steps' costs, the ratio of their wall-clock times to that of `against`, and the images of each."""
    width = max(22, *map(len, found))
    last = "  images" if images else ""
    print(f"\n{'a whole step':<{width}} {'wall ms':>9} {'CPU ms':>9} {heading:>12} {'peak MiB':>9}{last}")
    for name, cost in found.items():
        ratio, last = cost.wall / found[against].wall, f"  {images[name]}" if images else ""
        print(f"{name:<{width}} {cost.wall:9.0f} {cost.cpu:9.0f} {ratio:11.2f}x {cost.peak:9.0f}{last}")


def report(steps: dict[str, Step], setup: Setup) -> None:
    """Measure the variants in turn and print the report."""
    whole = steps["+ FSD + SEPA"]
    images = whole.model.data_preprocessor(whole.batch, True)["inputs"]
    prior = "teacher forward"
    found = costs({**steps, prior: lambda: whole.model.teacher.prior(images)}, setup)
    inside = parts(whole, setup.device)
    teacher = found.pop(prior)
    print_costs(found, "box baseline", "to baseline")
    which = 0 if setup.device == "cuda" else 1
    base, misa_step = found["box baseline"][which], found["+ FSD + SEPA"][which]
    shares = {
        prior: teacher[which],
        "FSD": found["+ FSD"][which] - base - teacher[which],
        "SEPA": found["+ SEPA"][which] - base - teacher[which],
    }
    print(f"\nof MISA's step ({'wall' if which == 0 else 'CPU time'}), forward and backward:")
    for name, cost in shares.items():
        print(f"  {name:<20} {cost:8.0f} ms {cost / misa_step:7.1%}")
    print("\nparts of one profiled step's forward pass (the profiler slows small operations down):")
    for name, took in inside.items():
        print(f"  {name:<20} {took:8.1f} ms")


def profile(rows: Sequence[str], setup: Setup, *, batch: int | None = None, smoke: bool = False) -> None:
    """Measure rows and print the report: a row with FSD and SEPA by parts, several or another one as whole steps.

    batch: replaces the rows'; smoke: small images and networks.
    Raises UserError: a missing CUDA device, a batch of more images than there are, float16 on the CPU.
    """
    if setup.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device; leave --device out, or see `misa doctor`.")
    found = {name: find_row(name).smoke() if smoke else find_row(name) for name in rows}
    found = {name: row.but(schedule={"batch": batch}) if batch else row for name, row in found.items()}
    first = next(iter(found))
    by_parts = len(found) == 1 and has_parts(found[first])
    with tempfile.TemporaryDirectory() as folder:
        steps = build(found[first], setup, Path(folder)) if by_parts else build_each(found, setup, Path(folder))
        one = next(iter(steps.values()))
        print(
            f"{f'{first}: {one.images}' if by_parts else counted(len(found), 'row')}, {setup.device}, "
            f"{counted(torch.get_num_threads(), 'thread')}, medians of {counted(setup.steps, 'step')} in turn, "
            f"torch {torch.__version__}"
        )
        if by_parts:
            report(steps, setup)
        else:
            print_costs(costs(steps, setup), first, "to the first", {name: step.images for name, step in steps.items()})


def peak_memory(task: Callable[[], object]) -> float:
    """Peak growth of the process's memory in MiB while the task runs (Linux)."""
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
    try:
        task()
    finally:
        done.set()
        watcher.join()
    return peak[0] - before
