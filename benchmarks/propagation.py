"""Propagation: ours against a plain reference implementation and the published timings of the official code.

    python -m benchmarks.propagation                   # tables of time and memory, CPU (about six minutes)
    python -m benchmarks.propagation --quick           # smoke test: one small image, one round
    python -m benchmarks.propagation --device cuda     # the same work on a GPU, with a profiler trace

Both implementations run interleaved in one process: medians of wall time and of the process's CPU time, which varies
less on a busy machine. Real COCO images at stride 4 of 800 x 1333; masks are smoothed ground truth with smooth noise; n
above the number of objects repeats them with other noise. One table uses the masks of a SOLOv2 training step: an
object's mask once for every positive grid cell.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks import plain_propagation as plain
from misa.experiment import Affinity, Network
from misa.losses.pairwise import pairwise_loss
from misa.ops.boxes import positive_cells
from misa.ops.guides import Guides

# Published with the reference data of this project: APro's own host code and its local module, 2 threads of a
# 2-core CPU, median ms per image for tree + both global passes + local 5x5 x 20 steps. Quoted, not measured here.
OFFICIAL = {1: 202, 3: 434, 5: 732, 9: 1428, 13: 1964, 17: 2512, 24: 3408, 38: 5951}
OFFICIAL_GLOBAL = {3: 103, 5: 144, 9: 249, 13: 422, 17: 436, 24: 710}  # tree per mask + pass 1 + pass 2
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
TREE, REFINE, LOCAL = 0.01, 0.07, 0.15  # APro's bandwidths
STAGES = ("tree", "pass 1", "pass 2", "local")


@dataclass
class Work:
    """One image with n masks at stride 4."""

    name: int
    image: Tensor
    masks: Tensor
    boxes: Tensor
    labels: list[int]


def annotated(root: Path, name: int) -> tuple[Path, list[dict[str, Any]]]:
    """Return the file of image `name` of coco_mini and its objects."""
    for split in ("train2017", "val2017"):
        path = root / split / f"{name:012d}.jpg"
        if path.exists():
            break
    notes = json.loads((root / "annotations" / f"instances_{split}.json").read_text())["annotations"]
    return path, [note for note in notes if note["image_id"] == name and not note.get("iscrowd")]


def input_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Return width and height of the network input: resized as in training, padded to multiples of 32 pixels."""
    factor = min(short / min(size), short * 1333 / 800 / max(size))
    w, h = (int(side * factor / 32 + 0.999) * 32 for side in size)
    return w, h


def fired(root: Path, name: int, short: int) -> list[int]:
    """Return the object of every positive cell of an image in SOLOv2's training, level by level."""
    path, objects = annotated(root, name)
    with Image.open(path) as picture:
        size = picture.size
    w, h = input_size(size, short)
    corners = torch.tensor([note["bbox"] for note in objects])
    corners[:, 2:] += corners[:, :2]
    corners *= torch.tensor([w / size[0], h / size[1]]).repeat(2)
    levels = zip(Network.grids, Network.scale_ranges, strict=True)
    return torch.cat([positive_cells(corners, (h, w), grid, sizes)[0] for grid, sizes in levels]).tolist()


def load(root: Path, name: int, n: int | Sequence[int] | None, *, scale: float = 0.25, short: int = 800) -> Work:
    """Load image `name` of coco_mini as network input, at `scale`, with all its objects, n of them or those listed."""
    path, objects = annotated(root, name)
    picture = Image.open(path).convert("RGB")
    w, h = input_size(picture.size, short)
    pixels = torch.tensor(np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR)), dtype=torch.float32)
    pixels = ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
    image = interpolate(pixels[None], scale_factor=scale, mode="bilinear")[0].contiguous()
    chosen = range(len(objects)) if n is None else range(n) if isinstance(n, int) else n
    notes = [objects[i % len(objects)] for i in chosen]
    h, w = image.shape[1:]
    stretch = torch.tensor([w / picture.width, h / picture.height])
    rng = torch.Generator().manual_seed(name)
    masks, boxes = torch.zeros(len(notes), h, w), torch.zeros(len(notes), h, w)
    for i, note in enumerate(notes):
        canvas = Image.new("L", (w, h))
        for polygon in note["segmentation"]:
            points = (torch.tensor(polygon).view(-1, 2) * stretch).flatten().tolist()
            if len(points) >= 6:
                ImageDraw.Draw(canvas).polygon(points, fill=1)
        truth = torch.tensor(np.asarray(canvas), dtype=torch.float32)[None, None]
        soft = torch.nn.functional.avg_pool2d(truth, 7, 1, 3)[0, 0]
        noise = interpolate(torch.randn(1, 1, h // 8 + 1, w // 8 + 1, generator=rng), (h, w), mode="bilinear")[0, 0]
        masks[i] = torch.sigmoid(8 * soft - 4 + noise)
        x, y, bw, bh = (float(v) for v in note["bbox"])
        left, top = int(x * stretch[0]), int(y * stretch[1])
        boxes[i, top : math.ceil((y + bh) * stretch[1]) + 1, left : math.ceil((x + bw) * stretch[0]) + 1] = 1
    return Work(name, image, masks, boxes, [note["category_id"] for note in notes])


def semantic(work: Work, channels: int, categories: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return a smooth feature map, classifier rows and labels that cycle through `categories` over the masks."""
    rng = torch.Generator().manual_seed(1)
    h, w = work.image.shape[1:]
    coarse = torch.randn(1, channels, h // 4 + 1, w // 4 + 1, generator=rng)
    features = interpolate(coarse, (h, w), mode="bilinear").relu_()
    return features, torch.randn(categories, channels, generator=rng), [i % categories for i in range(len(work.masks))]


def ours(
    work: Work, sem: tuple[Tensor, Tensor, list[int]] | None, clock: Callable[[str], None]
) -> tuple[Tensor, Tensor]:
    """Compute both pseudo masks, stage by stage."""
    if sem is None:
        guides = Guides(work.image[None], [0] * len(work.masks))
    else:
        guides = Guides(work.image[None], [0] * len(work.masks), *sem, ("color", "saliency"), window=5)
    with torch.no_grad():
        trees = guides.trees()
        clock("tree")
        first = guides.along_trees(work.masks, trees, TREE)
        clock("pass 1")
        second = guides.along_masks(first, first[:, None], trees, REFINE)
        del first  # as in the loss
        clock("pass 2")
        local = guides.along_window(work.masks, work.boxes, window=5, bandwidth=LOCAL, steps=20)
        clock("local")
    return second, local


def peer(work: Work, clock: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """Compute both pseudo masks with the plain implementation."""
    n = len(work.masks)
    trees = plain.tree_per_mask(work.image, n)
    clock("tree")
    first = plain.pass_per_mask(work.masks, [work.image] * n, trees, TREE)
    clock("pass 1")
    second = plain.pass_per_mask(first, list(first[:, None]), trees, REFINE)
    clock("pass 2")
    local = plain.local_per_mask(work.masks, work.image, work.boxes, LOCAL, 5, 20)
    clock("local")
    return second, local


class Clock:
    """Milliseconds per stage: wall and CPU on the host, events on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[tuple[str, float, float, torch.cuda.Event | None]] = []
        self("start")

    def __call__(self, stage: str) -> None:
        """Mark the end of a stage."""
        event = None
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append((stage, time.perf_counter(), time.process_time(), event))

    def read(self) -> dict[str, tuple[float, float]]:
        """Return (wall or device ms, CPU ms) of every stage."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        result = {}
        for (_, wall, cpu, begin), (stage, wall_end, cpu_end, end) in zip(self.marks, self.marks[1:], strict=False):
            spent = begin.elapsed_time(end) if begin is not None and end is not None else 1e3 * (wall_end - wall)
            result[stage] = (spent, 1e3 * (cpu_end - cpu))
        return result


Row = dict[str, tuple[float, float]]


def in_turn(
    forms: dict[str, Callable[[Clock], object]], rounds: int, device: str, *, warm_up: int = 1
) -> dict[str, Row]:
    """Return medians per form and stage over `rounds` after the warm-up, with the forms interleaved."""
    seen: dict[str, list[Row]] = {name: [] for name in forms}
    for turn in range(warm_up + rounds):
        for name, form in forms.items():
            clock = Clock(device)
            form(clock)
            if turn >= warm_up:
                seen[name].append(clock.read())
    return {
        name: {s: tuple(statistics.median(row[s][k] for row in rows) for k in (0, 1)) for s in rows[0]}  # type: ignore[misc]
        for name, rows in seen.items()
    }


GROWTH = """
import resource, sys, torch
from pathlib import Path
torch.set_num_threads({threads})
from benchmarks.propagation import Work, ours, peer
import misa.losses.pairwise
work, sem = torch.load(sys.argv[1], weights_only=False)
form = sys.argv[2]
if form == "ours":
    from misa.ops.backends.choice import warm
    warm()
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
if form == "plain":
    peer(work, lambda _: None)
else:
    ours(work, sem, lambda _: None)
# The peak since exec; ru_maxrss would start from the parent's.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 1024 - before)
"""


def growth(work: Work, sem: tuple[Tensor, Tensor, list[int]] | None, form: str, threads: int) -> float:
    """Return the peak growth in MiB of a new process in its first propagation (Linux).

    `form` is "ours", with the kernels loaded before; "ours, numba", including their loading; or "plain".
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "work.pt")
        torch.save((work, sem), path)
        command = [sys.executable, "-c", GROWTH.format(threads=threads), path, form]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def first_call_memory(root: Path, name: int, counts: Sequence[int], channels: int, threads: int, short: int) -> None:
    """Print the memory of a first call in a new process, against the plain form."""
    print(f"\nMiB that a new process grows by in its first propagation; SEPA with {channels} channels, 3 categories")
    print(f"{'n':>3} {'plain':>8} {'ours':>8} {'ratio':>6} {'SEPA':>8} {'ratio':>6}   with numba")
    for n in counts:
        work = load(root, name, n, short=short)
        sem = semantic(work, channels, 3)
        plain_form, colors = growth(work, None, "plain", threads), growth(work, None, "ours", threads)
        sepa, whole = growth(work, sem, "ours", threads), growth(work, sem, "ours, numba", threads)
        ratios = [plain_form / max(one, 0.1) for one in (colors, sepa)]
        print(
            f"{n:>3} {plain_form:8.0f} {colors:8.1f} {ratios[0]:5.0f}x {sepa:8.1f} {ratios[1]:5.0f}x {whole:8.0f}",
            flush=True,
        )


def total(row: Row, stages: Sequence[str] = STAGES, which: int = 0) -> float:
    """Return the sum over stages."""
    return sum(row[stage][which] for stage in stages)


def compare(
    root: Path, cases: Sequence[tuple[int, int | Sequence[int] | None]], rounds: int, short: int, title: str = ""
) -> None:
    """Print the times of ours, the plain form and the official code (published), for images and masks from `load`."""
    print(f"\n{title}ms per image, wall (CPU time in brackets); ratio = plain / ours, in turn in one process")
    print(f"{'image':>6} {'grid':>8} {'n':>3} {'form':>6} " + " ".join(f"{s:>14}" for s in STAGES), end="")
    print(
        f" {'tree+global':>16} {'total':>16}   official total (published, 2 threads of another machine): ratio to ours"
    )
    for name, n in cases:
        work = load(root, name, n, short=short)
        count, h, w = work.masks.shape

        def form_ours(clock: Callable[[str], None], work: Work = work) -> object:
            return ours(work, None, clock)

        def form_plain(clock: Callable[[str], None], work: Work = work) -> object:
            return peer(work, clock)

        a, b = ours(work, None, lambda _: None), peer(work, lambda _: None)
        for one, other in zip(a, b, strict=True):
            worst = float((one - other).abs().max())
            assert worst < 1e-4, f"the two forms disagree by {worst}"
        rows = in_turn({"ours": form_ours, "plain": form_plain}, rounds, "cpu", warm_up=0)
        for form, row in rows.items():
            cells = " ".join(f"{row[s][0]:7.1f}({row[s][1]:5.0f})" for s in STAGES)
            both = f"{total(row, STAGES[:3]):8.1f}({total(row, STAGES[:3], 1):6.0f})"
            whole = f"{total(row):8.1f}({total(row, which=1):6.0f})"
            line = f"{name:>6} {f'{h}x{w}':>8} {count:>3} {form:>6} {cells} {both} {whole}"
            if form == "ours" and n is None and count in OFFICIAL and short == 800:
                line += f"   {OFFICIAL[count]} ms: {OFFICIAL[count] / total(row):.0f}x"
                if count in OFFICIAL_GLOBAL:
                    apart = OFFICIAL_GLOBAL[count] / total(row, STAGES[:3])
                    line += f" (tree + global {OFFICIAL_GLOBAL[count]} ms: {apart:.1f}x)"
            print(line)
        mine, its = rows["ours"], rows["plain"]
        ratios = " ".join(f"{its[s][0] / mine[s][0]:7.1f}({its[s][1] / max(mine[s][1], 1e-3):5.1f})" for s in STAGES)
        parts = [(STAGES[:3], 8), (STAGES, 8)]
        sums = " ".join(
            f"{total(its, s) / total(mine, s):{k}.1f}({total(its, s, 1) / total(mine, s, 1):6.1f})" for s, k in parts
        )
        print(f"{'':>19} {'ratio':>6} {ratios} {sums}", flush=True)


def with_semantics(
    root: Path, name: int, counts: Sequence[int], channels: int, rounds: int, device: str, short: int
) -> None:
    """Print our time for SEPA against colors alone."""
    print(
        f"\nSEPA, {channels} channels, against colors alone, ms per image ({'events' if device == 'cuda' else 'wall'})"
    )
    print(f"{'n':>3} {'categories':>10} " + " ".join(f"{s:>8}" for s in STAGES) + f" {'total':>8}   to colors alone")
    for n in counts:
        work = load(root, name, n, short=short)
        work.image, work.masks, work.boxes = (x.to(device) for x in (work.image, work.masks, work.boxes))
        forms: dict[str, Callable[[Clock], object]] = {"0": lambda clock, work=work: ours(work, None, clock)}  # type: ignore[misc]
        for categories in (1, 3):
            if categories <= n:
                features, factors, labels = semantic(work, channels, categories)
                sem = (features.to(device), factors.to(device), labels)
                forms[str(categories)] = lambda clock, work=work, sem=sem: ours(work, sem, clock)  # type: ignore[misc]
        rows = in_turn(forms, rounds, device)
        for kind, its_row in rows.items():
            cells = " ".join(f"{its_row[s][0]:8.2f}" for s in STAGES)
            wall, cpu = (total(its_row, which=k) / total(rows["0"], which=k) for k in (0, 1))
            ratios = f"{wall:.2f}x, CPU {cpu:.2f}x"
            print(f"{n:>3} {kind:>10} {cells} {total(its_row):8.2f}   {ratios}")


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent of a power law: the slope of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def scaling(root: Path, name: int, rounds: int, short: int) -> None:
    """Print how our time grows with pixels and with masks."""
    print("\nscaling of ours")
    pixels, spent = [], []
    for scale in (0.125, 0.25, 0.5):
        work = load(root, name, 8, scale=scale, short=short)
        row = in_turn({"ours": lambda clock, work=work: ours(work, None, clock)}, rounds, "cpu")["ours"]  # type: ignore[misc]
        pixels.append(float(work.image[0].numel()))
        spent.append(total(row, which=1))
        size = f"1/{round(1 / scale)}: {int(pixels[-1]):7d} pixels"
        print(f"  {size}, 8 masks: {total(row):7.1f} ms, CPU {spent[-1]:7.1f} ms")
    print(f"  CPU time grows as pixels^{exponent(pixels, spent):.2f}")
    counts, spent = [4, 8, 16, 32, 64], []
    for n in counts:
        work = load(root, name, n, short=short)
        row = in_turn({"ours": lambda clock, work=work: ours(work, None, clock)}, rounds, "cpu")["ours"]  # type: ignore[misc]
        spent.append(total(row, which=1))
        print(f"  {n:3d} masks: {total(row):7.1f} ms, CPU {spent[-1]:7.1f} ms")
    print(f"  CPU time grows as masks^{exponent(counts, spent):.2f}")


START = """
import time, torch
torch.set_num_threads({threads})
rng = torch.Generator().manual_seed(0)
masks, image = torch.rand(2, 40, 48, generator=rng), torch.rand(3, 40, 48, generator=rng)
features, factors = torch.rand(8, 40, 48, generator=rng), torch.rand(2, 8, generator=rng)
def once():
    from misa.ops.propagation import SemanticGuide, propagate_global, propagate_local
    from misa.ops.tree import minimum_spanning_tree
    tree = minimum_spanning_tree(image)
    more = dict(semantic=SemanticGuide(features, factors), labels=torch.tensor([0, 1]))
    first = propagate_global(masks, image, bandwidth=0.01, tree=tree, **more)
    propagate_global(first, first[:, None], bandwidth=0.07, tree=tree)
    propagate_local(masks, image, **more)
a, c = time.perf_counter(), time.process_time()
once()
b, d = time.perf_counter(), time.process_time()
once()
print(b - a - (time.perf_counter() - b), d - c - (time.process_time() - d))
"""


def start_up(threads: int, rounds: int, *, compilation: bool) -> None:
    """Print the overhead of a process's first propagation: loading the kernels, or compiling them on first use."""
    print("\nstart-up: what the first propagation of a new process adds, after `import torch`; medians")
    text = START.format(threads=threads)
    for what in ("kernels loaded", "kernels compiled")[: 1 + compilation]:
        runs = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                fresh = {"NUMBA_CACHE_DIR": folder} if what == "kernels compiled" else {}
                command = [sys.executable, "-c", text]
                done = subprocess.run(command, env=os.environ | fresh, capture_output=True, text=True, check=True)
                runs.append([float(x) for x in done.stdout.split()])
        wall, cpu = (statistics.median(run[k] for run in runs) for k in (0, 1))
        print(f"  {what}: {wall:.2f} s wall, {cpu:.2f} s CPU ({rounds} processes)", flush=True)


def on_gpu(root: Path, name: int, n: int, short: int) -> None:
    """Time `pairwise_loss` on two images with n masks each, and print a profile with synchronizations and launches."""
    works = [load(root, name, n, short=short) for _ in range(2)]
    features, factors, labels = semantic(works[0], 256, 3)
    images = torch.stack([work.image for work in works]).cuda()
    masks, boxes = (torch.cat([getattr(work, x) for work in works]).cuda() for x in ("masks", "boxes"))
    prior = (features.cuda().expand(2, -1, -1, -1).contiguous(), factors.cuda())
    where, label = torch.tensor([0] * n + [1] * n), torch.tensor(labels * 2)

    def step() -> None:
        pairwise_loss(masks, boxes, images, where, affinity=Affinity(saliency=True), labels=label, prior=prior)

    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    before, spent = torch.cuda.memory_allocated(), []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        spent.append(begin.elapsed_time(end))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    print(
        f"\n2 images of {tuple(images.shape[2:])}, {n} masks each, SEPA with 256 channels and 3 categories, whole loss:"
    )
    print(f"  {statistics.median(spent) / 2:.2f} ms per image, peak {peak:.0f} MiB")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        step()
    events = trace.events()
    host = {
        key: sum(key in event.name for event in events)
        for key in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "Memcpy DtoH", "Memcpy HtoD", "aten::item")
    }
    print(f"  host in the trace: {host} (the profiler's own closing cudaDeviceSynchronize included)")
    launches = sum(event.name == "cudaLaunchKernel" or "LaunchKernel" in event.name for event in events)
    print(f"  {launches} kernel launches; the longest on the device:")
    print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=12, max_name_column_width=60))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "benchmarks.propagation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="small images and one round: a smoke test, not a measurement"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    default = Path(os.environ.get("MISA_SHARED", "../shared")) / "data" / "coco_mini"
    parser.add_argument(
        "--data", type=Path, default=default, help="folder of COCO 2017, or of its images 49, 86, 110 and 308"
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; leave --device out")
    needed = (308, 86) if options.quick else (308, 86, 49, 110)
    missing = [name for name in needed if not any(options.data.glob(f"*2017/{name:012d}.jpg"))]
    if missing:
        print(
            f"benchmarks.propagation: no image {missing[0]:012d}.jpg in {options.data}/train2017 or val2017; give the "
            "folder of COCO 2017 with --data (make bench DATA=path).",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(options.threads)
    short, rounds = (128, 1) if options.quick else (800, options.rounds)
    counts = [1, 3] if options.quick else [1, 3, 8, 38, 64]
    print(f"{options.threads} threads, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    if options.device == "cuda":
        print(torch.cuda.get_device_name())
        with_semantics(options.data, 308, counts, 256, rounds, "cuda", short)
        on_gpu(options.data, 308, 3 if options.quick else 64, short)
        return 0
    cases: list[tuple[int, int | None]] = [(86, None), (49, None), (308, None), (110, None)]
    cases += [(308, 1), (308, 8), (308, 38)]
    compare(options.data, [(86, None), (308, 1)] if options.quick else cases, rounds, short)
    # coco_mini's 76 training images have 38.5 positive cells in the median, 46 on average: these two have 34 and 50.
    busy = [(name, fired(options.data, name, short)) for name in ((86,) if options.quick else (86, 49))]
    title = "the load of SOLOv2 training, n = the cells that fire: "
    compare(options.data, busy, min(rounds, 2), short, title)
    with_semantics(options.data, 308, counts, 16 if options.quick else 256, rounds, "cpu", short)
    if not options.quick:
        scaling(options.data, 308, rounds, short)
    start_up(options.threads, 1 if options.quick else 5, compilation=not options.quick)
    memory_counts = [3] if options.quick else [1, 8, 38]
    first_call_memory(options.data, 308, memory_counts, 16 if options.quick else 256, options.threads, short)
    return 0


if __name__ == "__main__":
    sys.exit(main())
