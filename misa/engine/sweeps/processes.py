"""Processes of a sweep on this machine, some at a time."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue

from tqdm.auto import tqdm

from misa.engine.sweeps.jobs import Job
from misa.engine.sweeps.logs import failure, steps

_LOOK, _LOOK_IN_FILE = 5.0, 60.0  # seconds between two updates of a progress bar: in a terminal, else


def run_here(
    commands: Mapping[Job, list[str]],
    slots: int,
    gpus: int | None,
    what: str = "training",
    note: Callable[[Iterable[Job]], str] = steps,
) -> list[tuple[Job, str]]:
    """Run processes on this machine, `slots` at a time; return the failed jobs with their last lines.

    what, note: for the progress bar, the name of a process and how far those that run at the time are.
    """
    stopped, running = threading.Event(), dict[Job, subprocess.Popen[bytes]]()
    free: SimpleQueue[str] = SimpleQueue()
    for devices in slot_devices(slots, gpus):
        free.put(devices)

    def one(wanted: Job) -> str | None:
        if stopped.is_set():
            return None
        log = wanted.log
        log.parent.mkdir(parents=True, exist_ok=True)
        devices = free.get()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices} if devices else None
        try:
            with log.open("ab") as output:
                process = subprocess.Popen(commands[wanted], stdout=output, stderr=subprocess.STDOUT, env=environment)
                running[wanted] = process
                if stopped.is_set():  # in between
                    process.terminate()
                status = process.wait()
                del running[wanted]
        except OSError as error:
            return f"it cannot be started with its output in {log} ({error.strerror})"
        finally:
            free.put(devices)
        return failure(status, log, advice="take fewer slots")

    failed: list[tuple[Job, str]] = []
    pause = _LOOK if sys.stderr.isatty() else _LOOK_IN_FILE
    with ThreadPoolExecutor(slots) as pool:
        started: dict[Future[str | None], Job] = {pool.submit(one, wanted): wanted for wanted in commands}
        try:
            with tqdm(total=len(commands), desc=f"{what}s", unit=what) as bar:
                left = set(started)
                while left:
                    done, left = wait(left, timeout=pause, return_when=FIRST_COMPLETED)
                    failed += [(started[one], sentence) for one in done if (sentence := one.result()) is not None]
                    bar.set_postfix_str(note(list(running)), refresh=not done)
                    bar.update(len(done))
        except BaseException:
            stopped.set()
            for process in list(running.values()):
                process.terminate()
            raise
    return failed


def slot_devices(slots: int, gpus: int | None) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each slot; "" leaves the variable unset."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    names = [name.strip() for name in visible.split(",") if name.strip()]
    each = 1 if gpus is None else gpus
    if not 0 < each <= len(names):  # on the CPU, or more than available, which the training reports
        return [""] * slots
    return [",".join(names[(slot * each + i) % len(names)] for i in range(each)) for slot in range(slots)]
