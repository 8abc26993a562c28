"""The report of a data set check."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from misa.errors import counted

# Problems kept of each kind, so that a report of 100k faults fits on a page; `Report.totals` counts them all.
KEPT = 50


@dataclass(frozen=True)
class Problem:
    """One problem: `where` names the file and the id in it."""

    kind: str
    where: str
    message: str
    advice: str
    fatal: bool = True
    note: bool = False  # for information only, less than a warning

    @property
    def sentence(self) -> str:
        """Returns the problem as one sentence."""
        return f"{self.where}: {self.message}; {self.advice}" + ("" if self.advice.endswith("?") else ".")


class Sample(NamedTuple):
    """An image and its boxes (x1 y1 x2 y2 in pixels) with their class names."""

    path: Path
    boxes: list[list[float]]
    labels: list[str]


NAMED = 20  # classes that a report names, those with most objects first


@dataclass(frozen=True)
class Report:
    """The result of a check.

    images: number of listed images, including missing ones; empty_images: those without an object.
    objects: boxes of the requested classes without crowds.
    masks: whether any object has a mask.
    problems: the first of each kind, fatal ones first; totals: total number of each kind.
    notes: information that is not a problem. samples: some images with their boxes, for inspection.
    """

    annotation_file: Path
    image_dir: Path
    images: int = 0
    objects: int = 0
    crowds: int = 0
    empty_images: int = 0
    classes: tuple[str, ...] = ()
    masks: bool = False
    per_class: dict[str, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    totals: dict[str, int] = field(default_factory=dict)
    notes: tuple[Problem, ...] = ()
    samples: tuple[Sample, ...] = ()

    @property
    def fatal(self) -> tuple[Problem, ...]:
        """The problems that forbid a training."""
        return tuple(problem for problem in self.problems if problem.fatal)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """The problems that do not forbid a training."""
        return tuple(problem for problem in self.problems if not problem.fatal)

    @property
    def usable(self) -> bool:
        """Whether nothing is fatal."""
        return not self.fatal

    def __str__(self) -> str:
        absent = self.totals.get("image-absent", 0)
        missing = f"{absent} of them missing, " if absent else ""
        head = (
            f"{self.annotation_file}: {counted(self.images, 'image')} ({missing}{self.empty_images} without objects), "
            f"{counted(self.objects, 'object')} in {counted(len(self.classes), 'class', 'classes')}, "
            f"{counted(self.crowds, 'crowd')}"
        )
        common = sorted(self.per_class.items(), key=lambda item: (-item[1], item[0]))
        names = ", ".join(f"{name} {count}" for name, count in common[:NAMED])
        more = f" and {len(common) - NAMED} more" if len(common) > NAMED else ""
        head += f"\nclasses: {names}{more}" if common else ""
        listed = self.problems + self.notes
        counts = Counter(problem.kind for problem in listed)
        lines = [f"{'error' if p.fatal else 'note' if p.note else 'warning'}: {p.sentence}" for p in listed]
        lines += [
            f"... and {self.totals[kind] - n} more of {kind}" for kind, n in counts.items() if self.totals[kind] > n
        ]
        return "\n".join([head, *lines])


class Notes:
    """Collects problems; keeps only the first of each kind."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.converted = False  # rows of a converted file name their own origin
        self.unread = False  # parts of the original data could not be converted
        self.problems: list[Problem] = []
        self.totals: Counter[str] = Counter()

    def add(self, kind: str, place: str, message: str, advice: str, *, fatal: bool = True, note: bool = False) -> None:
        """Add a problem; the first `KEPT` of each kind are kept."""
        self.totals[kind] += 1
        if self.totals[kind] <= KEPT:
            where = str(self.file) if not place else place if self.converted else f"{self.file}, {place}"
            self.problems.append(Problem(kind, where, message, advice, fatal and not note, note))

    def forget(self, *kinds: str) -> None:
        """Remove all problems of some kinds."""
        self.problems = [problem for problem in self.problems if problem.kind not in kinds]
        for kind in kinds:
            self.totals.pop(kind, None)

    def place(self, row: dict[str, Any], otherwise: str) -> str:
        """Returns the origin of a row of a converted file; `otherwise` for other files."""
        return str(row["where"]) if self.converted and "where" in row else otherwise
