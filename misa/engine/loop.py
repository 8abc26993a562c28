"""An epoch of whole batches, whatever the number of processes, that can be left and entered anywhere."""

from collections.abc import Iterator, Sized

from mmengine.dataset import DefaultSampler
from mmengine.runner import EpochBasedTrainLoop

from misa.errors import UserError


class WholeBatches(DefaultSampler):
    """Shuffled indices, as many as make whole batches over all processes, and of these the process's own share.

    Every batch has the same images in whatever number of processes and steps of accumulation it is learned.

    Args:
        batch: images of one step of the optimiser, over all processes.
    """

    def __init__(self, dataset: Sized, *, batch: int, seed: int) -> None:
        super().__init__(dataset, shuffle=True, seed=seed, round_up=False)
        self.total_size = len(dataset) // batch * batch
        self.num_samples = self.total_size // self.world_size
        self.skip = 0  # indices of this process that the next epoch leaves out

    def __iter__(self) -> Iterator[int]:
        mine = list(super().__iter__())[self.skip :]
        self.skip = 0
        return iter(mine)


class ResumableLoop(EpochBasedTrainLoop):
    """mmengine's, which enters an epoch where a checkpoint left it."""

    def run_epoch(self) -> None:
        """Called by mmengine."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done = self._iter - self._epoch * len(self.dataloader)
        if not 0 <= done < len(self.dataloader):
            raise UserError(
                f"the checkpoint is at batch {self._iter} after {self._epoch} epochs of {len(self.dataloader)}: it was "
                "written with another per_gpu or number of GPUs; go on with those."
            )
        batches = self.dataloader.batch_sampler
        batches.sampler.skip = done * batches.batch_size
        for index, batch in enumerate(self.dataloader, start=done):
            self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1
