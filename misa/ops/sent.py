"""From the host to a device, and what the host still knows of it."""

import torch
from torch import Tensor

STAGED = 2**16  # bytes that CUDA's driver takes from ordinary memory at once; larger copies wait unless they are pinned


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; nothing waits, whatever their size."""
    if device.type == "cuda" and values.device.type == "cpu" and values.nbytes > STAGED:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def noted(there: Tensor, host: Tensor) -> Tensor:
    """The tensor on the device, with the same values on the host for `on_host`."""
    if there is not host:  # as on the CPU
        there.host = host, there._version  # type: ignore[attr-defined]
    return there


def on_host(values: Tensor) -> Tensor:
    """The values on the host. Waits for the device, unless they are as they were `noted`."""
    kept: Tensor | None
    kept, version = getattr(values, "host", (None, None))
    return values.cpu() if kept is None or version != values._version else kept
