"""Collectives of distributed training: means over the whole batch instead of each process's part."""

import torch
from mmengine.dist import all_gather, all_reduce, get_world_size
from torch import Tensor


def share(count: Tensor | float, device: torch.device) -> Tensor | float:
    """Factor that turns a mean over this process's `count` items into its part of the mean over all processes' items.

    DDP averages gradients afterwards, so the factor is count / (mean count of all processes); 1 in a single process
    and if no process has any items.
    """
    if get_world_size() == 1:
        return 1.0
    mean = batch_mean(torch.as_tensor(count, dtype=torch.float32, device=device))
    return torch.where(mean > 0, count / mean.clamp(min=1e-6), torch.ones_like(mean))


def batch_mean(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes (all-reduce); the tensor itself in a single process."""
    if get_world_size() == 1:
        return value
    value = value.clone()
    all_reduce(value, op="mean")
    return value


def together(value: Tensor) -> Tensor:
    """Stack the processes' tensors, of equal shape, in the order of ranks (all-gather): (p ...)."""
    return torch.stack(all_gather(value)) if get_world_size() > 1 else value[None]
