"""What ends a command other than by finishing; each has its exit code in `finetune.cli`."""

import importlib.util
import signal
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import TYPE_CHECKING


def _import_without_its_package(name: str) -> ModuleType:
    """Import a module, but not the package around it.

    `import qwenvl` registers the model with Transformers and so imports torch, which takes seconds. A mistyped key of
    a recipe is to be answered at once.
    """
    if name not in sys.modules:
        package = importlib.util.find_spec(name.partition(".")[0])
        assert package is not None
        spec = PathFinder.find_spec(name, package.submodule_search_locations)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


if TYPE_CHECKING:
    from qwenvl.errors import InputError, MissingFileError
else:
    _errors = _import_without_its_package("qwenvl.errors")
    InputError, MissingFileError = _errors.InputError, _errors.MissingFileError

__all__ = ["Failed", "InputError", "Interrupted", "MissingFileError", "UserError"]


class UserError(InputError):
    """Something in the recipe, the arguments or their surroundings that the user can put right. Exit code 2."""


class Failed(RuntimeError):
    """The work could not be done though the input was right; the message says all there is to say. Exit code 1."""


class Interrupted(BaseException):
    """The command was asked to stop. `exit_code` is 128 + the signal's number: 143 for SIGTERM, 130 for SIGINT.

    A BaseException, as KeyboardInterrupt is: it can come anywhere, and what makes a bad image of any error that a
    decoder raises must let it pass.

    Args:
        saved: all that was done is saved.
        said: what is saved, in words; None says it by `saved` and by the command.
        agreed: all processes of the command stop together.
    """

    def __init__(self, number: int, saved: bool, said: str | None = None, agreed: bool = False):
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved = saved
        self.said = said
        self.agreed = agreed or saved
        self.exit_code = 128 + number
