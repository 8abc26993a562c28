"""Rows over several seeds: train what is not trained yet, then mean and 95 % confidence interval of the score.

    python -m misa.engine.repeat teacher:demo teacher:demo_boxes teacher:demo_mask --seeds 3

Runs go where `misa train` puts them; finished ones are read, interrupted ones go on.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t

from misa.engine.train import default_folder, train_from
from misa.parameters import TrainParameters


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of Student's 95 % confidence interval; NaN without values, the width also for one."""
    mean = float(np.mean(values)) if len(values) else math.nan
    if len(values) < 2:
        return mean, math.nan
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(t.ppf(0.975, len(values) - 1)) * spread


def repeat(
    rows: Sequence[str], seeds: Sequence[int], *, data_root: str = "datasets", root: str | Path = "."
) -> dict[str, tuple[str, float, float]]:
    """For each row its leading score (a student's AP, a teacher's mean IoU), its mean and half width over the seeds.

    `root` is the folder that holds runs/.
    """
    table = {}
    for row in rows:
        runs = [
            train_from(
                TrainParameters(
                    row=row,
                    seed=seed,
                    data_root=data_root,
                    work_dir=str(Path(root) / default_folder(row, seed)),
                    gpus=0,
                )
            )
            for seed in seeds
        ]
        leading = [run.leading() for run in runs]
        name = next(iter(leading[0]))
        table[row] = (name, *interval([value for scores in leading if (value := scores[name]) is not None]))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="table:row, for example teacher:demo")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default: 3)")
    parser.add_argument("--data-root", default="datasets")
    options = parser.parse_args(arguments)
    table = repeat(options.rows, range(options.seeds), data_root=options.data_root)
    for row, (name, mean, half) in table.items():
        print(f"{row:<28}{name} {mean:.1f} ± {half:.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
