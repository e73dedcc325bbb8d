"""What ended the work of one process of a run, told to the others: all of them stop, for the same reason."""

import signal
from dataclasses import asdict, dataclass
from typing import Any, Literal

from finetune.errors import Failed, InputError, Interrupted, UserError


@dataclass(frozen=True)
class Trouble:
    """An error in a form that can be sent.

    Attributes:
        process: its number.
        kind: whether the input was wrong, the work failed, or a signal stopped it.
        text: of the error.
        signal: the signal's number; 0 without one.
    """

    process: int
    kind: Literal["input", "failed", "stopped"]
    text: str
    signal: int = 0

    @classmethod
    def of(cls, error: BaseException, process: int) -> "Trouble":
        if isinstance(error, Interrupted):
            return cls(process, "stopped", str(error), error.number)
        if isinstance(error, KeyboardInterrupt):
            return cls(process, "stopped", "SIGINT", signal.SIGINT)
        if isinstance(error, InputError):
            return cls(process, "input", str(error))
        if isinstance(error, Failed):
            return cls(process, "failed", str(error))
        if isinstance(error, GeneratorExit):
            return cls(process, "failed", "it has left off")
        return cls(process, "failed", f"{type(error).__name__}: {error}")

    def error(self) -> BaseException:
        """What the other processes raise."""
        if self.kind == "stopped":
            return Interrupted(self.signal, saved=False)
        return (UserError if self.kind == "input" else Failed)(f"process {self.process}: {self.text}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
