"""GPU validation in one command: correctness checks, timings, trainings, and one report.

    python -m benchmarks.gpu                          # into runs/gpu: gpu.md to read, gpu.json for `misa estimate`
    python -m benchmarks.gpu --parts checks stages    # only these parts, such as after a fix
    python -m benchmarks.gpu --device cpu --small     # a small version, on a machine without a GPU

| part | reports |
|---|---|
| checks | trees, passes, windows, losses, gradients against the CPU; kernels against torch operations; device waits |
| stages | ms of every stage of SEPA, of projection and FSD and of the whole loss, host and device, peak MiB |
| objectives | ms forward and backward of the other papers' objectives |
| steps | whole steps by form and part in float32 and bfloat16, memory, synchronizations; a profiler trace |
| utilization | the share of the card's peak performance that is reached |
| trained | the scores of the demo's MISA |
| resumed | a training that is stopped and resumed, against an uninterrupted one |
| endurance | minutes at the paper's image size without NaN, stopped and resumed; use of the GPU |
| tests, benchmarks, sanitizer | the tests on both devices, the other benchmarks, the memory checker |

The project's goals are reported as met or missed. A part that fails comes first in the report and makes the exit status
1; the other parts still run.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_runs import Place, endurance, resumed, run_benchmarks, sanitizer, tested
from benchmarks.stages import OBJECTIVES, Problem, drawn, fsd, objective_loss, sepa, stages
from misa.engine.reports.profile import Setup, build, memory, named_parts, parts, timed
from misa.engine.training.estimate import GPUS, measure
from misa.engine.training.train import train
from misa.losses.projection import projection_loss
from misa.machine import Machine
from misa.ops.affinity import Sigma
from misa.ops.backends.choice import use
from misa.ops.guides import GlobalForm
from misa.rows import find_row

CLOSE = 1e-3  # relative tolerance of losses, gradients, pseudo masks: edges of equal length may come in another order
EDGES = 20  # tree edges that may differ for that reason
PRECISIONS = ("float32", "bfloat16")
SEPA_GOAL, STEP_GOAL = 10.0, 1.15  # ms per image; ratio to plain SOLOv2 plus the teacher's forward pass
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH (Device -> Pageable)")


def about(place: Place) -> dict[str, Any]:
    """Return card, driver and versions."""
    card, driver, gigabytes = platform.processor() or platform.machine(), "none", 0.0
    if place.device == "cuda":
        card = torch.cuda.get_device_name()
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in ("misa", "torch", "triton", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    here: dict[str, Any] = {"card": card, "memory GB": gigabytes, "driver": driver, "device": place.device}
    return here | {"small": place.small, "versions": versions}


def problem(place: Place, n: int, categories: int) -> Problem:
    """Return a problem with n masks per image, on the CPU."""
    return drawn(n, categories, (24, 32) if place.small else (200, 304), 4 if place.small else 256)


def pulled(given: Problem, form: GlobalForm = "sum") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return MISA's losses of a problem, and their gradients in the mask logits and the student's feature."""
    logits, student = given.logits.clone().requires_grad_(), given.student.clone().requires_grad_()
    masks = logits.sigmoid()
    losses = sepa(given, masks, form)
    losses |= {"projection": projection_loss(masks, given.boxes).sum(), "FSD": fsd(given, student)}
    torch.stack(list(losses.values())).sum().backward()
    assert logits.grad is not None
    assert student.grad is not None
    return losses, {"gradient of masks": logits.grad, "gradient of I": student.grad}


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative L2 difference of each tensor from its counterpart."""
    found = {}
    for name, value in one.items():
        here, there = value.detach().double().cpu(), two[name].detach().double().cpu()
        found[name] = float((here - there).norm() / here.norm().clamp(min=1e-12))
    return found


def checks(place: Place) -> dict[str, Any]:
    """Compare the device with the CPU by form, kernels with torch operations, two runs bitwise; list device waits."""
    found, wrong = dict[str, Any](), list[str]()
    here = problem(place, 2 if place.small else 8, 3)
    there = here.to(place.device)
    forms: tuple[tuple[str, GlobalForm, Sigma], ...] = (
        ("sum", "sum", "image"),
        ("embedding", "embedding", "image"),
        ("product", "product", "image"),
        ("sum, a spread for each window", "sum", "window"),
    )
    for title, form, sigma in forms:
        one, two = ({name: run() for name, run in stages(x, form, sigma).items()} for x in (here, there))
        kept = ("pass 1", "pass 2", "window", "projection", "FSD")
        row: dict[str, Any] = apart({name: one[name] for name in kept}, two)
        ours, theirs = (set(enumerate_edges(x["trees"].edge)) for x in (one, two))
        row |= apart(*(losses | gradients for losses, gradients in (pulled(here, form), pulled(there, form))))
        wrong += [f"{title}, {name}: {value:.1e} from the CPU" for name, value in row.items() if not value < CLOSE]
        row["edges that differ"] = len(ours - theirs)
        wrong += (
            [f"{title}: {row['edges that differ']} edges of the trees differ"]
            if row["edges that differ"] > EDGES
            else []
        )
        found[title] = row
    with use("torch"):
        plain = pulled(there)
    first, second = pulled(there), pulled(there)
    found["kernels to torch operations"] = apart(plain[0] | plain[1], first[0] | first[1])
    wrong += [f"kernels, {k}: {v:.1e}" for k, v in found["kernels to torch operations"].items() if not v < CLOSE]
    found["bitwise equal in two runs"] = {name: bool(torch.equal(first[0][name], second[0][name])) for name in first[0]}
    found["synchronisations of losses and gradients"] = waits(lambda: pulled(there), place.device)
    if found["synchronisations of losses and gradients"]:
        wrong.append("the losses synchronise with the device")
    return found | {"wrong": wrong}


def enumerate_edges(edge: Tensor) -> Iterable[tuple[int, int]]:
    """Yield (tree, edge) of every edge."""
    return ((tree, number) for tree, row in enumerate(edge.tolist()) for number in row)


def sizes(place: Place) -> Iterable[tuple[str, Problem]]:
    """Yield named problems of several numbers of masks and categories per image."""
    for n, categories in ((2, 1),) if place.small else ((8, 3), (64, 3), (64, 8)):
        yield f"{n} masks, {categories} categories", problem(place, n, categories).to(place.device)


def staged(place: Place) -> dict[str, Any]:
    """Return ms of a batch's forward stages, host time, ms per image of the whole loss with backward, and peak MiB."""
    found = dict[str, Any]()
    rounds = 3 if place.small else 12
    for backend in ("triton", "torch") if place.device == "cuda" else ("auto",):
        for name, given in sizes(place):
            with use(backend), torch.no_grad():
                spent: dict[str, list[float]] = {}
                for _ in range(rounds):
                    for stage, run in stages(given).items():
                        spent.setdefault(stage, []).append(timed(run, place.device)[0])
            with use(backend):
                whole: dict[str, Callable[[], Any]] = {
                    "SEPA, ms an image": partial(sepa, given, given.logits.sigmoid()),
                    "all of MISA's losses, forward and backward, ms an image": partial(pulled, given),
                }
                row: dict[str, float | None] = {stage: statistics.median(times[2:]) for stage, times in spent.items()}
                row["host"] = host_time(given, place)
                for title, form in whole.items():
                    row[title] = statistics.median(timed(form, place.device)[0] for _ in range(rounds)) / 2
                row |= {"peak MiB": peak(partial(pulled, given), place)}
            found[f"{backend}, {name}"] = row
    best = next((row for name, row in found.items() if name.startswith("triton, 64 masks, 8")), None)
    return found | {
        "goals": [
            goal("SEPA of 64 masks and 8 categories", best and best["SEPA, ms an image"], SEPA_GOAL, "ms an image")
        ]
    }


def host_time(given: Problem, place: Place) -> float:
    """Return ms until the last launch of the stages; if close to their sum, launches are the bottleneck."""
    if place.device == "cuda":
        torch.cuda.synchronize()

    def launch() -> None:
        for run in stages(given).values():
            run()

    with torch.no_grad():
        spent = timed(launch, "cpu")[0]
    if place.device == "cuda":
        torch.cuda.synchronize()
    return spent


def peak(run: Callable[[], Any], place: Place) -> float | None:
    """Return the peak MiB allocated by a run; None on a CPU."""
    if place.device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def others(place: Place) -> dict[str, Any]:
    """Return ms per image of the other papers' objectives, forward and backward, at 8 masks per image."""
    given, found = problem(place, 2 if place.small else 8, 3).to(place.device), {}
    for name in OBJECTIVES:
        own = Problem(**{**given.__dict__, "logits": given.logits.clone().requires_grad_()})
        both = partial(forward_and_backward, objective_loss(own, name))
        spent = [timed(both, place.device)[0] for _ in range(3 if place.small else 8)]
        found[name] = statistics.median(spent[1:]) / 2
    return {"ms an image": found}


def forward_and_backward(loss: Callable[[], Tensor]) -> None:
    """Compute a loss and its gradient."""
    loss().backward()


def waits(step: Callable[[], Any], device: str) -> list[str]:
    """Return file and line of every synchronization with the device in a step."""
    if device != "cuda":
        return []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [w for w in seen if "synchroniz" in str(w.message) and "prototype" not in str(w.message)]
    return [f"{w.filename.rpartition('site-packages/')[2]}:{w.lineno}" for w in said]


def traced(step: Callable[[], Any], place: Place, name: str) -> dict[str, Any]:
    """Profile a step: write the trace and its table; return the launches and the synchronizations within the step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if place.device == "cuda" else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Profiler clears events.*")
        with named_parts(), torch.profiler.profile(activities=activities) as trace:
            with torch.profiler.record_function("misa: step"):
                step()
            if place.device == "cuda":
                torch.cuda.synchronize()
    place.out.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(place.out / f"{name}.json.gz"))
    key = "self_device_time_total" if place.device == "cuda" else "self_cpu_time_total"
    table = trace.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=80)
    (place.out / f"{name}.txt").write_text(table)
    events = [(event.name, event.time_range.start) for event in trace.events()]
    ends = [event.time_range.end for event in trace.events() if event.name == "misa: step"]
    return {
        "file": f"{name}.json.gz",
        "launches": sum("LaunchKernel" in event for event, _ in events),
        "synchronisations in the trace": waiting(events, min(ends)),
    }


def waiting(events: Iterable[tuple[str, float]], end: float) -> list[str]:
    """Return the synchronizing events among (name, start) before the step's end; later ones are the profiler's."""
    return sorted(name for name, start in events if start < end and any(name.startswith(word) for word in WAITING))


def steps(place: Place) -> dict[str, Any]:
    """Time whole steps by form, interleaved; profile MISA's; compare it with mmdet from masks plus the teacher."""
    found, wrong, goals = dict[str, Any](), list[str](), list[str]()
    for precision in PRECISIONS:
        row = find_row(f"{place.rows()}:{precision}")
        row = row.smoke() if place.small else row
        with tempfile.TemporaryDirectory() as folder:
            forms = build(row, Setup(place.paper_root, place.device, 1), Path(folder))
            whole = forms["+ FSD + SEPA"]
            images = whole.model.data_preprocessor(whole.batch, True)["inputs"]
            prior = partial(whole.model.teacher.prior, images)
            every: dict[str, Callable[[], Any]] = {**forms, "teacher": prior}
            spent: dict[str, list[float]] = {name: [] for name in every}
            for turn in range(2 if place.small else 13):
                for name, form in every.items():
                    took = timed(form, place.device)[0]
                    if turn >= (1 if place.small else 3):
                        spent[name].append(took)
            medians = {name: statistics.median(times) for name, times in spent.items()}
            ratio = medians["+ FSD + SEPA"] / (medians["mmdet, from masks"] + medians["teacher"])
            found[precision] = {
                "images": [tuple(image.shape) for image in images],
                "ms": medians,
                "to plain + teacher": ratio,
                "peak MiB": {name: memory(form, place.device) for name, form in forms.items()},
                "parts, ms": parts(whole, place.device),
                "synchronisations": waits(whole, place.device),
                "trace": traced(whole, place, f"trace-{precision}"),
            }
        seen = found[precision]["synchronisations"] + found[precision]["trace"]["synchronisations in the trace"]
        wrong += [f"a step in {precision} synchronises: {', '.join(seen)}"] if seen else []
        measured = None if place.device == "cpu" else ratio
        goals.append(goal(f"a step in {precision}, to plain + teacher", measured, STEP_GOAL))
    return found | {"goals": goals, "wrong": wrong}


def goal(what: str, value: float | None, limit: float, unit: str = "") -> str:
    """Return a sentence: the goal is met, missed or not measured."""
    at_most = f"{what}: {limit:g} {unit}".rstrip() + " at most"
    if value is None:
        return f"{at_most}: not measured"
    return f"{at_most}: {value:.2f}, {'met' if value <= limit else 'MISSED'}"


def utilization(place: Place) -> dict[str, float]:
    """Return the share of the card's peak FLOPS in a step of Table 1's MISA, by precision; empty for unknown cards."""
    sheets = [sheet for name, sheet in GPUS.items() if name in about(place)["card"].replace(" ", "").upper()]
    found = {}
    for precision in PRECISIONS if sheets else ():
        row = find_row("table1_coco:misa_r50").but(schedule={"precision": precision})
        step = measure(row, sides=(480, 960), device=place.device).large
        best = sheets[0].float32 if precision == "float32" else sheets[0].half
        found[precision] = step.flops / (step.seconds * 1e12 * best)
    return found


def demo(place: Place) -> dict[str, Any]:
    """Train the demo's MISA on the device and return its scores."""
    row = find_row("demo:misa")
    row = row.smoke() if place.small else row
    machine = Machine(gpus=1 if place.device == "cuda" else 0)
    with tempfile.TemporaryDirectory() as folder:
        run = train(row, data_root=place.data_root, work_dir=Path(folder) / "demo", row="demo:misa", machine=machine)
    assert run.metrics is not None
    return dict(run.metrics["segm"])


PARTS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "checks": checks,
    "stages": staged,
    "objectives": others,
    "steps": steps,
    "utilization": utilization,
    "trained": demo,
    "resumed": resumed,
    "endurance": endurance,
    "tests": tested,
    "benchmarks": run_benchmarks,
    "sanitizer": sanitizer,
}


def written(values: Any, depth: int = 0) -> list[str]:
    """Format nested values as a markdown list."""
    if not isinstance(values, dict):
        return [f"{'  ' * depth}- {each}" for each in values] if values else [f"{'  ' * depth}- none"]
    lines = []
    for name, value in values.items():
        if isinstance(value, dict | list):
            lines += [f"{'  ' * depth}- {name}", *written(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}- {name}: {f'{value:.4g}' if isinstance(value, float) else value}")
    return lines


def page(report: dict[str, Any]) -> str:
    """Format the report as markdown: failures first, then goals."""
    lines = [f"# {report['card']}", ""]
    if report["device"] == "cpu":
        lines += ["These are a CPU's numbers: they show that every part runs, and say nothing about a GPU.", ""]
    if report["small"]:
        lines += ["Small problems and networks: no measurement.", ""]
    lines += ["## Failed", "", *(written(report["failed"]) if report["failed"] else ["Nothing."]), ""]
    lines += ["## Goals", "", *written(report["goals"]), ""]
    rest = {name: value for name, value in report.items() if name not in (*PARTS, "failed", "goals")}
    lines += ["## Machine", "", *written(rest), ""]
    for name in PARTS:
        if name in report or name in report["failed"]:
            body = written(report[name]) if name in report else ["No result: it failed, see above."]
            lines += [f"## {name}", "", *body, ""]
    return "\n".join(lines)


def reported(place: Place, names: Sequence[str]) -> dict[str, Any]:
    """Run the parts; `failed` has a sentence for each part that raised or found an error, `goals` all goals."""
    report, failed, goals = about(place), dict[str, str](), list[str]()
    for name in names:
        print(f"{name} …", flush=True)
        try:
            found = PARTS[name](place)
        except Exception as error:  # printed and reported; the other parts still run, as GPU time is scarce
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        if wrong := found.pop("wrong", []):
            failed[name] = "; ".join(wrong)
        goals += found.pop("goals", [])
        report[name] = found
    return report | {"failed": failed, "goals": goals}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and write the report; return 0 on success, 1 if a part failed, 2 without the device."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small images and networks: does it run")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the report (runs/gpu)")
    parser.add_argument("--data-root", default="datasets/demo", help="where the embedded data goes (datasets/demo)")
    parser.add_argument("--coco", help="a folder in COCO's layout for the paper's sizes (default: embedded scenes)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training in the paper's sizes (5)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no CUDA device; run it on a machine with one, or give --device cpu --small.")
        return 2
    place = Place(options.device, options.small, options.data_root, options.out, options.coco, options.minutes)
    report = reported(place, options.parts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    text = page(report)
    (options.out / "gpu.md").write_text(text)
    print(text)
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
