"""Parameters of the notebooks that have no command of their own; the other notebooks use their command's."""

import os
from pathlib import Path
from typing import Literal

from misa.commands import _shared as shared
from misa.parameters import Parameters, option


def work_in_project() -> None:
    """Change the working directory from notebooks/ or runs/notebooks/, where JupyterLab starts, to the project.

    papermill starts in the project's folder, so relative paths then mean the same in both.
    """
    here = Path.cwd()
    for project in here.parents[: 2 if here.parent.name == "runs" else 1]:
        if here.name == "notebooks" and (project / "experiments").is_dir():
            os.chdir(project)
            return


class Explorer(Parameters):
    """Parameters of both explorers: a run, or an image of one's own with a teacher."""

    run: str = option("runs/demo-long-seed0", "run folder; where there is none, teacher:demo is trained once")
    data_root: str = shared.moved_data()
    image: str = option("", "a photograph of your own, explored like the others")
    boxes: str = option("", "boxes of its objects: x1 y1 x2 y2 label, with ; between")
    teacher: str = option("", "its teacher: a run, or torchvision:deeplabv3_resnet50 (default: colors alone)")
    threads: int = shared.threads()
    smoke: bool = shared.smoke()
    interactive: bool = option(True, "the live panel as well, below the figures that are stored")

    @property
    def folder(self) -> Path:
        """The run folder (see `run_place`)."""
        return shared.run_place(self.run, self.smoke)


class AffinityParameters(Explorer):
    """Parameters of `notebooks/affinity.ipynb`."""

    local_bandwidth: float = option(0.15, "bandwidth of the color affinity in windows (APro's)", low=1e-3, high=10)
    tree_bandwidth: float = option(
        0.4, "bandwidth of the color affinity along the tree (in APro: 0.01)", low=1e-3, high=10
    )
    semantic_scale: float = option(8.0, "bandwidth of the semantic affinities, in σ of S", low=1e-2, high=100)
    balance: float = option(0.7, "weight of the saliency affinity beside the color affinity (§4.3)", low=0, high=10)
    form: Literal["sum", "product"] = option("sum", "of SEPA: sum (Eq. 13), or product (the embedded data's rows)")
    steps: int = option(20, "steps of the propagation in windows", low=0, high=1000)


class FrequencyParameters(Explorer):
    """Parameters of `notebooks/frequency.ipynb`."""

    run: str = option("runs/demo-long-seed0", "student with a teacher; without one, demo:long is trained once")
    place: int = option(0, "index of the validation image", low=0)
    channel: int = shared.channel()
    radius: float = option(1.5, "radius t of Eq. 4, in bins of the feature map (demo:long's)", low=0)
    scale: float = option(0.2, "scale θ of Eq. 4", low=0, high=1)


class OwnDataParameters(Parameters):
    """Parameters of `notebooks/own_data.ipynb`."""

    data: str = option("", "folder of images and boxes (default: an example is drawn below out)")
    out: str = option("runs/own_data", "folder of everything that is made; -smoke is added for a smoke run")
    row: str = option("own:small", "row to train: own:small, own:medium, or a recipe of the other tables")
    photos: str = option("", "images, or a folder of them, to predict on (default: those held out)")
    score: float = option(0.3, "score threshold of the instances that are shown", low=0, high=1)
    epochs: int | None = shared.epochs()
    seed: int = shared.seed()
    threads: int = shared.threads()
    smoke: bool = shared.smoke()

    @property
    def folder(self) -> Path:
        """The folder of everything that is made."""
        return shared.smoke_folder(self.out, self.smoke)
