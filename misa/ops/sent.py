"""From the host to a device."""

import torch
from torch import Tensor

STAGED = 2**16  # bytes that CUDA's driver takes from ordinary memory at once; larger copies wait unless they are pinned


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; nothing waits, whatever their size."""
    if device.type == "cuda" and values.device.type == "cpu" and values.nbytes > STAGED:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
