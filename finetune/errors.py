"""What ends a command other than by finishing; each has its exit code in `finetune.cli`."""

import signal


class UserError(Exception):
    """Something in the recipe, the arguments or their surroundings that the user can put right. Exit code 2."""


class Failed(RuntimeError):
    """The work could not be done though the input was right; the message says all there is to say. Exit code 1."""


class Interrupted(Exception):
    """The command was asked to stop. `exit_code` is 128 + the signal's number: 143 for SIGTERM, 130 for SIGINT."""

    def __init__(self, number: int, saved: bool):
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved = saved
        self.exit_code = 128 + number
