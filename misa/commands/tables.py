"""Print the paper's ablation tables beside the figures measured here, or "not run".

"comparators" are the objectives of other papers beside MISA's, on one student.

example: misa tables 3 --data demo --seeds 5 --run
"""

from typing import Any, Literal

from misa.commands import _shared as shared
from misa.errors import option_name
from misa.machine import Machine
from misa.parameters import Parameters, argument, option


class Tables(Parameters):
    """Options of `misa tables`, parameters of `notebooks/tables.ipynb`."""

    table: int | str = argument(
        "3, 4, 5, comparators, or rows against the first: teacher:demo,teacher:demo_boxes", default=3
    )
    data: str = option("demo", "of a table: demo (embedded scenes); voc, coco_mini and others: give data_root")
    seeds: int = option(5, "number of seeds, from 0", low=1, high=1000)
    train: bool = option(False, "train what is missing, resume what was interrupted", only="notebook")
    run: bool = option(False, "train what is missing, resume what was interrupted", only="command")
    slots: int = option(1, "trainings at a time on this machine", low=1, high=1024)
    cluster: str = option("", "submit the trainings through submitit instead, such as to slurm")
    cluster_options: str = option("", "options of submitit, such as timeout_min (minutes of one training)")
    data_root: str = shared.data_root()
    root: str = option("runs/tables", "folder of the run folders")
    details: bool = option(False, "also class-agnostic AP, AP by mode and size, cost (comparators: always)")
    format: Literal["text", "html", "latex", "csv"] = option("text", "how to print it", only="command")
    save: str = option("", "also write HTML, LaTeX and CSV into this folder", only="command")
    gpus: int | None = shared.gpus()
    workers: int = shared.workers()
    threads: int = shared.threads()
    smoke: bool = shared.smoke()

    def table_options(self) -> dict[str, Any]:
        """The arguments of `misa.engine.reports.tables.open_table`."""
        return {name: getattr(self, name) for name in ("table", "data", "seeds", "root", "smoke", "details")}

    def sweep_options(self) -> dict[str, Any]:
        """The arguments of `misa.engine.sweeps.sweep.run` except the jobs."""
        names = ("slots", "cluster", "cluster_options", "data_root")
        machine = Machine(gpus=self.gpus, workers=self.workers, threads=self.threads)
        return {name: getattr(self, name) for name in names} | {"machine": machine}


def run(options: Tables) -> int:
    """Train missing runs if requested, then print the table."""
    shared.require_given(options.data_root, option_name("data_root"))
    shared.require_folder(options.save, "save")
    if not options.cluster:
        shared.require_unused(options, ("cluster_options",), f"without {option_name('cluster')}")
    from misa.engine.reports.tables import file_name, how_counted, open_table, summary

    table = open_table(**options.table_options())
    if options.run and any(job.state != "finished" for job in table.every_job()):
        from misa.engine.sweeps import sweep

        sweep.run(table.every_job(), **options.sweep_options())
    elif options.data_root != Tables.data_root:
        from misa.engine.sweeps.jobs import require_own_runs

        require_own_runs(table.every_job(), options.data_root)
    print(table.render(options.format))
    if options.format == "text":
        missing = any(job.state != "finished" for job in table.every_job())
        print(summary(table.every_job()) + ("; --run trains what is missing" if missing else ""))
        print(how_counted(table.every_job()), end="")
    if options.save:
        name = file_name(options.table, options.data, smoke=options.smoke)
        print(*table.save(options.save, name), sep="\n")
    return 0
