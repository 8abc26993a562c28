"""Distributed training: join the processes, broadcast between them, launch them.

One process a GPU, under torchrun or SLURM's srun; on a CPU under torchrun too, for tests. `misa train --gpus N` starts
torchrun itself, for one machine. On several machines the same module is started on each:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m misa train ROW
    srun --ntasks-per-node 8 --gpus-per-node 8 python -m misa train ROW
"""

import contextlib
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
from misa.machine import expected_processes

T = TypeVar("T")
# Long enough for one process to make label maps or score COCO while the others wait.
_PATIENCE = datetime.timedelta(hours=6)
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket timeout")


def join(*, cuda: bool) -> None:
    """Join the other processes, once; nothing to do for a process on its own.

    mmengine's `init_dist` is not used: it asks for a CUDA device, takes the tasks of a SLURM batch script for those of
    its step, and gives all trainings of a machine the same port.
    """
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
    """Destroy the process group and its threads, so that this process can end or train again."""
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


def on_main_process(compute: Callable[[], T]) -> T:
    """Call `compute` on the main process and broadcast its result to all processes; its UserError likewise."""
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
def report_lost_peer() -> Iterator[None]:
    """Raise Stopped with one sentence where another process has ended, instead of the network library's error."""
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


def launch(arguments: Sequence[str], processes: int, *, threads: int) -> None:
    """Run `misa train` with these arguments in several processes of this machine and print what they print.

    An interrupt or SIGTERM of this process is forwarded to them, and they save before they end.

    Raises:
        UserError: they refused the parameters or the data.
        Diverged: their losses are no longer numbers.
        Stopped: they ended before the training did.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "misa", "train", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TORCH_DISTRIBUTED_LOGGING": "OFF"}
    environment.setdefault("OMP_NUM_THREADS", str(threads))  # or torchrun warns
    messages: list[str] = []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    with process as child, _forwarded_signals(child):
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("misa train: "):
                messages.append(line.removeprefix("misa train: ").strip())
            elif not messages:  # after our own error message comes torchrun's report of the same
                print(line, end="", flush=True)
        status = child.wait()
    if status == 0:
        return
    reason = messages[0] if messages else f"the processes ended with status {status}; the same command goes on."
    if "SIGTERM" in reason:
        raise Stopped(reason, status=128 + signal.SIGTERM)
    # Wrong input ends a process with status 2, which torchrun turns into 1: only the sentence tells them apart.
    if reason.startswith(DIVERGED):
        raise Diverged(reason.removeprefix(DIVERGED))
    raise (Stopped if "goes on" in reason else UserError)(reason)


@contextlib.contextmanager
def _forwarded_signals(child: "subprocess.Popen[str]") -> Iterator[None]:
    def terminate() -> None:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)

    def on_term(*_: Any) -> None:
        terminate()

    before = _set_handler(on_term)
    try:
        yield
    except KeyboardInterrupt:
        terminate()
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
