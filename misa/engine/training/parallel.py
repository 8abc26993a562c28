"""Distributed training: initialize the process group, broadcast results, launch processes.

There is one process per GPU, under torchrun or SLURM's srun; for tests also on a CPU under torchrun. `misa train --gpus
N` starts torchrun on one machine. For several machines, start on each:

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
# Timeout of collectives: long enough for one process to make label maps or evaluate COCO while the others wait.
_PATIENCE = datetime.timedelta(hours=6)
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket timeout")


def join(*, cuda: bool) -> None:
    """Initialize the process group, unless it exists or there is only this process.

    mmengine's `init_dist` is not used: it requires a CUDA device, confuses the task count of a SLURM batch script with
    that of its step, and gives all trainings of a machine the same port.
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
    """Destroy the process group and its threads, so that this process can end."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # gloo's threads end with the last reference to the group; a DDP model, part of a reference cycle, holds one.
        # A thread that frees a tensor while the interpreter exits would abort the process.
        gc.collect()


def _from_slurm() -> dict[str, str]:
    """torchrun's environment variables, derived from srun's."""
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
    """Call `compute` on rank 0 and broadcast its result, or its UserError, to all processes."""
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
    """Replace a communication library's error after the end of another process by Stopped with a clear sentence."""
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
    """Run `misa train` with these arguments in several processes of this machine and print their output.

    Ctrl-C and SIGTERM are forwarded to the processes, which save a checkpoint before they end.
    Raises UserError: invalid parameters or data; Diverged: a loss is NaN or infinite; Stopped: the processes ended
    before the training was complete.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "misa", "train", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TORCH_DISTRIBUTED_LOGGING": "OFF"}
    environment.setdefault("OMP_NUM_THREADS", str(threads))  # otherwise torchrun warns
    messages: list[str] = []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    with process as child, _forwarded_signals(child):
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("misa train: "):
                messages.append(line.removeprefix("misa train: ").strip())
            elif not messages:  # after our error message torchrun reports the same error
                print(line, end="", flush=True)
        status = child.wait()
    if status == 0:
        return
    reason = messages[0] if messages else f"the processes ended with status {status}; the same command goes on."
    if "SIGTERM" in reason:
        raise Stopped(reason, status=128 + signal.SIGTERM)
    # torchrun turns the status 2 of invalid input into 1: only the message distinguishes the cases.
    if reason.startswith(DIVERGED):
        raise Diverged(reason.removeprefix(DIVERGED))
    raise (Stopped if "goes on" in reason else UserError)(reason)


@contextlib.contextmanager
def _forwarded_signals(child: "subprocess.Popen[str]") -> Iterator[None]:
    def terminate() -> None:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)

    before = _set_handler(lambda *_: terminate())
    try:
        yield
    except KeyboardInterrupt:
        terminate()
        child.wait()
        raise
    finally:
        _set_handler(before)


def _set_handler(handler: Any) -> Any:
    """Set SIGTERM's handler and return the previous one; a no-op that returns None outside the main thread."""
    try:
        return signal.signal(signal.SIGTERM, handler if handler is not None else signal.SIG_DFL)
    except ValueError:
        return None
