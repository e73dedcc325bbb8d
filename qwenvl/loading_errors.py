"""Errors of Transformers and PEFT while a model is loaded, as errors about the files that cause them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError

from qwenvl.checkpoint.adapter_files import require_whole_adapter
from qwenvl.errors import InputError
from qwenvl.model.whole import require_whole

# What the readers of JSON, safetensors and pickled files raise about a damaged one.
FILE_ERRORS = (OSError, ValueError, TypeError, EOFError, SafetensorError, UnpicklingError)


@contextmanager
def checkpoint_errors(base: str) -> Iterator[None]:
    """Raise an InputError in place of a library's error whose cause is in a checkpoint's files.

    The headers of the files were read before (`whole.require_whole`); a file that is damaged further on is found when
    the loader reads it. An error with another cause (no memory, a fault in the code) passes.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (*FILE_ERRORS, KeyError, RuntimeError) as error:
        fault = _fault_in_checkpoint(base)
        if fault is not None:
            raise fault from error
        if isinstance(error, OSError):
            raise InputError(f"{base} cannot be loaded: {first_line(error)}") from error
        raise


def _fault_in_checkpoint(base: str) -> InputError | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        require_whole(base)
    except InputError as error:
        return error
    return None


@contextmanager
def adapter_errors(adapter: str, base: str = "its base") -> Iterator[None]:
    """Raise an InputError in place of PEFT's errors about an adapter's files."""
    require_whole_adapter(adapter)
    try:
        yield
    except KeyError as error:
        raise InputError(f"{adapter}: adapter_config.json has a value that PEFT does not know: {error}") from error
    except UnpicklingError as error:  # its message advises to load the file unsafely
        raise InputError(f"{adapter}: the adapter's weights are damaged, or more than plain tensors") from error
    except FILE_ERRORS as error:
        raise InputError(f"{adapter}: the adapter cannot be loaded: {first_line(error)}") from error
    except RuntimeError as error:
        reason = str(error)
        if "size mismatch" in reason:  # of load_state_dict, which lists the tensors after its first line
            reason = reason.splitlines()[1].strip()
            raise InputError(f"{adapter}: the adapter does not fit {base}: {reason}") from error
        if "PytorchStreamReader" in reason:
            raise InputError(f"{adapter}: the adapter's weights are damaged: {first_line(error)}") from error
        raise


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
