"""Subprocesses of `benchmarks.gpu`: trainings that are stopped and resumed, tests, other benchmarks."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Rows at the paper's image size, from scratch: embedded scenes resized to a short side of 800, or a COCO folder.
ROWS = """
from experiments import table1_coco, teacher
from misa.experiment import Network
from misa.rows import find_row

DATA = {data}
SIZES = {{"short_sides": (800,)}}
SCHEDULE = {{"batch": 2, "epochs": 400, "warmup": 20, "milestones": (300,)}}
TEACHER = teacher.COCO.but(
    network=Network(pretrained=False), augmentation=SIZES, schedule=SCHEDULE | {{"epochs": 1}}, limit={limit},
    **DATA
)
MISA = table1_coco.MISA.but(
    network={{"pretrained": False}}, augmentation=SIZES, schedule=SCHEDULE, affinity={{"window": 5}},
    teacher=f"{{__file__}}:teacher", **DATA,
)
ROWS = {{
    "teacher": TEACHER,
    "float32": MISA,
    "bfloat16": MISA.but(schedule={{"precision": "bfloat16"}}),
    "short": find_row("demo:box"){short}.but(schedule={{"epochs": 6}}),
    "long": {long},
}}
"""
SMALL_LONG = 'find_row("demo:box").smoke().but(schedule={"epochs": 30})'


@dataclass(frozen=True)
class Place:
    """Options of all parts: device ("cuda" or "cpu"), small or not, folders of data and report, minutes of a run."""

    device: str
    small: bool
    data_root: str
    out: Path
    coco: str | None = None
    minutes: float = 5.0

    @property
    def paper_root(self) -> str:
        """The data folder of the rows at the paper's image size."""
        return self.coco or self.data_root

    def rows(self) -> Path:
        """Write the file of rows and return its path."""
        data = '{"data": "coco"}' if self.coco else '{"data": "demo", "scenes": (("train", 100), ("val", 4))}'
        text = ROWS.format(
            data=data,
            limit=100 if self.coco else None,  # the teacher need not be good, and an epoch of COCO takes hours
            short=".smoke()" if self.small else "",
            long=SMALL_LONG if self.small else 'MISA.but(schedule={"precision": "bfloat16"})',
        )
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out.resolve() / "rows.py"
        path.write_text(text)
        return path


def losses_of(folder: Path) -> list[dict[str, float]]:
    """Return the complete lines of a run's losses.jsonl so far."""
    path = folder / "losses.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def trained(
    place: Place, row: str, folder: Path, *, stop_after: tuple[int, float] | None = None, root: str | None = None
) -> dict[str, Any]:
    """Run `misa train`, or stop it by SIGTERM after (steps, seconds); return exit status, time and last lines."""
    command = [sys.executable, "-m", "misa", "train", f"{place.rows()}:{row}", "--work-dir", str(folder)]
    command += ["--data-root", root or place.data_root, "--gpus", "1" if place.device == "cuda" else "0"]
    log, started = folder.with_name(f"{folder.name}.log"), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        while stop_after is not None and process.poll() is None:
            time.sleep(0.2)
            steps, seconds = stop_after
            if time.monotonic() - started >= seconds and len(losses_of(folder)) >= steps:
                process.send_signal(signal.SIGTERM)
                break
        status = process.wait()
    return {"status": status, "seconds": time.monotonic() - started, "says": log.read_text().splitlines()[-3:]}


def difference(one: Sequence[dict[str, float]], two: Sequence[dict[str, float]]) -> float:
    """Return the largest relative difference of a step's loss; infinite if the steps differ."""
    if [row["iter"] for row in one] != [row["iter"] for row in two] or not one:
        return math.inf
    return max(abs(a["loss"] - b["loss"]) / max(abs(a["loss"]), 1e-12) for a, b in zip(one, two, strict=True))


def resumed(place: Place) -> dict[str, Any]:
    """Compare a short training that is stopped by SIGTERM and resumed with an uninterrupted one, step by step.

    They must be bitwise equal on the CPU. On CUDA the order of sums varies, so two uninterrupted runs differ too; the
    resumed one may differ by ten times as much plus 1e-3.
    """
    folder, first = place.out / "resumed", 2 if place.small else 60
    shutil.rmtree(folder, ignore_errors=True)
    runs = {"uninterrupted": trained(place, "short", folder / "whole")}
    if place.device == "cuda":
        runs["uninterrupted again"] = trained(place, "short", folder / "again")
    runs["stopped"] = trained(place, "short", folder / "parts", stop_after=(first, 0))
    stopped = len(losses_of(folder / "parts"))
    runs["resumed"] = trained(place, "short", folder / "parts")
    whole = losses_of(folder / "whole")
    found: dict[str, Any] = {
        "steps": len(whole),
        "stopped after": stopped,
        "status": {k: v["status"] for k, v in runs.items()},
    }
    found["difference"] = difference(whole, losses_of(folder / "parts"))
    noise = difference(whole, losses_of(folder / "again")) if place.device == "cuda" else 0.0
    found["difference of two uninterrupted runs"] = noise
    wrong = [
        f"{name} ended with {run['status']}: {run['says']}"
        for name, run in runs.items()
        if run["status"] not in (0, 143)
    ]
    if runs["stopped"]["status"] != 143 or not 0 < stopped < len(whole):
        wrong.append(
            f"it was not stopped in the middle: status {runs['stopped']['status']}, {stopped} of {len(whole)} steps"
        )
    allowed = 10 * noise + 1e-3 if place.device == "cuda" else 0.0
    if not found["difference"] <= allowed:
        wrong.append(f"the resumed run differs by {found['difference']:.1e} of a loss, {allowed:.1e} are allowed")
    return found | {"wrong": wrong}


def endurance(place: Place) -> dict[str, Any]:
    """Train teacher and student for minutes at the paper's image size, stop by SIGTERM, and resume for a minute."""
    folder = place.out / "endurance"
    shutil.rmtree(folder, ignore_errors=True)
    seconds = 0.0 if place.small else 60 * place.minutes
    root = place.data_root if place.small else place.paper_root
    usage = _usage(place, folder.with_name("usage.txt"))
    try:
        first = trained(place, "long", folder / "run", stop_after=(4, seconds), root=root)
    finally:
        if usage is not None:
            usage.terminate()
            usage.wait()
    before = losses_of(folder / "run")
    checkpoints = sorted(path.name for path in (folder / "run" / "checkpoints").glob("*.pth"))
    again = trained(
        place, "long", folder / "run", stop_after=(len(before) + 4, 0.0 if place.small else 60.0), root=root
    )
    rows, log = losses_of(folder / "run"), (folder / "run" / "log.txt").read_text()
    wrong = []
    if [row["iter"] for row in rows] != list(range(len(rows))) or not len(rows) > len(before) > 0:
        wrong.append(f"steps are missing or double: {len(before)} before, {len(rows)} in the end")
    if not all(math.isfinite(value) for row in rows for value in row.values()):
        wrong.append("a loss is not finite")
    if (first["status"], again["status"]) != (143, 143) or not checkpoints or "resuming at epoch" not in log:
        wrong.append(f"it did not save and resume: {first}, {again}, checkpoints {checkpoints}")
    shown = [line.split() for line in log.splitlines() if re.search(r"epoch \d+/\d+ step \d+/", line)]
    found = {"steps": len(rows), "stopped after": len(before), "seconds": first["seconds"], "checkpoints": checkpoints}
    found["s a step"] = next((float(words[-2]) for words in reversed(shown) if ":" in words[-1]), None)
    found |= {"usage": _medians(folder.with_name("usage.txt"))} if usage is not None else {}
    return found | {"wrong": wrong}


def _usage(place: Place, path: Path) -> "subprocess.Popen[bytes] | None":
    """Start nvidia-smi to sample the GPU every two seconds; None without it."""
    if place.device != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-l", "2"]
    return subprocess.Popen(query, stdout=path.open("wb"))


def _medians(path: Path) -> dict[str, float]:
    rows = [tuple(map(float, line.split(","))) for line in path.read_text().splitlines() if line.count(",") == 1]
    columns = [sorted(column)[len(column) // 2] for column in zip(*rows, strict=True)]
    return dict(zip(("GPU %, median", "memory MB, median"), columns, strict=False))


def ran(command: Sequence[str], path: Path, seconds: float) -> tuple[int, str]:
    """Run a command; return its status, 124 on timeout, and its output, which is also written to a file."""
    with path.open("w") as file:
        try:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = 124
    return status, path.read_text()


TESTED = ("ops", "losses", "objectives", "models", "mmcv_ext", "engine/training/test_health.py")


def tested(place: Place) -> dict[str, Any]:
    """Run the tests of all code that uses a device; tests with a device parameter run on the CPU and on CUDA."""
    folder = Path(__file__).parents[1] / "tests"
    if not folder.is_dir():
        return {"wrong": [f"there are no tests at {folder}; run it in a checkout"]}
    chosen = ["losses/test_boxes.py"] if place.small else [*TESTED, "engine/training/test_precision.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--timeout", "300"]
    command += [str(folder / name) for name in chosen if (folder / name).exists()]
    status, text = ran(command, place.out / "tests.txt", 1200)
    last = next((line for line in reversed(text.splitlines()) if " in " in line), "nothing")
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"summary": last.strip("= "), "failed": failed, "wrong": [f"pytest ended with {status}"] if status else []}


def run_benchmarks(place: Place) -> dict[str, Any]:
    """Run the project's other benchmarks; their tables are written beside the report."""
    size = ["--size", "20", "30", "--channels", "8", "--rounds", "1"] if place.small else ["--batch", "2"]
    frequency = [sys.executable, "-m", "benchmarks.frequency", "--device", place.device]
    commands = {"frequency": frequency + size, "radii": [*frequency, "--radii", *size]}
    if place.coco:
        quick = ["--quick"] if place.small else []
        propagation = [sys.executable, "-m", "benchmarks.propagation", "--device", place.device, "--data", place.coco]
        commands["propagation"] = propagation + quick
    found, wrong = dict[str, Any](), []
    for name, command in commands.items():
        status, text = ran(command, place.out / f"{name}.txt", 600)
        found[name] = text.splitlines()[-12:]
        wrong += [f"benchmarks.{name} ended with {status}"] if status else []
    if not place.coco:
        found["propagation"] = "not run: it takes real images, give --coco FOLDER"
    return found | {"wrong": wrong}


def sanitizer(place: Place) -> dict[str, Any]:
    """Run the kernels' tests under compute-sanitizer's memory check, if it is installed."""
    tool = shutil.which("compute-sanitizer")
    if place.device != "cuda" or tool is None:
        return {"memory check": "not run: it takes a GPU and compute-sanitizer of the CUDA toolkit"}
    tests = Path(__file__).parents[1] / "tests" / "ops" / "test_cuda_kernels.py"
    check = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow",
    ]
    status, text = ran([*check, "--timeout", "0", str(tests)], place.out / "sanitizer.txt", 600)
    wrong = [f"the memory check ended with {status}"] if status else []
    return {"memory check": text.splitlines()[-3:], "wrong": wrong}
