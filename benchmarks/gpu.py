"""One command for a machine with a GPU: checks, measures, trains, and writes one report.

    python -m benchmarks.gpu                          # into runs/gpu: gpu.md to read, gpu.json for `misa estimate`
    python -m benchmarks.gpu --device cpu --small     # the same, small, on a machine without one

Checked: losses and gradients of the pairwise loss against the CPU's loops, and what waits for the device in a step.
Measured: the pairwise loss, whole steps by form and part in float32 and bfloat16, memory, and the share of the card's
peak that is reached. Trained: the demo's MISA, scored. A part that fails is reported, the others go on; status 1 then.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from misa.engine.reports.profile import Setup, build, memory, parts, timed
from misa.engine.training.estimate import GPUS, measure
from misa.engine.training.train import train
from misa.experiment import Affinity
from misa.losses.inputs import SemanticPrior
from misa.losses.pairwise import pairwise_loss
from misa.machine import Machine
from misa.rows import find_row

CLOSE = 1e-3  # of a loss and of a gradient's norm: edges of equal length may be taken in another order
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Place:
    """Where all of it runs: "cuda" or "cpu", small or not, and the data's folder."""

    device: str
    small: bool
    data_root: str


def about(place: Place) -> dict[str, Any]:
    """Card, driver and versions."""
    card, driver = platform.processor() or platform.machine(), ""
    if place.device == "cuda":
        card = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    versions = {"python": platform.python_version()}
    for name in ("misa", "torch", "triton", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"card": card, "driver": driver, "device": place.device, "small": place.small, "versions": versions}


def problem(place: Place, n: int, categories: int) -> tuple[Tensor, ...]:
    """Masks, boxes, images, S and K of a batch of two, n masks an image: smooth, from a seed, on the CPU."""
    rng = torch.Generator().manual_seed(0)
    h, w, d = (12, 16, 4) if place.small else (200, 304, 256)

    def smooth(*shape: int) -> Tensor:
        coarse = torch.randn(*shape, h // 4, w // 4, generator=rng)
        return torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear")

    masks, images, s = smooth(1, 2 * n)[0].sigmoid(), smooth(2, 3), smooth(2, d).relu()
    boxes = torch.zeros(2 * n, h, w, dtype=torch.bool)
    for i, box in enumerate(boxes):
        top, left = i * 7 % (h // 2), i * 5 % (w // 2)
        box[top : top + h // 3, left : left + w // 3] = True
    return masks, boxes, images, s, torch.randn(categories, d, generator=rng)


def pulled(tensors: Sequence[Tensor], affinity: Affinity) -> dict[str, Tensor]:
    """The pairwise loss of a `problem`."""
    masks, boxes, images, s, k = tensors
    n = len(masks) // 2
    where, labels = torch.tensor([0] * n + [1] * n), torch.arange(2 * n) % len(k)
    return pairwise_loss(masks, boxes, images, where, affinity=affinity, labels=labels, prior=SemanticPrior(s, k))


def checks(place: Place) -> dict[str, Any]:
    """By form how far losses and gradients are from the CPU's, relative; the largest is to be below CLOSE."""
    found: dict[str, Any] = {}
    for form in ("sum", "product"):
        affinity = Affinity(saliency=True, global_form=form, local_form=form)
        seen = []
        for device in ("cpu", place.device):
            tensors = [each.to(device) for each in problem(place, 2 if place.small else 8, 2)]
            masks = tensors[0].requires_grad_()
            losses = pulled(tensors, affinity)
            torch.stack(list(losses.values())).sum().backward()
            assert masks.grad is not None
            seen.append(({name: loss.item() for name, loss in losses.items()}, masks.grad.cpu()))
        (ours, gradient), (theirs, other) = seen
        found[form] = {name: abs(theirs[name] - loss) / max(abs(loss), 1e-12) for name, loss in ours.items()}
        found[form]["gradient"] = float((gradient - other).norm() / gradient.norm().clamp(min=1e-12))
    worst = max(value for row in found.values() for value in row.values())
    if not worst < CLOSE:
        raise AssertionError(f"{place.device} differs from the CPU by {worst:.1e} of a loss or gradient: {found}")
    return found


def losses(place: Place) -> dict[str, Any]:
    """ms an image of the pairwise loss, forward, by masks an image and categories, and its peak MB."""
    found = {}
    for n, categories in ((2, 1),) if place.small else ((8, 3), (64, 3), (64, 8)):
        tensors = [each.to(place.device) for each in problem(place, n, categories)]

        def once(tensors: list[Tensor] = tensors) -> None:
            pulled(tensors, Affinity(saliency=True))

        spent = [timed(once, place.device)[0] for _ in range(3 if place.small else 13)][2:]
        row = {"ms an image": statistics.median(spent) / 2}
        if place.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            once()
            row["peak MB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        found[f"{n} masks, {categories} categories"] = row
    return found


def waits(step: Callable[[], None], device: str) -> list[str]:
    """File and line of whatever waits for the device in a step."""
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


def steps(place: Place) -> dict[str, Any]:
    """Whole steps by form, in turn; parts, memory and waits of MISA's; and MISA against mask-supervised + teacher."""
    found = {}
    for precision in PRECISIONS:
        row = find_row("demo:misa").but(schedule={"precision": precision})
        row = row.smoke() if place.small else row
        with tempfile.TemporaryDirectory() as folder:
            forms = build(row, Setup(place.data_root, place.device, 1), Path(folder))
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
            found[precision] = {
                "ms": medians,
                "to plain + teacher": medians["+ FSD + SEPA"] / (medians["mmdet, from masks"] + medians["teacher"]),
                "peak MB": {name: memory(form, place.device) for name, form in forms.items()},
                "parts, ms": parts(whole, place.device),
                "waits": waits(whole, place.device),
            }
    return found


def utilization(place: Place) -> dict[str, float]:
    """The share of the card's peak that a step of Table 1's MISA reaches, by precision; none for an unknown card."""
    sheets = [sheet for name, sheet in GPUS.items() if name in about(place)["card"].replace(" ", "").upper()]
    found = {}
    for precision in PRECISIONS if sheets else ():
        row = find_row("table1_coco:misa_r50").but(schedule={"precision": precision})
        step = measure(row, sides=(480, 960), device=place.device).large
        peak = sheets[0].float32 if precision == "float32" else sheets[0].half
        found[precision] = step.flops / (step.seconds * 1e12 * peak)
    return found


def trained(place: Place) -> dict[str, Any]:
    """The scores of the demo's MISA, trained on the device."""
    row = find_row("demo:misa")
    row = row.smoke() if place.small else row
    machine = Machine(gpus=1 if place.device == "cuda" else 0)
    with tempfile.TemporaryDirectory() as folder:
        run = train(row, data_root=place.data_root, work_dir=Path(folder) / "demo", row="demo:misa", machine=machine)
    assert run.metrics is not None
    return dict(run.metrics["segm"])


PARTS: dict[str, Callable[[Place], Any]] = {
    "checks": checks,
    "losses": losses,
    "steps": steps,
    "utilization": utilization,
    "trained": trained,
}


def written(values: Any, depth: int = 0) -> list[str]:
    """Nested values as a markdown list."""
    if not isinstance(values, dict):
        return [f"{'  ' * depth}- {each}" for each in values] if values else [f"{'  ' * depth}- none"]
    lines = []
    for name, value in values.items():
        if isinstance(value, dict | list):
            lines += [f"{'  ' * depth}- {name}", *written(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}- {name}: {f'{value:.4g}' if isinstance(value, float) else value}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts and write the report; 0 where all went well, 1 where one failed, 2 without the device."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small images and networks: does it run")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the report (runs/gpu)")
    parser.add_argument("--data-root", default="datasets/demo", help="where the embedded data goes (datasets/demo)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no CUDA device; run it on a machine with one, or give --device cpu --small.")
        return 2
    place = Place(options.device, options.small, options.data_root)
    report, failed = about(place), {}
    for name in options.parts:
        print(f"{name} …", flush=True)
        try:
            report[name] = PARTS[name](place)
        except Exception as error:  # said at once and in the report; the card is lent for minutes, the rest goes on
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
    report["failed"] = failed
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    text = "\n".join([f"# {report['card']}", "", *written(report)]) + "\n"
    (options.out / "gpu.md").write_text(text)
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
