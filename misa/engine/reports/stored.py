"""Stored scores of a row with their provenance, so that it need not be trained again for a comparison."""

from typing import NamedTuple

from misa.engine.runs.folder import Run
from misa.rows import find_row


class Stored(NamedTuple):
    """Mask AP in percent of one training of a row, with its hash, seed, commit and device."""

    digest: str
    seed: int
    commit: str
    device: str
    segm: dict[str, float | None]

    def provenance(self, row: str) -> str:
        """The provenance of the scores as text."""
        return f"{row} (hash {self.digest}), seed {self.seed}, on {self.device}, trained at commit {self.commit[:10]}"


STORED = {
    "demo:box": Stored(
        digest="7537a61b67",
        seed=0,
        commit="a6c1d970f45802efa1f82e4666531db95a428483",
        device="cpu",
        segm={"AP": 26.54, "AP50": 49.4, "AP75": 29.79, "APs": 24.05, "APm": 34.7, "APl": None},
    ),
    "demo:long_box": Stored(
        digest="1fa09c823a",
        seed=0,
        commit="f801cc4f0fc69099a2e84a272cb1624dc8d6c64a",
        device="cpu",
        segm={"AP": 28.74, "AP50": 53.48, "AP75": 28.98, "APs": 25.35, "APm": 38.31, "APl": None},
    ),
}


def stored_beside(run: Run) -> dict[str, Stored]:
    """The stored rows that a run may be compared with: the same student, embedded scenes and schedule.

    Empty for a smoke run, a teacher, or a run on other data; the run's own row is left out.
    """
    own = run.experiment
    if own.data != "demo" or own.semantic is not None or own.limit is not None:
        return {}
    rows = {name: find_row(name) for name in STORED}
    same = {
        name
        for name, row in rows.items()
        if all(getattr(row, key) == getattr(own, key) for key in ("scenes", "schedule", "student", "network"))
    }
    return {name: stored for name, stored in STORED.items() if name in same and stored.digest != own.digest()}
