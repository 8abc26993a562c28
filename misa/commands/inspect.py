"""Show where a run fails: its worst images, errors by type, and confidence intervals, on one HTML page.

example: misa inspect runs/demo-long-seed0
"""

from misa.commands import _shared as shared
from misa.parameters import Parameters, option


class Inspect(Parameters):
    """Options of `misa inspect`."""

    run: str = shared.run_folder()
    predictions: str = option("", "another COCO results file (default: the run's own)")
    data_root: str = shared.other_data()
    out: str = option("", "the page (default: inspection.html in the run folder)")
    threshold: float = option(0.3, "score threshold of the detections that are analyzed", low=0, high=1)
    good: float = option(0.5, "IoU threshold of a match", low=0.01, high=1)
    resamples: int = option(1000, "bootstrap resamples of the images, for the confidence intervals", low=1)


def run(options: Inspect) -> int:
    """Write the page and print a summary."""
    shared.require_run(options.run)
    shared.require_data(options.data_root)
    from misa.engine.reports.inspection import inspect_run, summary

    found = inspect_run(
        options.run,
        predictions=options.predictions or None,
        data_root=options.data_root or None,
        out=options.out,
        threshold=options.threshold,
        good=options.good,
        resamples=options.resamples,
    )
    print(f"{summary(found)}\n\nthe page: {found.page}")
    return 0
