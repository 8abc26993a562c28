"""FSD, forward and backward: the literal four transform pairs of Eq. 3–6 against one low pass of the difference.

    python -m benchmarks.frequency                      # features of an 800 x 1216 image, 64 and 256 channels
    python -m benchmarks.frequency --radii --channels 64     # the radius from which the rfft2 pair is faster

All forms run interleaved in one process; medians, and the speed-up over the literal form.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from misa.losses.distillation import distillation_loss
from misa.ops.frequency import Transform, disc_filter, fourier_mask

RADII = (2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 60.0, 80.0, 100.0)


def literal_loss(
    student: Tensor, teacher: Tensor, box_mask: Tensor, *, radius: float = 10.0, scale: float = 0.2
) -> Tensor:
    """Compute Eq. 3–6 as printed: two features, two bands, four pairs of complex transforms."""
    h, w = student.shape[-2:]
    high = fourier_mask(h, w, radius=radius, scale=scale, device=student.device)
    low = 1 + scale - high

    def filtered(features: Tensor, alpha: Tensor) -> Tensor:
        spectrum = torch.fft.fftshift(torch.fft.fft2(features), dim=(-2, -1)) * alpha
        return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real

    background = ((filtered(teacher, low) - filtered(student, low)) * ~box_mask).square().sum()
    foreground = ((filtered(teacher, high) - filtered(student, high)) * box_mask).square().sum()
    return 6 / (2 * (~box_mask).sum()) * background + 10 / (2 * box_mask.sum()) * foreground


def plain_loss(
    student: Tensor, teacher: Tensor, box_mask: Tensor, *, transform: Transform, radius: float = 10.0
) -> Tensor:
    """Compute the same loss by one low pass of the difference, with autograd's backward pass."""
    h, w = student.shape[-2:]
    x = student - teacher
    low = disc_filter(h, w, radius, transform=transform, dtype=x.dtype, device=x.device)(x)
    y = torch.where(box_mask, x - 0.8 * low, 0.2 * x + 0.8 * low)
    outside, inside = 6 / (2 * (~box_mask).sum()), 10 / (2 * box_mask.sum())
    return (y.square().sum(dim=1, keepdim=True) * torch.where(box_mask, inside, outside)).sum()


def measure(
    forms: dict[str, Callable[[], Tensor]], student: Tensor, *, rounds: int
) -> dict[str, tuple[float, float, float, float]]:
    """Return for each form (median wall s, median CPU s, peak MiB on a GPU or nan, loss) over interleaved `rounds`."""
    wall: dict[str, list[float]] = {name: [] for name in forms}
    cpu: dict[str, list[float]] = {name: [] for name in forms}
    peak, loss = dict.fromkeys(forms, float("nan")), dict.fromkeys(forms, float("nan"))
    gpu = student.device.type == "cuda"
    for turn in range(rounds + 1):
        for name, form in forms.items():
            student.grad = None
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start, start_cpu = time.perf_counter(), time.process_time()
            value = form()
            value.backward()
            if gpu:
                torch.cuda.synchronize()
                peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            if turn:  # the first round warms up
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
            loss[name] = float(value.detach())
    return {n: (statistics.median(wall[n]), statistics.median(cpu[n]), peak[n], loss[n]) for n in forms}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 0 if all forms agree, 1 if a loss differs by more than 1e-4 of the literal form's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frequency", description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(200, 304), metavar=("H", "W"), help="of the feature map")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--radii", action="store_true", help="compare the two transforms over the radius instead")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; leave --device out")
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), {options.rounds} rounds, medians")
    agree = True
    for d in options.channels:
        generator = torch.Generator().manual_seed(0)
        shape = (options.batch, d, *options.size)
        student, teacher = (torch.randn(shape, generator=generator).to(options.device) for _ in range(2))
        student.requires_grad_()
        box_mask = torch.zeros(options.batch, 1, *options.size, dtype=torch.bool, device=options.device)
        h, w = options.size
        box_mask[..., h // 4 : 3 * h // 4, w // 3 : 2 * w // 3] = True
        pair = (student, teacher, box_mask)
        if options.radii:
            _radii(pair, options.rounds)
            continue
        forms: dict[str, Callable[[], Tensor]] = {
            "literal, four transform pairs": partial(literal_loss, *pair),
            "rfft2 of the difference, autograd": partial(plain_loss, *pair, transform="fft"),
            "pruned, autograd": partial(plain_loss, *pair, transform="pruned"),
            "distillation_loss, rfft2": partial(distillation_loss, *pair, transform="fft"),
            "distillation_loss, pruned": partial(distillation_loss, *pair, transform="pruned"),
            "distillation_loss (auto)": partial(distillation_loss, *pair),
        }
        results = measure(forms, student, rounds=options.rounds)
        base = results["literal, four transform pairs"]
        print(f"\n{tuple(shape)}, forward + backward{'':12} wall ms   CPU ms  ratio wall / CPU   peak MiB   loss")
        for name, (wall, cpu, peak, loss) in results.items():
            ratios = f"{base[0] / wall:6.1f} / {base[1] / cpu:.1f}"
            print(f"  {name:36} {1e3 * wall:9.1f} {1e3 * cpu:8.1f}  {ratios:16} {peak:9.0f}   {loss:.6g}")
            agree &= abs(loss - base[3]) <= 1e-4 * abs(base[3])
    return 0 if agree else 1


def _radii(pair: tuple[Tensor, Tensor, Tensor], rounds: int) -> None:
    h, w = pair[0].shape[-2:]
    kinds: tuple[Transform, ...] = ("fft", "pruned")
    print(f"\n{tuple(pair[0].shape)}: rfft2 / pruned, wall, by radius (share of the shorter side's basis kept)")
    for radius in (r for r in RADII if 2 * r < min(h, w)):
        forms: dict[str, Callable[[], Tensor]] = {
            kind: partial(distillation_loss, *pair, radius=radius, transform=kind) for kind in kinds
        }
        results = measure(forms, pair[0], rounds=rounds)
        ratio = results["fft"][0] / results["pruned"][0]
        print(f"  radius {radius:5.0f}  share {(2 * radius + 1) / min(h, w):.2f}  {ratio:6.2f}x")


if __name__ == "__main__":
    raise SystemExit(main())
