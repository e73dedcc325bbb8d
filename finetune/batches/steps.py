"""The number of optimizer steps of a run, as the trainer counts them."""

from math import ceil
from typing import NamedTuple

from finetune.recipe import Train


class Steps(NamedTuple):
    """Attributes:
    batches: of one process in an epoch.
    epoch: optimizer steps of an epoch; `all`, of the run.
    """

    batches: int
    epoch: int
    all: int


def count_steps(train: Train, samples: int, processes: int) -> Steps:
    """Count the steps of a run.

    Args:
        samples: of an epoch, repeated by the weights of their sources.
    """
    share = samples / (train.per_device_train_batch_size * processes)
    batches = int(share) if train.dataloader_drop_last else ceil(share)
    epoch = max(1, ceil(batches / train.gradient_accumulation_steps))
    return Steps(batches, epoch, train.max_steps if train.max_steps > 0 else ceil(train.num_train_epochs * epoch))
