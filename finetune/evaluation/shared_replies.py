"""The questions of an evaluation shared out over the processes of a launcher; the main one gathers the replies.

All processes know all questions and share them by the same rule. Replies reach the main process as they come, and it
alone writes: an interruption keeps them, and the same command goes on with any number of processes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from finetune.errors import UserError
from finetune.evaluation.results import Record
from finetune.run.meeting import Meeting

NAP = 0.1  # seconds between two looks for the replies of others


class SharedReplies:
    """The replies of one model.

    Args:
        meeting: of the processes.
        name: of the model, the same on all of them.
        shares: for each process, how many questions it replies to.
    """

    def __init__(self, meeting: Meeting, name: str, shares: Sequence[int]):
        self._meeting, self._name, self._shares = meeting, name, shares
        self._next = [0] * len(shares)  # of each process

    def send(self, record: Record) -> None:
        """Hand a reply of this process to the main one."""
        self._meeting.raise_if_failed()
        own = self._meeting.process
        self._meeting.tell(self._key(own), record)
        self._next[own] += 1

    def arrived(self) -> Iterator[Record]:
        """The replies of the other processes that are there and were not taken yet."""
        for process in range(1, len(self._shares)):
            while self._next[process] < self._shares[process]:
                record = self._meeting.take(self._key(process))
                if record is None:
                    break
                self._next[process] += 1
                yield record

    def last_arrived(self) -> Iterator[Record]:
        """As `arrived`, for a process that is being stopped: the launcher may have ended, with what it keeps."""
        with suppress(dist.DistError):
            yield from self.arrived()

    def rest(self) -> Iterator[Record]:
        """The replies that are missing, waiting for them.

        Raises:
            BaseException: another process has failed.
        """
        while self._next[1:] != list(self._shares[1:]):
            yield from self.arrived()
            self._meeting.raise_if_failed()
            time.sleep(NAP)

    def _key(self, process: int) -> str:
        return f"{self._name}/reply/{process}/{self._next[process]}"


def tell_numbers(meeting: Meeting, name: str, numbers: Sequence[int], identity: Mapping[str, Any]) -> None:
    """Tell the other processes which questions are missing, and of which evaluation."""
    meeting.tell(f"{name}/numbers", {"numbers": list(numbers), **{key: identity[key] for key in ("data", "model")}})


def hear_numbers(meeting: Meeting, name: str, data: Mapping[str, Any], model: Mapping[str, Any] | None) -> list[int]:
    """The questions that are missing, from the main process.

    Args:
        data, model: the identity of this process's questions and of its model; None where another process of its
            machine looks at the model.

    Raises:
        UserError: they are not those of the main process: on another machine the path may lead elsewhere.
    """
    told = meeting.hear(f"{name}/numbers")
    for what, own in (("data", data), ("model", model)):
        if own is not None and told[what] != own:
            raise UserError(
                f"the {what} of this evaluation are not the same on all machines: copy them, or share a disk"
            )
    numbers: list[int] = told["numbers"]
    return numbers
