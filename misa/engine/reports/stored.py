"""Scores of a row that is not trained again just to be compared with, stored with what made them."""

from typing import NamedTuple

from misa.engine.runs.folder import Run
from misa.rows import find_row


class Stored(NamedTuple):
    """Mask AP in percent of one training of a row: its hash, seed, the commit that it was trained at, its device."""

    digest: str
    seed: int
    commit: str
    device: str
    segm: dict[str, float | None]

    def provenance(self, row: str) -> str:
        """Where the figures come from, as a line."""
        return f"{row} (hash {self.digest}), seed {self.seed}, on {self.device}, trained at commit {self.commit[:10]}"


STORED = {
    "demo:box": Stored(
        digest="7537a61b67",
        seed=0,
        commit="a6c1d970f45802efa1f82e4666531db95a428483",
        device="cpu",
        segm={"AP": 26.54, "AP50": 49.4, "AP75": 29.79, "APs": 24.05, "APm": 34.7, "APl": None},
    ),
}


def stored_beside(run: Run) -> dict[str, Stored]:
    """The stored rows that a run may be compared with: trained and scored on the same embedded scenes.

    None for a run that is one of these rows itself, a smoke run, a teacher, or one on other data.
    """
    own = run.experiment
    if own.data != "demo" or own.semantic is not None or own.limit is not None:
        return {}
    return {
        row: stored
        for row, stored in STORED.items()
        if find_row(row).scenes == own.scenes and stored.digest != own.digest()
    }
