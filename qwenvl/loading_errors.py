"""Errors of Transformers and PEFT while a model is loaded, as errors about the files that cause them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from qwenvl.checkpoint.checkpoint_files import locate_tensors
from qwenvl.errors import InputError, MissingFileError
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.modeling import QwenVLForConditionalGeneration

# What the readers of JSON, safetensors and pickled files raise about a damaged one.
FILE_ERRORS = (OSError, ValueError, TypeError, EOFError, SafetensorError, UnpicklingError)


@contextmanager
def checkpoint_errors(base: str) -> Iterator[None]:
    """Raise an InputError in place of a library's error whose cause is in a checkpoint's files.

    The files are examined only after an error, so that loading costs nothing more. An error with another cause (no
    memory, a fault in the code) passes.
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
        GenerationConfig.from_pretrained(base)
    except OSError:  # it has none
        pass
    except (ValueError, TypeError) as error:
        return InputError(f"{base}: generation_config.json is not valid: {first_line(error)}")
    try:
        stored = locate_tensors(base)
    except FileNotFoundError as error:
        return MissingFileError(first_line(error))
    except (OSError, ValueError) as error:
        return InputError(first_line(error))
    with torch.device("meta"):
        expected = QwenVLForConditionalGeneration(QwenVLConfig.from_pretrained(base)).state_dict()
    for name, tensor in stored.items():
        # A weight in 4 bits is stored as bytes, in another shape.
        if name in expected and tensor.dtype.is_floating_point and tensor.shape != tuple(expected[name].shape):
            return InputError(
                f"{tensor.file}: {name} has shape {tensor.shape}, but config.json asks for "
                f"{tuple(expected[name].shape)}: the two belong to different models"
            )
    return None


@contextmanager
def adapter_errors(adapter: str, base: str = "its base") -> Iterator[None]:
    """Raise an InputError in place of PEFT's errors about an adapter's files."""
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
