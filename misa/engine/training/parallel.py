"""Several processes that train together: joining them, agreeing between them, starting them.

One process a GPU, under torchrun or SLURM's srun; on a CPU under torchrun too, for tests. `misa train --gpus N` starts
torchrun itself, for one machine. On several machines the same module is started on each:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m misa train ROW
    srun --ntasks-per-node 8 --gpus-per-node 8 python -m misa train ROW
"""

import contextlib
import dataclasses
import datetime
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from misa.errors import DIVERGED, Diverged, Stopped, UserError
from misa.parameters import TrainParameters

T = TypeVar("T")
# Long enough for one process to make label maps or score COCO while the others wait.
_PATIENCE = datetime.timedelta(hours=6)
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket timeout")


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How the images of one step are shared: processes, images that each sees at a time, how often before the step."""

    processes: int
    images: int
    accumulate: int

    def __str__(self) -> str:
        parts = [f"{self.images} images"]
        if self.processes > 1:
            parts.insert(0, f"{self.processes} processes")
        if self.accumulate > 1:
            parts.append(f"{self.accumulate} accumulated")
        return f"batch {self.processes * self.images * self.accumulate} = {' x '.join(parts)}"


def share_batch(batch: int, processes: int, per_gpu: int | None = None) -> Sharing:
    """A batch over processes of `per_gpu` images at a time (None: all of their part), the rest accumulated.

    UserError where it cannot be shared evenly: it would be another batch in silence.
    """
    if batch % processes:
        raise UserError(
            f"a batch of {batch} cannot be shared evenly by {processes} processes; take {_divisors(batch)} of them, or "
            "another batch."
        )
    part = batch // processes
    images = part if per_gpu is None else per_gpu
    if part % images:
        raise UserError(
            f"per_gpu is {images}, and the {part} images of each process cannot be accumulated from it; take "
            f"{_divisors(part)}."
        )
    return Sharing(processes, images, part // images)


def _divisors(number: int) -> str:
    *most, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(most)} or {last}" if most else last


def expected_processes() -> int:
    """How many processes torchrun or srun has started for this training; 1 for a process on its own."""
    # Not SLURM_NTASKS: a batch script has it as well, and is one process.
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0 or expected_processes() == 1


def join(*, cuda: bool) -> None:
    """Join the other processes, once; nothing to do for a process on its own."""
    if expected_processes() == 1 or dist.is_initialized():
        return
    if "RANK" not in os.environ:
        os.environ.update(_from_slurm())
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU: torch finds {torch.cuda.device_count()}; start as many "
                "processes on a machine as it has GPUs."
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)


def leave() -> None:
    """Leave the group and end its threads, so that this process ends or trains again clean."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # gloo's threads end with the last reference to the group, and a model under DDP, which is in a cycle, has one.
        # A thread that still lets go of a tensor when the interpreter ends would abort the process.
        gc.collect()


def _from_slurm() -> dict[str, str]:
    """torchrun's variables from those of srun."""
    nodes = os.environ["SLURM_STEP_NODELIST"]
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", names.stdout.split()[0]),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000)),
    }


def from_first(compute: Callable[[], T]) -> T:
    """What `compute` gives in the first process, in all of them; its UserError likewise."""
    if not dist.is_initialized():
        return compute()
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message[0] = compute()
        except UserError as error:
            message[1] = str(error)
            dist.broadcast_object_list(message)
            raise
    dist.broadcast_object_list(message)
    if message[1] is not None:
        raise UserError(message[1])
    result: T = message[0]
    return result


@contextlib.contextmanager
def told_when_lost() -> Iterator[None]:
    """Says in one sentence that another process of the training is gone, in place of the network library's words."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST)
        if not (dist.is_initialized() and lost):
            raise
        raise Stopped(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost the others: one of them has ended (its own "
            "message, if any, is above); the same command goes on from the last checkpoint."
        ) from error


def launch(parameters: TrainParameters, processes: int) -> None:
    """Run `misa train` with these parameters in so many processes of this machine, and pass on what they print.

    They get an interrupt or SIGTERM of this process as well, and save before they end.

    Raises:
        UserError: they refused the parameters or the data.
        Diverged: their losses are no longer numbers.
        Stopped: they ended before the training did.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "misa", "train", parameters.row, *train_options(parameters)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TORCH_DISTRIBUTED_LOGGING": "OFF"}
    environment.setdefault("OMP_NUM_THREADS", str(parameters.threads))  # torchrun would say a word about it
    said: list[str] = []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as child, _passing_on(child):
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("misa train: "):
                said.append(line.removeprefix("misa train: ").strip())
            elif not said:  # what follows a sentence of ours is torchrun's report of itself
                print(line, end="", flush=True)
        status = child.wait()
    if status == 0:
        return
    reason = said[0] if said else f"the processes ended with status {status}; the same command goes on."
    if "SIGTERM" in reason:
        raise Stopped(reason, status=128 + signal.SIGTERM)
    # Wrong input ends a process with status 2, which torchrun turns into 1: only the sentence tells them apart.
    if reason.startswith(DIVERGED):
        raise Diverged(reason.removeprefix(DIVERGED))
    raise (Stopped if "goes on" in reason else UserError)(reason)


@contextlib.contextmanager
def _passing_on(child: "subprocess.Popen[str]") -> Iterator[None]:
    def end() -> None:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)

    def on_term(*_: Any) -> None:
        end()

    before = _set_handler(on_term)
    try:
        yield
    except KeyboardInterrupt:
        end()
        child.wait()
        raise
    finally:
        _set_handler(before)


def _set_handler(handler: Any) -> Any:
    """Set SIGTERM's handler where that is possible (in the main thread); returns the one before."""
    try:
        return signal.signal(signal.SIGTERM, handler if handler is not None else signal.SIG_DFL)
    except ValueError:
        return None


def train_options(parameters: TrainParameters) -> Sequence[str]:
    """The command line that stands for these parameters, without the row."""
    options = []
    for field in dataclasses.fields(parameters):
        value = getattr(parameters, field.name)
        if field.name in ("row", "interactive") or value == field.default:
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{name}" if value else f"--no-{name}")
        else:
            options += [f"--{name}", str(value)]
    return options
