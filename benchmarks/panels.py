"""Latency of the live panels: a slider's move and a click, from the event to the new picture.

python -m benchmarks.panels            # wall and CPU time, on an otherwise idle machine
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from misa.figures.example import Example
from misa.figures.widgets import FrequencyExplorer, SeedExplorer

# Name, rows and columns of the map at stride 4, channels of S.
SIZES = (
    ("embedded scene, 128 x 128", 32, 32, 64),
    ("photograph, 256 x 384", 64, 96, 256),
    ("photograph, 480 x 640", 120, 160, 256),
    ("training, 800 x 1216", 200, 304, 256),
)


def made_up(h: int, w: int, channels: int) -> Example:
    """Return an image with smooth random colors and features, and one box."""
    generator = torch.Generator().manual_seed(0)

    def smooth(d: int) -> torch.Tensor:
        coarse = torch.randn(1, d, -(-h // 8), -(-w // 8), generator=generator)
        fine = torch.randn(1, d, h, w, generator=generator)
        return (torch.nn.functional.interpolate(coarse, size=(h, w), mode="bicubic") + 0.05 * fine)[0]

    image = np.random.default_rng(0).integers(0, 255, (4 * h, 4 * w, 3), dtype=np.uint8)
    box = np.array([[w, h, 3.0 * w, 3.0 * h]])
    factors = torch.randn(4, channels, generator=generator)
    names = ("one", "two", "three", "four")
    return Example("made up", image, box, (1,), names, None, smooth(3), smooth(channels), factors, smooth(channels))


def measure(act: Callable[[int], object], rounds: int) -> tuple[list[float], list[float]]:
    """Return wall and CPU milliseconds of each round, after three warm-up rounds."""
    wall, cpu = [], []
    for i in range(rounds + 3):
        start, used = time.perf_counter(), time.process_time()
        act(i)
        wall.append(1e3 * (time.perf_counter() - start))
        cpu.append(1e3 * (time.process_time() - used))
    return wall[3:], cpu[3:]


def main(argv: Sequence[str] | None = None) -> int:
    """Print median and 95th percentile for each panel and size."""
    parser = argparse.ArgumentParser(prog="benchmarks.panels", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="three rounds on the smallest map")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rounds = 3 if options.quick else options.rounds
    print(f"{options.threads} thread(s), {rounds} rounds; milliseconds, median and 95th percentile")
    print(f"{'':28} {'map':>9} {'S':>4}   {'event':34} {'wall':>11}   {'CPU':>11}")
    for name, h, w, channels in SIZES[:1] if options.quick else SIZES:
        example = made_up(h, w, channels)
        seed, frequency = SeedExplorer([example], seed=(h // 2, w // 2)), FrequencyExplorer([example])
        tile = seed.sheet().tile(0, 0)
        acts: dict[str, Callable[[int], object]] = {
            "seed: a click": lambda i, seed=seed, tile=tile: seed.click(  # type: ignore[misc]
                tile.left + tile.width * ((7 * i) % 40 + 30) / 100, tile.top + tile.height * ((11 * i) % 40 + 30) / 100
            ),
            "seed: a slider (balance)": lambda i, seed=seed: setattr(  # type: ignore[misc]
                seed.controls["balance"], "value", 0.1 * (i % 20)
            ),
            "frequency: a slider (radius)": lambda i, frequency=frequency: setattr(  # type: ignore[misc]
                frequency.controls["radius"], "value", 1.0 + i % 10
            ),
        }
        for event, act in acts.items():
            wall, cpu = measure(act, rounds)
            figures = [f"{statistics.median(t):5.0f} {np.percentile(t, 95):5.0f}" for t in (wall, cpu)]
            print(f"{name:28} {f'{h} x {w}':>9} {channels:>4}   {event:34} {figures[0]:>11}   {figures[1]:>11}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
