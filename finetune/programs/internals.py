"""Checks that another package's internals are those that an adaptation was written for."""

import inspect
from collections.abc import Callable, Collection
from importlib.metadata import version
from typing import Any

from finetune.errors import UserError

TRIED = {"transformers": "5.23.0", "trl": "1.16.0", "lm_eval": "0.4.13"}
"""Versions that each adaptation was written for and tried with."""


def require_parameters(package: str, name: str, function: Callable[..., Any] | None, wanted: Collection[str]) -> None:
    """Check that a function is there and takes certain parameters.

    Args:
        package, name: where it is, for the message.
        function: None where there is no such function.

    Raises:
        UserError: it is not there, or does not take them.
    """
    if function is not None and set(wanted) <= set(inspect.signature(function).parameters):
        return
    raise UserError(
        f"run: {package} {version(package)} has no {name} as this software knows it, so that the model cannot be "
        f"fitted in: install {package} {TRIED[package]}, which was tried"
    )
