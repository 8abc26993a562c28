"""Records in a run folder: parameters and environment of a result. Reading them imports no framework."""

import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import misa
from misa.errors import UserError, option_name
from misa.experiment import SEED, TORCHVISION, Experiment, Objective, plain
from misa.files import digest, missing, read_json
from misa.rows import find_row, labelling_row, lineage, teacher_row

if TYPE_CHECKING:
    from mmengine.config import Config

FILES = ("params.json", "env.json", "config.py", "log.txt", "losses.jsonl", "metrics.json")
SMOKE = "a smoke run: two training steps on small images, to see that everything runs; its numbers mean nothing."
RESUMED = "env_resumed.jsonl"
"""File with a line for each resume under other versions, device, threads, processes or commit than env.json's."""
COST = "cost.json"
"""File of seconds and memory of the steps (`misa.engine.training.cost`), which vary between equal trainings."""


def run_params(
    experiment: Experiment, *, row: str, seed: int, data_root: Path, data: Mapping[str, str], classes: Sequence[str]
) -> dict[str, Any]:
    """The parameters that identify a run: equal values mean the same run. data: see `misa.data.digest`."""
    return {
        **teacher_digest(experiment),
        **student_digest(experiment),
        "row": row,
        "digest": experiment.digest(),
        "seed": seed,
        "data_root": str(data_root),
        "data": dict(data),
        "classes": list(classes),
        "experiment": experiment.values(),
    }


def teacher_digest(experiment: Experiment) -> dict[str, str]:
    """Part of a record: identifies a row's teacher by its lineage, or by the digest of its weights file."""
    if experiment.trains_teacher:
        return {"teacher_digest": lineage(teacher_row(experiment))}
    weights = teacher_weights(experiment)
    if weights is None:
        return {}
    if not weights.is_file():
        raise UserError(f"there is no file of weights {weights}, which {experiment.teacher} names; give another.")
    return {"teacher_digest": digest(weights)}


def student_digest(experiment: Experiment) -> dict[str, str]:
    """Part of a teacher's record: identifies the row of the student whose masks train it by its lineage."""
    name = labelling_row(experiment)
    return {"student_digest": lineage(find_row(name))} if name else {}


def teacher_weights(experiment: Experiment) -> Path | None:
    """The weights file of a row's torchvision teacher; None for torchvision's weights."""
    file = experiment.teacher.removeprefix(TORCHVISION).partition(":")[2]
    return Path(file).expanduser() if file and not experiment.trains_teacher else None


def read_params(folder: Path) -> dict[str, Any]:
    """Read the parameters of a run folder; UserError if it is not one."""
    if not folder.exists():
        raise UserError(missing(folder, "run folder", "give a folder made by misa train"))
    params = read_json(folder / "params.json")
    if params is None:
        raise UserError(f"{folder} is not a run folder: it has no params.json; give a folder made by misa train.")
    lacks = {"row", "digest", "seed", "data_root", "classes", "experiment"} - params.keys()
    if lacks:
        raise UserError(f"{folder / 'params.json'} lacks {sorted(lacks)[0]}; give a folder made by misa train.")
    return params


def require_own(folder: Path, params: dict[str, Any]) -> None:
    """Raise UserError if `folder` holds another run than `params`, or unknown files.

    Moved but equal data is the same run, and so is a start that is named in another way. Changed annotations make
    another run, unless the run is finished.
    params: the whole record, or the part of it that is known before the data is read: seed and experiment.
    """
    before, name = read_json(folder / "params.json"), option_name("work_dir")
    if before is None:
        foreign = [name for name in FILES if (folder / name).exists()]
        if foreign:
            raise UserError(f"{name} {folder} has a {foreign[0]} but no params.json; choose an empty folder.")
        return
    # The row's name does not matter; older runs did not record what they learn from.
    ignored = {"row", "digest", "data"} | ({"teacher_digest", "student_digest"} - before.keys())
    if "data" in params and same_data(before, params):
        ignored.add("data_root")
    ours = {name: value for name, value in params.items() if name not in ignored}
    smoke, now_smoke = (of["experiment"].get("limit") is not None for of in (before, params))
    for key, there, here in _differences(before, json.loads(json.dumps(ours))):
        if key.partition(".")[0] == "expected":  # the paper's figures, which change nothing
            continue
        if key == "start" and len({start_place(start, params["seed"]) for start in (there, here)}) == 1:
            continue
        what = "a smoke run, a test of the installation" if smoke and not now_smoke else "another run"
        why = "" if smoke and not now_smoke else f" ({key} is {there} there and {here} here)"
        raise UserError(f"{name} {folder} holds {what}{why}; choose another {name} or delete that one.")
    if (changed := changed_splits(before, params.get("data", {}))) and not (folder / "metrics.json").exists():
        raise UserError(
            f"the annotations of {' and '.join(changed)} in {params['data_root']} have changed since the run in "
            f"{folder} began, and it cannot go on with others; restore them, or choose another {name} for the "
            "changed ones."
        )


def start_place(start: str, seed: int) -> Path:
    """The run folder or checkpoint that `Experiment.start` names for a seed, as an absolute path without links."""
    return Path(start.replace(SEED, str(seed))).expanduser().resolve()


def same_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two records are of the same dataset: the same folder, or equal annotations in another one."""
    return before["data_root"] == now["data_root"] or ("data" in before and before["data"] == now.get("data"))


def learned_from_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run has learned from the training annotations that another one is to learn from, in any folder."""
    ours, theirs = (record.get("data", {}).get("train") for record in (before, now))
    return ours == theirs if ours and theirs else same_data(before, now)


def changed_splits(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """The splits whose annotations differ from a run's record; none for older runs, which did not record them."""
    recorded = before.get("data", {})
    return [split for split, digest in now.items() if recorded.get(split, digest) != digest]


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the values that differ between two records, by dotted name; at the top level only keys of `now`.

    A field added later is missing from a row's values at its default.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**now, **before} if name else now:
            pair = before.get(key, "its default"), now.get(key, "its default")
            yield from _differences(*pair, f"{name}.{key}" if name else key)
    elif before != now:
        yield name.removeprefix("experiment."), before, now


def environment(device: str) -> dict[str, Any]:
    """Provenance of a result: versions, device and commit."""
    import mmcv
    import mmdet
    import mmengine
    import numpy
    import torch
    import torchvision

    return {
        "misa": misa.__version__,
        "commit": current_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "mmdet": mmdet.__version__,
        "mmcv": mmcv.__version__,
        "mmengine": mmengine.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }


def commits(folder: Path) -> list[str | None]:
    """The commits that a run was trained and evaluated at, the first one first; None for one that is not known."""
    path = folder / RESUMED
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [(read_json(folder / "env.json") or {}).get("commit")]
    found += [own["commit"] for own in map(json.loads, lines) if "commit" in own]
    return list(dict.fromkeys(found))


def current_commit() -> str | None:
    """The commit of the package's checkout; None if it is installed without one."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(misa.__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def loadable(config: "Config") -> "Config":
    """Replace classes and functions by dotted names and objectives by plain values: `Config.fromfile` loads a dump."""
    from mmengine.config import Config

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(named(item) for item in value)
        if isinstance(value, Objective):
            return plain(value)
        return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type | FunctionType) else value

    return Config(named(config.to_dict()), format_python_code=False)
