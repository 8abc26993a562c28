"""Score a run's checkpoint on its validation data, or on other data.

A student is scored by mask AP (of boxes, where the data has no masks), a teacher by mean IoU.

example: misa evaluate runs/demo-long-seed0
"""

from pathlib import Path

from misa.commands import _shared as shared
from misa.machine import Machine
from misa.parameters import Parameters, option


class Evaluate(Parameters):
    """Options of `misa evaluate`, parameters of `notebooks/evaluate.ipynb`."""

    run: str = shared.run_folder()
    checkpoint: str = option("", "checkpoint file, or none: untrained, no start loaded (default: the last)")
    data_root: str = shared.other_data()
    miou: bool = option(False, "also mean IoU, a student's instances merged into classes (Figure 1)", only="command")
    merge_score: float = option(0.3, "score threshold of the merged instances", low=0, high=1, only="command")
    separation: bool = option(
        False, "of a teacher, instead: where its features separate objects and colors do not", only="command"
    )
    per_class: bool = option(False, "also the AP of each class", only="command")
    boundary: bool = option(False, "also boundary AP (needs the package faster-coco-eval)")
    test_dev: str = option("", "instead: the folder for COCO test-dev results; data_root is COCO's")
    predictions: str = option("", "keep the detections in this COCO results file", only="command")
    gpus: int | None = shared.gpus(high=1)
    workers: int = shared.workers()
    threads: int = shared.threads()

    @property
    def machine(self) -> Machine:
        """Devices and processes."""
        return Machine(gpus=self.gpus, workers=self.workers, threads=self.threads)


def run(options: Evaluate) -> int:
    """Print what was scored, and the scores as a table."""
    shared.require_run(options.run)
    shared.require_data(options.data_root)
    shared.require_folder(options.test_dev, "test_dev")
    other = ("miou", "per_class", "boundary", "predictions")
    if options.separation:
        shared.require_unused(options, (*other, "test_dev", "gpus", "workers", "threads"), "with --separation")
    if options.test_dev:
        shared.require_unused(options, other, "with --test-dev")
    if shared.read_params(Path(options.run).expanduser())["experiment"].get("semantic"):
        shared.require_unused(
            options, ("miou", "per_class", "boundary"), "on a semantic teacher, which is scored by mean IoU"
        )
    if not options.miou:
        shared.require_unused(options, ("merge_score",), "without --miou")
    from misa.engine.reports.evaluate import evaluate, heading, load_run, run_line

    if options.separation:
        from misa.engine.reports.separation import teacher_separation
        from misa.engine.runs.folder import score_table
        from misa.engine.runs.state import warn

        measured = teacher_separation(
            options.run, checkpoint=options.checkpoint or None, data_root=options.data_root or None
        )
        if not options.checkpoint:
            warn(measured.folder, measured.experiment, checkpoint=measured.checkpoint)
        print(f"{heading(measured)}\n\n{score_table(measured.metrics)}")
        return 0
    if options.test_dev:
        from misa.engine.reports.submission import NOTE, submit

        student = load_run(options.run, checkpoint=options.checkpoint or None, machine=options.machine)
        archive = submit(student, options.data_root or "datasets/coco", options.test_dev, machine=options.machine)
        print(f"{run_line(student.folder, student.checkpoint)}\nresults: {archive}\n{NOTE}")
        return 0
    result = evaluate(
        options.run,
        checkpoint=options.checkpoint or None,
        data_root=options.data_root or None,
        merged=options.miou,
        merge_score=options.merge_score,
        details=options.per_class,
        boundary=options.boundary,
        predictions=options.predictions or None,
        machine=options.machine,
    )
    print(f"{heading(result)}\n\n{result.table()}")
    if options.predictions:
        print(f"predictions: {options.predictions}, with the ids of {result.source.val.annotations}")
    return 0
