"""Tables 3-5: the paper's results beside ours, with confidence intervals; rows without a run are marked."""

import hashlib
import html
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from misa.engine.runs.places import default_folder
from misa.engine.runs.record import SMOKE
from misa.engine.sweeps.jobs import ROOT, Job, plan, require_own_runs
from misa.errors import UserError, counted
from misa.evaluation.interval import interval
from misa.experiment import Comparison, Expected, Experiment
from misa.rows import find_row, not_a_row, table_module, table_names

SCORES = ("AP", "AP50", "AP75")
NOT_RUN = "not run"
_LONGEST = 200  # bytes of a file's name
_CODED = str.maketrans(
    {"±": r"$\pm$", "−": "$-$", "–": "--", "+": "$+$", **{sign: f"\\{sign}" for sign in "%_&#${}"}}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
)  # by sign, how LaTeX writes it
_MEANS = "means over the seeds, AP in percent"
_MODES = (
    "{}: AP on the objects of one mode; those of the others and their detections are ignored, but detections of "
    "another class or of the background count in each mode, so that all may lie below the AP: compare rows within a "
    "mode"
)
Format = Literal["text", "html", "latex", "csv"]


@dataclass(frozen=True)
class Table:
    """Rows with their printed names, the baseline, and the runs of every row by seed.

    expected: the paper's result of a row, on the dataset `printed_on`, which may differ from this table's. detailed:
    whether `details` is printed too.
    """

    title: str
    labels: dict[str, str]
    baseline: str
    jobs: dict[str, list[Job]]
    expected: dict[str, Expected | None]
    printed_on: str = ""
    detailed: bool = False
    teachers: bool = False  # scored by mean IoU
    smoke: bool = False

    @property
    def rows(self) -> list[str]:
        """The rows' names for `misa train`."""
        return list(self.jobs)

    def every_job(self) -> list[Job]:
        """All jobs, ordered by seed, so that an interrupted sweep has equally many seeds of every row."""
        every = [job for runs in zip(*self.jobs.values(), strict=True) for job in runs]
        return list({job.folder: job for job in every}.values())  # a row may occur under two names

    def figures(self) -> pd.DataFrame:
        """One line per row, in percent; NaN for unknown values. In a table of teachers, "AP" is their mean IoU.

        paper_AP …: the paper's, on `printed_on`. AP, AP_ci …: mean over the n finished seeds and half width of its 95 %
        interval. difference, difference_ci: of AP to the baseline's, paired by seed, over `pairs` seeds.
        """
        base = {job.seed: _score(job, "AP") for job in self.jobs[self.baseline]}
        lines = []
        for row, jobs in self.jobs.items():
            expected = self.expected[row]
            line: dict[str, Any] = {"row": self.labels[row]}
            for name in SCORES:
                line[f"paper_{name}"] = getattr(expected, name.lower()) if expected else math.nan
            for name in SCORES:
                values = [value for job in jobs if (value := _score(job, name)) is not None]
                line[name], line[f"{name}_ci"] = interval(values)
            line["n"] = sum(job.state == "finished" for job in jobs)
            pairs = [
                own - other
                for job in jobs
                if (own := _score(job, "AP")) is not None and (other := base[job.seed]) is not None
            ]
            same = row == self.baseline
            line["difference"], line["difference_ci"] = (math.nan, math.nan) if same else interval(pairs)
            line["pairs"] = 0 if same else len(pairs)
            lines.append(line)
        return pd.DataFrame(lines).set_index("row")

    def printed(self) -> pd.DataFrame:
        """The figures as text: `mean ± half width`, "not run" for a row without runs, a dash for an unknown value.

        A difference over fewer seeds than the row has says over how many.
        """
        figures, shown = self.figures(), SCORES[: 1 if self.teachers else None]
        text = pd.DataFrame(index=figures.index)
        for name in SCORES:
            if figures[f"paper_{name}"].notna().any():
                heading = f"paper {name}, {self.printed_on}" if self.printed_on else f"paper {name}"
                text[heading] = [_number(x) for x in figures[f"paper_{name}"]]
        for name in shown:
            text[name] = [
                _measured(mean, half, n)
                for mean, half, n in zip(figures[name], figures[f"{name}_ci"], figures["n"], strict=True)
            ]
        text["n"] = figures["n"]
        columns = (figures[name] for name in ("difference", "difference_ci", "pairs", "n"))
        text["AP − baseline"] = [
            _signed(mean, half) + (f" ({counted(pairs, 'pair')})" if 0 < pairs < n else "")
            for mean, half, pairs, n in zip(*columns, strict=True)
        ]
        return text.rename(columns=_MIOU) if self.teachers else text

    def render(self, kind: Format) -> str:
        """Format as plain text, HTML, LaTeX (booktabs) or CSV (unformatted figures, and "not run")."""
        if kind == "csv":
            figures = self.figures()
            for name in SCORES:
                text = figures[name].map("{:.4f}".format, na_action="ignore")
                figures[name] = text.mask(figures["n"] == 0, NOT_RUN)
            if self.teachers:
                unused = [name for name in figures if "AP50" in name or "AP75" in name or name.startswith("paper")]
                figures = figures.drop(columns=unused).rename(columns=_MIOU)
            return figures.to_csv(float_format="%.4f")
        text = self.printed()
        text.index.name = None
        found = [job.metrics() or {} for job in self.every_job()]
        detailed = self.detailed and any(found)
        boxes = any("bbox" in metrics and "segm" not in metrics for metrics in found)
        title = f"{self.title}; AP of boxes, since the data has no masks" if boxes else self.title
        title = f"{title}. SMOKE RUNS: {SMOKE.partition(': ')[2].rstrip('.')}" if self.smoke else title
        if kind == "text":
            more = f"\n\n{self._legend()}\n{self.details().to_string()}" if detailed else ""
            return f"{title}\n{text.to_string()}{more}"
        if kind == "html":
            page: str = text.to_html(border=0, classes="misa-table", justify="right")
            caption = f"<caption>{html.escape(title)}; percent, mean ± 95 % confidence interval over n seeds</caption>"
            page = page.replace("<thead>", f"{caption}\n<thead>", 1)
            if detailed:
                more = self.details().to_html(border=0, classes="misa-table", justify="right")
                # Small: its many columns fit into a notebook's cell on a screen of 1280 pixels.
                more = more.replace("<table", '<table style="font-size: 80%"', 1)
                page += more.replace("<thead>", f"<caption>{self._legend()}</caption>\n<thead>", 1)
            page = page.replace("<tr>\n      <th>", '<tr>\n      <th style="text-align: left; white-space: nowrap">')
            return page.replace("<td>", '<td style="text-align: right; white-space: nowrap">')
        if kind == "latex":
            math_text = text.astype(str).map(_latex)
            math_text.columns = [_latex(name) for name in math_text.columns]
            math_text.index = [_latex(name) for name in math_text.index]
            return math_text.to_latex(
                escape=False,
                caption=f"{_latex(title)}. Mean and 95\\,\\% confidence interval over $n$ seeds.",
                column_format="l" + "r" * len(text.columns),
            )
        raise UserError(f"there is no table format {kind!r}; choose text, html, latex or csv.")

    def save(self, folder: str | Path, name: str) -> list[Path]:
        """Write HTML, LaTeX and CSV, and the details as another CSV, into a folder; return the paths."""
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        kinds: dict[str, Format] = {"html": "html", "tex": "latex", "csv": "csv"}
        paths = []
        for suffix, kind in kinds.items():
            paths.append(folder / f"{name}.{suffix}")
            encoding = '<meta charset="utf-8">\n' if kind == "html" else ""  # a browser would guess another
            paths[-1].write_text(encoding + self.render(kind), encoding="utf-8")
        if self.detailed:
            paths.append(folder / f"{name}_details.csv")
            self.details().to_csv(paths[-1])
        return paths

    def _legend(self) -> str:
        """The heading of `details`."""
        modes = {mode for job in self.every_job() for mode in (job.metrics() or {}).get("segm_of_mode", {})}
        return f"{_MEANS}; {_MODES.format(', '.join(sorted(modes)))}" if modes else _MEANS

    def details(self) -> pd.DataFrame:
        """Further measures, one line per row, as text: means over the finished seeds; a dash for unknown values.

        Class-agnostic AP, AP50, AP75, AP of masks filled to rectangles (high if masks are box-shaped), AP by failure
        mode and size, all in percent; seconds and CPU seconds per step and GiB of memory, from `cost.json`. Times are
        comparable only between rows trained on the same machine, one at a time.
        """
        lines = {}
        for row, jobs in self.jobs.items():
            found = [metrics for job in jobs if (metrics := job.metrics()) is not None]
            costs = [cost for job in jobs if (cost := job.cost()) is not None]
            line: dict[str, list[float | None]] = {}
            for score in SCORES:
                line[f"class-agnostic {score}"] = [m.get("segm_any_class", {}).get(score) for m in found]
            line["AP of rectangles"] = [m.get("segm_as_rectangles", {}).get("AP") for m in found]
            groups = [_score_by_group(job) for job in jobs]
            for group in dict.fromkeys(group for scores in groups for group in scores):
                line[group] = [scores.get(group) for scores in groups]
            for name in ("seconds_per_step", "cpu_seconds_per_step", "memory_gib"):
                line[name] = [cost.get(name) for cost in costs]
            lines[self.labels[row]] = {
                name: interval(known)[0] if (known := [v for v in values if v is not None]) else math.nan
                for name, values in line.items()
            }
        frame = pd.DataFrame.from_dict(lines, orient="index", dtype=float)
        for name in frame.columns:
            digits = "{:.2f}" if name.endswith(("_step", "_gib")) else "{:.1f}"
            frame[name] = frame[name].map(digits.format, na_action="ignore").fillna("–")
        names = {"seconds_per_step": "s/step", "cpu_seconds_per_step": "CPU s/step", "memory_gib": "GiB"}
        return frame.rename(columns=names)

    def by_mode(self) -> pd.DataFrame:
        """AP in percent, one line per row and failure mode of the scenes, or object size.

        mean, ci: over the n finished seeds. difference, difference_ci: to the baseline, paired by seed; NaN for the
        baseline itself.
        """
        base = {job.seed: _score_by_group(job) for job in self.jobs[self.baseline]}
        lines = []
        for row, jobs in self.jobs.items():
            own = {job.seed: _score_by_group(job) for job in jobs}
            for group in dict.fromkeys(group for scores in own.values() for group in scores):
                values = {seed: scores[group] for seed, scores in own.items() if group in scores}
                pairs = [value - base[seed][group] for seed, value in values.items() if group in base[seed]]
                mean, half = interval(list(values.values()))
                difference, over = (math.nan, math.nan) if row == self.baseline else interval(pairs)
                lines.append((self.labels[row], group, mean, half, len(values), difference, over))
        return pd.DataFrame(lines, columns=["row", "group", "mean", "ci", "n", "difference", "difference_ci"])


_MIOU = {"AP": "mIoU", "AP_ci": "mIoU_ci", "AP − baseline": "mIoU − baseline"}


def open_table(
    table: int | str,
    *,
    data: str = "demo",
    seeds: int = 5,
    root: str | Path = ROOT,
    smoke: bool = False,
    details: bool = False,
) -> Table:
    """Open Table 3, 4 or 5 on a dataset ("demo", "voc", "coco_mini", "photos"), or any rows: "demo:box,demo:mask".

    details: print `Table.details` too; the table of comparators always does.
    Raises UserError: no such table, dataset or row; a folder holds another run, or one on other data than the rest.
    """
    comparison, names = table_rows(table, data)
    rows = {row: find_row(row) for row in names.values()}
    scored = {row.semantic is not None: name for name, row in rows.items()}
    if len(scored) == 2:
        raise UserError(f"{scored[True]} is scored by mean IoU, {scored[False]} by AP; compare rows of one kind.")
    _require_same_images({name: row.smoke() if smoke else row for name, row in rows.items()})
    printed = table_rows(table, comparison.data)[1] if comparison.data else names
    paper = {row: find_row(printed[key]).expected for key, row in names.items()}
    printed_on = "" if data == comparison.data else comparison.data.upper()
    jobs = {row: plan([row], range(seeds), root=root, smoke=smoke) for row in names.values()}
    require_own_runs(job for runs in jobs.values() for job in runs)
    labels = {names[row]: label for row, label in comparison.rows.items()}
    detailed = details or comparison.details
    return Table(
        comparison.title, labels, names[comparison.baseline], jobs, paper, printed_on, detailed, True in scored, smoke
    )


def _require_same_images(rows: Mapping[str, Experiment]) -> None:
    """Raise UserError if some rows are scored on embedded images and some are not, or on other embedded ones."""
    scenes = {name: dict(row.scenes) | {"train": 1} if row.data == "demo" else None for name, row in rows.items()}
    first, *others = scenes
    other = next((name for name in others if scenes[name] != scenes[first]), None)
    if other is None:
        return
    from misa.data.source import drawn_scenes  # imports OpenCV, which equal rows do not need

    drawn = {name: None if one is None else drawn_scenes(one) for name, one in scenes.items()}
    other = next((name for name in others if drawn[name] != drawn[first]), None)
    if other is not None:
        raise UserError(f"{first} and {other} are scored on different images; compare rows of the same data.")


def table_rows(table: int | str, data: str = "demo") -> tuple[Comparison, dict[str, str]]:
    """Returns a table of the paper and its rows on a dataset, or any rows: "demo:box,demo:mask".

    The rows are names for `misa train` by their keys in the comparison.
    Raises UserError: no such table, dataset or row; `data` beside rows, which say themselves what they train on.
    """
    name = str(table)
    if ":" in name:
        if data != "demo":
            raise UserError(
                f"data {data} chooses the rows of a table of the paper; {name} names its rows itself: leave it out."
            )
        rows = [row.strip() for row in name.split(",")]
        for row in rows:
            find_row(row)
        return Comparison(", ".join(rows), {row: row for row in rows}, rows[0]), {row: row for row in rows}
    module, comparison = _comparison(name)
    known = table_module(module).ROWS
    if f"{data}_{comparison.baseline}" not in known:
        kinds = {row.removesuffix(f"_{end}") for end in comparison.rows for row in known if row.endswith(f"_{end}")}
        raise UserError(f"table {table} has no data {data!r}; choose one of {', '.join(sorted(kinds))}.")
    return comparison, {row: f"{module}:{data}_{row}" for row in comparison.rows}


def file_name(table: int | str, data: str, *, smoke: bool) -> str:
    """Name of a table's files, without suffix; smoke runs do not overwrite a table of results.

    >>> file_name(3, "voc", smoke=False), file_name("photos:box,photos:mask", "demo", smoke=True)
    ('table3_voc', 'table_photos_box_photos_mask_smoke')
    """
    name = f"_{table}" if ":" in str(table) else f"{table}_{data}"
    if len(os.fsencode(name)) > _LONGEST:  # of many rows; file systems take 255 bytes with a suffix
        first, *others = str(table).split(",")
        first = os.fsencode(first)[: _LONGEST // 2].decode(errors="ignore")
        name = f"_{first}_and_{len(others)}_more_{hashlib.sha256(name.encode()).hexdigest()[:10]}"
    return re.sub(r"[^\w.-]+", "_", f"table{name}{'_smoke' if smoke else ''}")


def _comparison(number: str) -> tuple[str, Comparison]:
    """The module and `Comparison` of a table."""
    known = {}
    for name in table_names():
        module = table_module(name)
        if isinstance(comparison := getattr(module, "TABLE", None), Comparison):
            known[name.removeprefix("table").partition("_")[0]] = (name, comparison)
    if number not in known and number.isdecimal():
        raise UserError(
            f"there is no table {number}; choose one of {', '.join(known)}, or rows such as demo:box,demo:mask."
        )
    if number not in known:
        raise UserError(f"{not_a_row(number)}\nOr give a table of the paper: {', '.join(known)}.")
    return known[number]


def _score(job: Job, name: str) -> float | None:
    """A student's mask AP, or its box AP if the data has no masks; for a teacher mean IoU."""
    metrics = job.metrics()
    if metrics is None:
        return None
    if found := metrics.get("segm") or metrics.get("bbox"):
        value: float | None = found[name]
        return value
    return metrics["miou"] if name == "AP" else None


def _score_by_group(job: Job) -> dict[str, float]:
    """AP on the objects of each failure mode and size in the ground truth; of boxes if the data has no masks."""
    metrics = job.metrics() or {}
    found = {mode: values.get("AP") for mode, values in metrics.get("segm_of_mode", {}).items()}
    sizes, own = {"small": "APs", "medium": "APm", "large": "APl"}, metrics.get("segm") or metrics.get("bbox") or {}
    found |= {size: own.get(name) for size, name in sizes.items()}
    return {group: value for group, value in found.items() if value is not None}


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"


def _measured(mean: float, half: float, n: int) -> str:
    if n == 0:
        return NOT_RUN
    if math.isnan(mean):
        return "–"
    return f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"


def _signed(mean: float, half: float) -> str:
    if math.isnan(mean):
        return "–"
    sign = "+" if mean >= 0 else "−"
    return f"{sign}{abs(mean):.1f}" if math.isnan(half) else f"{sign}{abs(mean):.1f} ± {half:.1f}"


def _latex(text: str) -> str:
    """Text for LaTeX, of captions and cells."""
    return text.translate(_CODED)


def summary(jobs: Sequence[Job]) -> str:
    """The numbers of finished, started and not run trainings, as text."""
    states = [job.state for job in jobs]
    return ", ".join(f"{states.count(state)} {state}" for state in ("finished", "started", "not run"))


def how_counted(jobs: Sequence[Job]) -> str:
    """How a run that was trained elsewhere is counted, as a line with an example; "" if all are finished."""
    one = next((job for job in jobs if job.state == "not run"), None)
    if one is None:
        return ""
    name = default_folder(one.row, one.seed, smoke=one.smoke).name
    root = one.folder.parent
    absent = "" if root.is_dir() else ", which does not exist,"
    return (
        f"runs are looked for in {root}{absent} only; one trained elsewhere is counted when its folder is moved there "
        f"with the name that misa train gives it, such as {name}\n"
    )
