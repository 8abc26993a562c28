"""Batches that several processes share: means are taken over the whole batch, not over each process's part of it."""

import torch
from mmengine.dist import all_gather, all_reduce, get_world_size
from torch import Tensor


def share(count: Tensor | float, device: torch.device) -> Tensor | float:
    """What turns a mean over this process's `count` into its part of the mean over all processes' counts.

    The processes' gradients are averaged afterwards, so a process that has `count` of a mean count of m weighs
    count / m. In a single process, and where no process has any, it is 1.
    """
    if get_world_size() == 1:
        return 1.0
    mean = batch_mean(torch.as_tensor(count, dtype=torch.float32, device=device))
    return torch.where(mean > 0, count / mean.clamp(min=1e-6), torch.ones_like(mean))


def batch_mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes of a training; the tensor itself where there is one."""
    if get_world_size() == 1:
        return value
    value = value.clone()
    all_reduce(value, op="mean")
    return value


def together(value: Tensor) -> Tensor:
    """A tensor of the same shape in every process, stacked in the processes' order (p ...)."""
    return torch.stack(all_gather(value)) if get_world_size() > 1 else value[None]
